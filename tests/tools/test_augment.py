"""Augmented rows: each method by hand, on real rows what must hold of every version, and what is never touched."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import augment
import pytest
import runs
import tiny
from augmenting import cut, fits, marks, merge, rewriting, speakers, window
from row_files import as_csv, write

from engine.data.rows import Example, read_examples
from engine.errors import EngineError
from engine.recipe.schema import Data

DIALOGUE = "\n".join(
    [
        "#Person1#: 안녕하세요. 방을 예약했어요.",
        "#Person2#: 성함이 어떻게 되세요?",
        "#Person1#: 김하늘이요. 2박입니다.",
        "#Person2#: 네, 307호입니다.",
        "#Person1#: 고맙습니다.",
    ]
)
SUMMARY = "#Person1#은 #Person2#에게 2박 예약을 확인하고, #Person2#는 307호를 안내한다."


def example(dialogue: str = DIALOGUE, summary: str = SUMMARY) -> Example:
    return Example("a", dialogue, (summary,), None, 1)


def test_speakers_swap_in_dialogue_and_summary_with_their_particles():
    version = speakers(example(), random.Random(1))
    assert version.dialogue.startswith("#Person2#: 안녕하세요") and version.dialogue.count("#Person1#:") == 2
    assert version.references == ("#Person2#는 #Person1#에게 2박 예약을 확인하고, #Person1#은 307호를 안내한다.",)
    assert version.parameters == {"to": {"#Person1#": "#Person2#", "#Person2#": "#Person1#"}}
    assert speakers(example("#Person1#: 혼잣말."), random.Random(1)) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("#Person1#이 #Person2#가", "#Person2#가 #Person1#이"),
        ("#Person2#로 #Person1#과", "#Person1#으로 #Person2#와"),
        ("#Person1#이라고", "#Person2#이라고"),  # no particle: the start of another word is left alone
        ("#Person1#의 #Person12#은", "#Person2#의 #Person12#은"),
    ],
)
def test_only_particles_change_with_a_name(before, after):
    assert speakers(example("#Person1#: 네.\n#Person2#: 네.", before), random.Random(1)).references == (after,)


def test_three_speakers_are_permuted_and_never_left_as_they_were():
    dialogue = "#Person1#: 하나.\n#Person2#: 둘.\n#Person3#: 셋."
    made = {speakers(example(dialogue), random.Random(seed)).dialogue for seed in range(60)}
    assert len(made) == 5 and dialogue not in made


def test_windows_keep_what_the_summary_names():
    """2박 and 307 stand in turns 3 and 4: of the windows of four turns both do, of a dialogue with a late number only one."""
    made = {window(example(), random.Random(seed), least=0.8).dialogue for seed in range(30)}
    lines = DIALOGUE.split("\n")
    assert made == {"\n".join(lines[:4]), "\n".join(lines[1:])}
    late = (
        example(summary=SUMMARY.replace("2박", "방")),
        example(DIALOGUE + "\n#Person2#: 99번이요.", SUMMARY + " 99번."),
    )
    assert all("99" in window(late[1], random.Random(seed), least=0.8).dialogue for seed in range(10))
    assert window(example("#Person1#: 가.\n#Person2#: 나.\n#Person1#: 다."), random.Random(1), least=0.5) is None


def test_merge_and_cut_change_boundaries_and_no_word():
    parted = cut(example(), random.Random(3))
    assert parted.dialogue.replace("\n#Person1#: ", " ").split() == DIALOGUE.replace("\n#Person1#: ", " ").split()
    assert len(parted.dialogue.split("\n")) > 5 and parted.parameters["of"] == 5
    assert merge(example(parted.dialogue), random.Random(1)).dialogue == DIALOGUE
    assert merge(example(), random.Random(1)) is None and cut(example("#Person1#: 네."), random.Random(1)) is None


def test_rewritten_turns_keep_their_marks_or_stay():
    answers = {
        "안녕하세요. 방을 예약했어요.": "안녕하십니까. 예약한 사람입니다.",
        "네, 307호입니다.": "네, 703호입니다.",  # another number
        "고맙습니다.": "Thank you.",  # no Korean
        "성함이 어떻게 되세요?": "성함이   어떻게 되세요?",  # the same
    }
    asked: list[str] = []

    def write_them(texts):
        asked.extend(texts)
        return [answers.get(text, "") for text in texts]

    version = rewriting([example(), example()], write_them)(example(), random.Random(1))
    assert len(asked) == len(set(asked)) == 5
    assert version.dialogue == DIALOGUE.replace(*next(iter(answers.items()))) and version.parameters["changed"] == 1
    assert version.references == (SUMMARY,) and not fits("네.", "네, 그렇게 하도록 하겠습니다.")
    assert marks("#Person1#은 10시, 10시 #PhoneNumber#") == {"#Person1#": 1, "#PhoneNumber#": 1, "10": 2}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_file_with_provenance_that_trains(tmp_path, root, capsys):
    """Real form, invented rows: unique ids and dialogues, sources that fit, the same file again, and a recipe reads it."""
    source, dev = (root / "recipes" / "quickstart" / name for name in ("train.csv", "dev.csv"))
    few = write(tmp_path, "few.csv", as_csv(rows_of(source)[:60]))
    arguments = [
        str(few),
        "--methods",
        "speakers",
        "window",
        "cut",
        "--dev",
        str(dev),
        "--copies",
        "2",
        "--keep-original",
    ]
    assert augment.main([*arguments, "--output", str(tmp_path / "a.csv")]) == 0
    assert augment.main([*arguments, "--output", str(tmp_path / "b.csv")]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert augment.main([*arguments, "--seed", "1", "--output", str(tmp_path / "c.csv")]) == 0
    assert (tmp_path / "a.csv").read_bytes() != (tmp_path / "c.csv").read_bytes()
    rows = rows_of(tmp_path / "a.csv")
    given = {row["fname"]: row for row in rows_of(few)}
    read = read_examples(tmp_path / "a.csv", Data(), require_summary=True)
    assert len({row.id for row in read}) == len(read) == len(rows) > 150
    assert len({" ".join(row.dialogue.split()) for row in read}) == len(read)
    for row in rows:
        old, parameters = given[row["source_id"]], json.loads(row["parameters"])
        assert row["seed"] == "42" and (row["method"] == "original") == (parameters == {})
        assert (row["summary"] == old["summary"]) == (row["method"] != "speakers")
        if row["method"] == "window":
            assert row["dialogue"] in old["dialogue"] and len(row["dialogue"].split("\n")) >= 0.8 * parameters["of"]
    methods = [row["method"] for row in rows]
    assert methods[:60] == ["original"] * 60 and set(methods) == {"original", "speakers", "window", "cut"}
    assert f"{len(rows)} rows from 60" in capsys.readouterr().out


def test_held_out_rows_and_files_are_never_touched(tmp_path, capsys):
    recipe = runs.write_recipe(tmp_path, rows=4)  # its six dev rows hold the four training rows
    train, dev, output = (str(tmp_path / name) for name in ("train.jsonl", "dev.jsonl", "new.jsonl"))

    def refused(code: str, *arguments: str) -> str:
        with pytest.raises(EngineError) as error:
            augment.main([*arguments, "--methods", "speakers"])
        assert error.value.code == code, str(error.value)
        return str(error.value)

    assert "held out" in refused("E2.92", dev, "--output", output, "--recipe", str(recipe))
    assert "held out" in refused("E2.92", dev, "--output", output, "--dev", dev)
    said = refused("E3.7", train, "--output", output, "--recipe", str(recipe))
    assert "row_0" in said and "out of the training file" in said and "allow_overlap" not in said
    overlap = ["--recipe", str(recipe), "data.allow_overlap=true"]
    assert "data.allow_overlap" in refused("E2.92", train, "--output", output, *overlap)
    refused("E2.63", train, "--output", dev)
    refused("E2.37", train, "--output", str(tmp_path / "new.parquet"))
    refused("E2.2", train, "--output", output, "data.columns=x")
    alone = write(tmp_path, "alone.csv", as_csv([{"fname": "x", "dialogue": "#Person1#: 네.", "summary": "대답한다."}]))
    refused("E3.76", str(alone), "--output", output)
    assert not Path(output).exists()

    # a version that is a dev dialogue is left out; bad rows are skipped where the recipe says so
    swapped = [{"fname": "d", "dialogue": "#Person2#: 누구세요?\n#Person1#: 저예요.", "summary": "둘은 묻고 답한다."}]
    own = swapped[0] | {"fname": "t", "dialogue": "#Person1#: 누구세요?\n#Person2#: 저예요."}
    other = own | {"fname": "u", "dialogue": "#Person1#: 어디예요?\n#Person2#: 집이요."}
    mine = write(tmp_path, "mine.csv", as_csv([own, other, other | {"fname": "bad", "dialogue": ""}]))
    held = write(tmp_path, "held.csv", as_csv(swapped))
    skip = ["data.on_bad_row=skip", "data.max_bad_rows=1"]
    assert augment.main([str(mine), *skip, "--output", output, "--methods", "speakers", "--dev", str(held)]) == 0
    (row,) = [json.loads(line) for line in Path(output).read_text(encoding="utf-8").splitlines()]
    assert row["source_id"] == "u" and row["fname"] == "u-speakers1"
    assert capsys.readouterr().out.splitlines()[1].split() == ["speakers", "1", "0", "0", "1"]


def test_rows_with_several_summaries_need_not_have_all_of_them(tmp_path):
    rows = [{"fname": "a", "dialogue": DIALOGUE, "s1": SUMMARY, "s2": ""}]
    rows += [rows[0] | {"fname": "b", "dialogue": DIALOGUE.replace("307", "512"), "s2": "둘은 방을 확인한다."}]
    source, output = write(tmp_path, "two.csv", as_csv(rows)), tmp_path / "new.csv"
    arguments = [str(source), "--output", str(output), "--methods", "speakers", "--keep-original"]
    assert augment.main([*arguments, "data.summary_column=[s1, s2]"]) == 0
    assert [row["s2"] for row in rows_of(output)] == ["", rows[1]["s2"]] * 2
    read = read_examples(output, Data(summary_column=["s1", "s2"]), require_summary=True)
    assert [len(row.references) for row in read] == [1, 2, 1, 2]


@pytest.mark.slow
def test_rewriting_by_model_folders(tmp_path, monkeypatch):
    """Two models one after the other, under their own prompts; what random weights write fits no turn, and all stays."""
    from engine.data.encode import TextEncoder

    seen: set[tuple[str, str]] = set()
    real = TextEncoder.prompt_feature

    def watched(self, row, index):
        seen.add((self.settings.prefix, row.dialogue))
        return real(self, row, index)

    monkeypatch.setattr(TextEncoder, "prompt_feature", watched)
    folders = [str(tiny.save("bart", tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    source = tiny.write_rows(tmp_path / "rows.jsonl", 2)
    arguments = [str(source), "--output", str(tmp_path / "new.csv"), "--methods", "rewrite", "speakers", "--model"]
    prompts = ["--prompt", "영어로: ", "한국어로: ", "--device", "cpu"]
    assert augment.main([*arguments, *folders, *prompts, "generation.max_new_tokens=4", "generation.num_beams=1"]) == 0
    assert {prefix for prefix, said in seen if said in "0번입니다. 1번입니다.".split()} == {"영어로: "}
    assert "한국어로: " in {prefix for prefix, _ in seen}
    assert {row["method"] for row in rows_of(tmp_path / "new.csv")} >= {"speakers"}
