"""What is found in data: planted copies and near-copies in real dialogues, doubtful summaries; a page that opens offline."""

from __future__ import annotations

import csv
import random
import re
import sys

import browser
import inspect_data
import inspecting
import pytest
from row_files import as_csv, write

from engine.data.rows import Example, read_examples
from engine.errors import EngineError
from engine.recipe.schema import Data
from engine.runtime.console import columns_of

pytest.importorskip("datasketch")

OTHER = {"은": "는", "는": "은", "이": "가", "가": "이", "을": "를", "를": "을"}
HOSTILE = '</td><script>document.title="broken in"</script><img src="http://example.org/x">'


def respaced(dialogue: str, draw: random.Random) -> str:
    """Every fifth space gone, every fifth one doubled, blank lines between turns."""
    words = re.sub(" ", lambda _: draw.choice(["", "  ", " ", " ", " "]), dialogue)
    return words.replace("\n", " \n\n")


def other_particles(dialogue: str, draw: random.Random) -> str:
    """은 for 는, 가 for 이, 를 for 을 and the reverse, at the ends of words."""
    return re.sub(r"(?<=[가-힣])[은는이가을를](?=[\s,.?!])", lambda found: OTHER[found.group()], dialogue)


def renamed(dialogue: str, draw: random.Random) -> str:
    """Speakers swapped, or given names, wherever they are named."""
    names = draw.choice([("#Person2#", "#Person1#"), ("민수", "영희"), ("상담원", "고객"), ("#Agent#", "#Customer#")])
    new = {"#Person1#": names[0], "#Person2#": names[1]}
    return re.sub(r"#Person[12]#", lambda found: new[found.group()], dialogue)


CHANGES = ((respaced,), (other_particles,), (renamed,), (respaced, other_particles, renamed))


def planted(examples: list[Example], count: int) -> dict[Example, str]:
    """`count` copies and as many near-copies, changed in one way or in all three, with the ids of their originals."""
    draw = random.Random(7)
    added = {}
    for place, origin in enumerate(draw.sample(examples, count)):
        text = origin.dialogue.replace("\n", "  \n")
        added[Example(f"same_{place}", text, origin.references, None, 0)] = origin.id
    for place, origin in enumerate(draw.sample(examples, count)):
        text = origin.dialogue
        for change in CHANGES[place % len(CHANGES)]:
            text = change(text, draw)
        assert text.split() != origin.dialogue.split()
        added[Example(f"near_{place}", text, origin.references, None, 0)] = origin.id
    return added


def couples_of(examples: list[Example]) -> set[frozenset[str]]:
    """Ids that are reported together, as equal or as nearly equal."""
    rows = [inspecting.Row("train", example) for example in examples]
    equal = [(group[0], row) for group in inspecting.equal_groups(rows) for row in group[1:]]
    near = [pair[1:] for pair in inspecting.near_pairs(rows)]
    return {frozenset(row.example.id for row in couple) for couple in equal + near}


def check_planted(examples: list[Example], count: int) -> None:
    """Each one is reported with its original or another copy of that, and at most 2 % of the other rows with anything."""
    added = planted(examples, count)
    couples = couples_of([*examples, *added])
    families = {example.id: {origin} for example, origin in added.items()}
    for example, origin in added.items():
        families[example.id] |= {other.id for other, its in added.items() if its == origin}
    missed = [own for own, family in families.items() if not any(own in c and c <= family for c in couples)]
    assert len(added) == 2 * count and not missed
    known = {*families, *added.values()}
    alarms = {row for couple in couples if not any(couple <= family for family in families.values()) for row in couple}
    assert len(alarms - known) <= 0.02 * len(examples), sorted(map(sorted, couples))


def test_planted_copies_are_found_and_nothing_else(shared_data):
    check_planted(read_examples(shared_data / "dialogsum_ko" / "dev.csv", Data(), require_summary=True), 20)


@pytest.mark.slow
def test_two_hundred_planted_copies_in_real_dialogues_are_found(shared_data):
    check_planted(read_examples(shared_data / "dialogsum_ko" / "train.csv", Data(), require_summary=True), 100)


TURNS = "#Person1#: 내일 몇 시에 도서관 앞에서 볼까요?\n#Person2#: 세 시가 좋아요. 우산을 꼭 챙겨 오세요."
OTHER_TURNS = "#Person1#: 예약하신 방은 바다가 보이는 이층입니다.\n#Person2#: 아침 식사는 몇 시부터 할 수 있나요?"


