"""Ensembles from the command line: what members are decoded on, what is a reference, what is refused before any work."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import ensemble
import pytest
import tiny
import trials
from row_files import as_csv

from engine.errors import EngineError
from engine.reporting.tracking import write_predictions

SAMPLE = "fname,summary\n{},s\n{},s\n"


def member(folder: Path, rows: list[dict], data: str = "") -> str:
    """A run folder with a model of random weights, and a validation file of its own."""
    tiny.save("bart", folder / "final_model", seed=len(folder.name))
    (folder / "dev.csv").write_text(as_csv(rows), encoding="utf-8")
    sections = f"model:\n  name_or_path: m\ndata:\n  train_file: t\n  validation_file: {folder / 'dev.csv'}\n{data}"
    generation = "generation:\n  num_beams: 2\n  max_new_tokens: 4\nevaluation:\n  rouge_tokenizer: whitespace\n"
    (folder / "recipe.yaml").write_text(sections + generation, encoding="utf-8")
    return str(folder)


def rows(*numbers: int) -> list[dict]:
    return [{"fname": f"row_{n}", "dialogue": f"#Person1#: {n}번입니다.", "summary": tiny.TEXTS[5]} for n in numbers]


@pytest.fixture
def members(tmp_path):
    """Two runs that were evaluated on different rows, as two folds are."""
    return [member(tmp_path / "one", rows(0, 1)), member(tmp_path / "second", rows(7, 8))]


def written(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_member_decodes_the_first_ones_rows(members, tmp_path, monkeypatch):
    seen, real = [], ensemble.decode_together

    def watched(subjects, *settings):
        seen.append([[row.dialogue for row in subject.examples] for subject in subjects])
        return real(subjects, *settings)

    monkeypatch.setattr(ensemble, "decode_together", watched)
    assert ensemble.main(["average", *members, "--output", str(tmp_path / "o.csv"), "--device", "cpu"]) == 0
    assert seen == [[["#Person1#: 0번입니다.", "#Person1#: 1번입니다."]] * 2]
    assert [row["fname"] for row in written(tmp_path / "o.csv")] == ["row_0", "row_1"]


def test_members_that_read_other_rows_from_the_file_are_refused(members, tmp_path):
    other = member(tmp_path / "numbered", rows(0, 1), "  id_column: null\n")
    with pytest.raises(EngineError, match=r"E3\.53.*rows differ from those of .*one.*row_0") as error:
        ensemble.main(["average", members[0], other, "--output", str(tmp_path / "o.csv"), "--device", "cpu"])
    assert other in str(error.value) and not (tmp_path / "o.csv").exists()


def test_settings_may_stand_behind_an_option_of_several_values(members, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ensemble,
        "decode_together",
        lambda subjects, weights, changes: seen.append((weights, changes)) or quick(["가"] * 2),
    )
    command = ["average", *members, "--output", str(tmp_path / "o.csv"), "--device", "cpu", "--no-members"]
    assert ensemble.main([*command, "--weights", "3", "1", "generation.num_beams=5"]) == 0
    assert seen == [([0.75, 0.25], ["generation.num_beams=5"])]
    with pytest.raises(SystemExit):
        ensemble.main([*command, "--weights", "3", "1", "training.seed=5"])
    with pytest.raises(SystemExit):
        ensemble.main(["mbr", "a.csv", "b.csv", "--output", "c.csv", "generation.num_beams=5"])


def quick(texts: list[str]) -> trials.Decoding:
    return trials.Decoding(texts, [True] * len(texts), 1, 0.1)


def test_a_sample_is_held_against_the_rows_before_they_are_decoded(members, tmp_path, monkeypatch):
    sample, output = tmp_path / "sample.csv", tmp_path / "o.csv"
    command = ["average", *members, "--output", str(output), "--sample-submission", str(sample), "--device", "cpu"]
    monkeypatch.setattr(ensemble, "decode_together", lambda *given: pytest.fail("rows were decoded"))
    sample.write_text(SAMPLE.format("row_0", "row_7"), encoding="utf-8")
    with pytest.raises(EngineError, match=r"E3\.35.*row_7"):
        ensemble.main(command)

    # a dialogue's first turns stand in for a summary that is empty
    monkeypatch.setattr(ensemble, "decode_together", lambda *given: quick(["가", ""]))
    sample.write_text(SAMPLE.format("row_0", "row_1"), encoding="utf-8")
    assert ensemble.main([*command, "--no-members"]) == 0
    assert [row["summary"] for row in written(output)] == ["가", "1번입니다."]


# --- consensus ---


def predictions(path: Path, cells: dict[str, str], **more: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(path, [{"id": name, "prediction": text} | more for name, text in cells.items()])
    return str(path)


def test_consensus_for_a_sample_is_refused_before_any_work(tmp_path, monkeypatch):
    one = predictions(tmp_path / "a.csv", {"x": "가 나", "y": " "})
    sample, output = tmp_path / "sample.csv", tmp_path / "o.csv"
    sample.write_text(SAMPLE.format("x", "z"), encoding="utf-8")
    command = ["--output", str(output), "--rouge-tokenizer", "whitespace", "--sample-submission", str(sample)]
    with monkeypatch.context() as patched:
        patched.setattr(ensemble, "consensus", lambda *given: pytest.fail("the consensus was computed"))
        with pytest.raises(EngineError, match=r"E3\.35.*z"):
            ensemble.main(["mbr", one, one, *command])
        sample.write_text(SAMPLE.format("x", "y"), encoding="utf-8")
        with pytest.raises(EngineError, match=r"E3\.35.*empty.*y"):
            ensemble.main(["mbr", one, one, *command])
    # an empty candidate is taken only where there is no other, whatever it weighs
    other = predictions(tmp_path / "b.csv", {"x": "가 나", "y": "다"})
    assert ensemble.main(["mbr", one, other, *command, "--weights", "1", "0"]) == 0
    assert [row["summary"] for row in written(output)] == ["가 나", "다"]


@pytest.mark.parametrize(("columns", "best"), [("[s1, s2]", 100.0), ("summary", 66.67)])
def test_several_references_are_told_by_the_runs_recipe(tmp_path, capsys, columns, best):
    """가 나 is the first of two references; held against both as one text of four words, it scores 2/3."""
    run = tmp_path / "run"
    one = predictions(run / "predictions" / "dev-step7.csv", {"x": "가 나"}, reference="가 나\n다 라")
    (run / "recipe.yaml").write_text(f"data:\n  summary_column: {columns}\n", encoding="utf-8")
    command = ["--output", str(tmp_path / "o.csv"), "--rouge-tokenizer", "whitespace", "--metric", "rouge1"]
    assert ensemble.main(["mbr", one, one, *command]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-2].split()[1] == f"{best:.2f}" and "--references" not in said.err

    (run / "recipe.yaml").unlink()  # nothing tells
    assert ensemble.main(["mbr", one, one, *command]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-2].split()[1] == "66.67" and "--references" in said.err


def test_json_lines_with_references(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": 1, "prediction": "가", "reference": "가"}), encoding="utf-8")
    assert ensemble.main(["mbr", str(path), str(path), "--output", str(tmp_path / "o.csv")]) == 0
    assert capsys.readouterr().err == ""
