"""The quickstart data: reproducible, balanced, without leaks, and impossible to summarise from one turn."""

import collections
import csv
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "quickstart"
SIZES = {"train": 2000, "dev": 100, "test": 100}


def load_generator():
    spec = importlib.util.spec_from_file_location("make_quickstart_data", ROOT / "tools" / "make_quickstart_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


def read(split):
    with open(FOLDER / f"{split}.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def rows():
    return {split: read(split) for split in SIZES}


@pytest.fixture(scope="module")
def everything(rows):
    return [row for split in rows.values() for row in split]


def test_generator_reproduces_the_committed_files():
    for split, made in generator.make_splits().items():
        assert generator.to_csv(made).encode("utf-8") == (FOLDER / f"{split}.csv").read_bytes(), split


def test_another_seed_gives_other_rows(rows):
    assert [r["dialogue"] for r in generator.make_splits(seed=1)["dev"]] != [r["dialogue"] for r in rows["dev"]]


def test_sizes_columns_and_ids(rows, everything):
    assert {split: len(r) for split, r in rows.items()} == SIZES
    assert all(list(r) == generator.COLUMNS and all(r.values()) for r in everything)
    assert len({r["fname"] for r in everything}) == sum(SIZES.values())


def test_at_least_forty_scenarios_in_every_split(rows):
    for split, part in rows.items():
        assert len({r["topic"] for r in part}) >= 40, split
    counts = collections.Counter(r["topic"] for r in rows["train"])
    assert max(counts.values()) <= 1.2 * min(counts.values())


def test_facts_stand_in_dialogue_and_summary(everything):
    for row in everything:
        facts = row["facts"].split("|")
        assert len(facts) >= 3, row["fname"]
        assert all(fact in row["dialogue"] and fact in row["summary"] for fact in facts), row["fname"]


def test_no_two_turns_hold_all_the_facts(everything):
    def coverable(row):
        turns = row["dialogue"].split("\n")
        return any(all(f in a + "\n" + b for f in row["facts"].split("|")) for a in turns for b in turns)

    assert sum(map(coverable, everything)) <= 0.05 * len(everything)


def test_turns_are_well_formed(everything):
    for row in everything:
        turns = row["dialogue"].split("\n")
        assert 5 <= len(turns) <= 9, row["fname"]
        speakers = [re.match(r"#Person(\d)#: \S", turn)[1] for turn in turns]
        assert all(a != b for a, b in zip(speakers, speakers[1:], strict=False)), row["fname"]
        assert list(dict.fromkeys(speakers)) == sorted(set(speakers)), row["fname"]
        mentioned = set(re.findall(r"#Person(\d)#", row["summary"]))
        assert mentioned and mentioned <= set(speakers), row["fname"]
        assert not re.search(r"[{}()|<>$]|  |\b(?:None|nan)\b", row["dialogue"] + row["summary"]), row["fname"]


def test_placeholders_names_and_third_speakers_occur(everything):
    for text in ("#Person3#", "#PhoneNumber#", "#Address#", "민수"):
        assert sum(text in r["dialogue"] for r in everything) >= 20, text


def test_many_summaries_need_the_later_of_two_proposals(everything):
    """A rejected word of the same inventory is in the dialogue and must stay out of the summary."""
    days = generator.INVENTORIES["DAY"].split("/")
    corrected = 0
    for row in everything:
        said = {d for d in days if d in row["dialogue"]}
        kept = {d for d in days if d in row["summary"]}
        assert kept <= said, row["fname"]
        corrected += len(said) == 2 and len(kept) == 1
    assert corrected >= 0.1 * len(everything)  # days alone; other kinds of facts change too


def test_splits_share_no_dialogue_and_no_fact_set(rows):
    for key in (
        lambda r: r["dialogue"],
        lambda r: re.sub(r"\s", "", r["dialogue"]),
        lambda r: (r["topic"], r["facts"]),
    ):
        seen = [{key(r) for r in rows[split]} for split in SIZES]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert len({r["dialogue"] for part in rows.values() for r in part}) == sum(SIZES.values())


@pytest.mark.parametrize(
    "word, josa, expected",
    [
        ("월요일", "은", "월요일은"),
        ("오후 3시", "은", "오후 3시는"),
        ("민수", "이", "민수가"),
        ("지영", "이", "지영이"),
        ("운동화", "을", "운동화를"),
        ("책상", "을", "책상을"),
        ("이모", "과", "이모와"),
        ("삼촌", "과", "삼촌과"),
        ("월요일", "으로", "월요일로"),
        ("버스", "으로", "버스로"),
        ("대회의실", "으로", "대회의실로"),
        ("조용한 방", "으로", "조용한 방으로"),
        ("오후 3시", "이에요", "오후 3시예요"),
        ("일인실", "이라", "일인실이라"),
        ("오후 3시", "이라", "오후 3시라"),
        ("#Person1#", "은", "#Person1#는"),
    ],
)
def test_particles_follow_the_last_sound(word, josa, expected):
    assert generator.with_josa(word, josa) == expected


def test_particles_of_the_rows_follow_the_last_sound(everything):
    """Checked from the text alone: each inventory word, where a particle follows it."""
    # Each pair: (after a consonant, after a vowel). 으로/로 is left to the test above because of ㄹ.
    pairs = [("은", "는"), ("을", "를"), ("과", "와")]
    words = {w for s in generator.parse_scenarios() for spec in s["slots"].values() for w in spec["words"]}
    checked = 0
    for row in everything[::5]:
        for word in words:
            for found in re.finditer(
                re.escape(word) + r"([은는을를과와])(?=[\s,.?])", row["dialogue"] + "\n" + row["summary"]
            ):
                for closed, opened in pairs:
                    if found[1] in (closed, opened):
                        assert found[1] == (closed if generator.has_batchim(word) else opened), (row["fname"], found[0])
                        checked += 1
    assert checked > 300
    placeholders = re.findall(r"#\w+#([가-힣]+)", "\n".join(r["summary"] for r in everything))
    assert {p[0] for p in placeholders} <= set("는가를와에의로")