@pytest.fixture
def files(tmp_path):
    """A training file and a test file with one of everything that is looked for."""
    meeting = "#Person1#과 #Person2#는 내일 세 시에 도서관 앞에서 보기로 합니다."
    train = [
        ("a", TURNS, meeting),
        ("b", TURNS.replace("\n", " \n"), "태풍 때문에 모든 비행기가 결항되었습니다."),
        ("c", "철수: 이 영화는 어때?\n영희: 너무 길어.", "The film is too long."),
        ("d", "#Person1#: 감기에 걸렸어요.\n#Person2#: 약을 드세요.", "감기입니다."),
        (
            "e",
            "#Person1#: 오늘 저녁에 무엇을 먹을지 정했나요?\n#Person2#: 아직.",
            "오늘 저녁에 무엇을 먹을지 정했나요?",
        ),
        ("f", "#Person1#: 컴퓨터를 고쳤어요.\n#Person2#: 고마워요.", "#Person3#는 #Person1#의 컴퓨터를 고치"),
        ("g", f"#Person1#: {HOSTILE}\n#Person2#: 그래요.", "둘은 어떤 그림을 두고 이야기합니다."),
    ]
    test = [
        ("t1", TURNS, ""),
        ("t2", OTHER_TURNS, ""),
        ("t3", OTHER_TURNS.replace("은", "는").replace("#Person1#", "직원"), ""),
    ]
    names = ("fname", "dialogue", "summary")
    return [
        str(write(tmp_path, f"{name}.csv", as_csv([dict(zip(names, row, strict=True)) for row in rows])))
        for name, rows in (("train", train), ("test", test))
    ]


def sections(printed: str) -> dict[str, list[str]]:
    parts = [part.splitlines() for part in printed.strip().split("\n\n")]
    return {lines[0]: lines[1:] for lines in parts}


def test_everything_that_is_wrong_is_named(files, capsys):
    assert inspect_data.main(files) == 0
    printed = capsys.readouterr().out
    found = {title: "\n".join(lines) for title, lines in sections(printed).items()}
    assert re.search(r"train +7 +7\ntest +3 +0", found["Rows"])
    assert "train a = train b = test t1" in found["Duplicates"] and "2 rows with" in found["Duplicates"]
    assert re.search(r"test in train +1 +0", found["Between splits"])
    assert re.search(r"1\.00 +test t2 +test t3", found["Near-duplicates"]) and "1 pair with" in found["Near-duplicates"]
    assert re.search(r"train a +train b", found["Contradicting summaries"])
    reasons = "no Korean|\\d characters|the dialogue's first line|breaks off"
    doubts = dict(re.findall(rf"^train (\w) +({reasons})", found["Doubtful summaries"], re.MULTILINE))
    assert doubts == {"c": "no Korean", "d": "6 characters", "e": "the dialogue's first line", "f": "breaks off"}
    assert re.search(r"#Person1# +6 +2 +4 +0", found["Placeholders"])
    assert re.search(r"#Person3# +0 +1 +0 +1", found["Placeholders"])
    assert re.search(r"train f +#Person3#", found["Strangers in summaries"])
    assert max(map(columns_of, printed.splitlines())) <= inspect_data.WIDTH


def test_lengths_are_the_tokenizers(files, shared_data, capsys):
    from transformers import AutoTokenizer

    folder = shared_data / "tokenizers" / "kobart"
    assert inspect_data.main([*files, "--tokenizer", str(folder)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test dialogue"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(files[1], encoding="utf-8", newline="") as file:
        longest = max(len(tokenizer(row["dialogue"])["input_ids"]) for row in csv.DictReader(file))
    assert line.split()[2:6][-1] == str(longest)


def test_a_recipe_names_files_columns_limits_and_tokenizer(files, tmp_path, root, capsys):
    recipe = str(root / "recipes" / "quickstart.yaml")
    changes = [f"data.train_file={files[0]}", f"data.validation_file={files[1]}", "data.max_source_length=20"]
    changes += ["data.test_file=null"]
    assert inspect_data.main(["--recipe", recipe, *changes]) == 0
    found = sections(capsys.readouterr().out)
    lengths = next(lines for title, lines in found.items() if title.startswith("Lengths (tokenizer trained"))
    assert [line.split()[0] for line in found["Rows"][1:]] == ["train", "dev"]
    assert all("20: " in line for line in lengths if "dialogue " in line) and "20: 0" not in lengths[2]


NO_TOKENIZER = ["{train}", "--tokenizer", "nowhere/at-all"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["nowhere.csv"], "E3.1"), (["{train}", "data.text_column=대화"], "E3.4"), (NO_TOKENIZER, "E4.1")],
)
def test_what_cannot_be_read_is_refused_in_one_line(files, arguments, code):
    with pytest.raises(EngineError) as caught:
        inspect_data.main([part.replace("{train}", files[0]) for part in arguments])
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_without_datasketch_it_says_what_to_install(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(EngineError, match=r"E2.78: .*datasketch.*\[inspect\]"):
        inspect_data.main(files)


def test_the_page_opens_from_the_disk_and_shows_what_the_files_hold_as_text(files, tmp_path, capsys):
    page = tmp_path / "data.html"
    assert inspect_data.main([*files, "--html", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    seen = browser.see(page)
    assert not seen.console and "<h2>Near-duplicates</h2>" in seen.document and "train a = train b" in seen.document
    assert "<title>train, test</title>" in seen.document and "example.org" not in re.sub(
        r">[^<]*<", "><", seen.document
    )
    assert 'data-overflow="0"' in browser.see(page, width=400).document
