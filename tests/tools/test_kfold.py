"""Folds: families stay together, every row is predicted once in its place, failures and kills lose nothing."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import folding
import kfold
import pytest
import runs
import tiny
from folding import split
from training_process import Failed

from engine.data.rows import Example, read_examples
from engine.errors import EngineError
from engine.recipe.schema import Data
from engine.reporting.tracking import write_predictions
from engine.runtime.atomic import write_json_atomically
from engine.runtime.run_status import read_status

pytest.importorskip("datasketch")
pytest.importorskip("sklearn")


def test_near_duplicates_stay_together_and_folds_are_alike(root):
    """Copies with other speakers and spaces are in their original's fold; sizes and lengths of folds are close."""
    examples = read_examples(root / "recipes" / "quickstart" / "train.csv", Data(), require_summary=True, limit=200)
    copies = [
        Example(f"copy_{row.id}", row.dialogue.replace("#Person1#", "민수").replace(" ", "  "), row.references, None, 0)
        for row in examples[:40]
    ]
    fold_of, family = split([*examples, *copies], 4, seed=1)
    assert fold_of[:40] == fold_of[200:] and family[:40] == family[200:]
    assert all(len({fold for fold, own in zip(fold_of, family, strict=True) if own == one}) == 1 for one in set(family))
    sizes = Counter(fold_of)
    assert set(sizes) == {0, 1, 2, 3} and max(sizes.values()) < 1.5 * min(sizes.values())
    assert split([*examples, *copies], 4, seed=1)[0] == fold_of != split([*examples, *copies], 4, seed=2)[0]


def test_too_few_families_make_no_folds():
    same = [Example(str(n), "#Person1#: 내일 몇 시에 볼까요?", ("묻는다.",), None, n) for n in range(9)]
    with pytest.raises(EngineError, match=r"E3\.75.*9 rows in 1 families.*--alike"):
        split(same, 3, seed=1)


@pytest.fixture
def recipe(tmp_path):
    return runs.write_recipe(tmp_path, rows=20, data__test_file=str(tiny.write_rows(tmp_path / "test.jsonl", 3)))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["experiment.output_dir=x"], "a folder of its own"),
        (["evaluation.max_samples=5"], "every held-out row is decoded"),
        (["evaluation.strategy=no"], "every held-out row is decoded"),
        (["data.test_file=null", "--sample-submission", "sample.csv"], "no test rows"),
        (["training.lr=1"], "training.lr"),
        (["evaluation.extra_metrics=[mine:score]"], "run no code that a recipe names"),
    ],
)
def test_refused_before_anything_starts(recipe, tmp_path, arguments, why):
    with pytest.raises(EngineError, match=why) as error:
        kfold.main([str(recipe), *arguments, "--output", str(tmp_path / "out")])
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["quickstart", "kobart", "qwen3_4b_qlora"])
def test_shipped_recipes_are_taken_as_they_are(name, tmp_path):
    """Their evaluations decode a subset, and folds decode every row that is held out."""
    options = kfold.parse([name, f"data.train_file={tmp_path}", f"data.validation_file={tmp_path}"])
    assert kfold.read_recipe(options).evaluation.max_samples is None


def rows_of(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def parrot(trained: list[int], broken: set[int]):
    """Stands in for a training: each row's prediction is its dialogue's last turn; fold numbers in `broken` fail."""

    def train(run: Path, recipe: str, overrides: list[str], gpu: str | None, follow) -> None:
        number = int(run.name.removeprefix("fold-"))
        trained.append(number)
        if number in broken:
            raise Failed("error E8.1: out of memory")
        files = dict(text.split("=", 1) for text in overrides)
        own = {"dev": Path(files["data.validation_file"]), "test": run.parent.parent / "test.jsonl"}
        (run / "predictions").mkdir(parents=True)
        for name, path in own.items():
            rows = [row | {"id": row["fname"], "reference": row.get("summary", "")} for row in rows_of(path)]
            rows = [row | {"prediction": row["dialogue"].split("\n")[-1] + f" {number % 2}"} for row in rows]
            write_predictions(run / "predictions" / f"{name}-step7.csv", rows)
        write_json_atomically(run / "results.json", {"best_step": 7})
        write_json_atomically(run / "run_status.json", {"code": 0})

    return train


def test_failures_keep_their_reason_and_only_they_are_trained_again(recipe, tmp_path, monkeypatch, capsys):
    trained: list[int] = []
    sample = tmp_path / "sample.csv"
    sample.write_text(",fname,summary\n0,row_0,\n1,row_1,\n2,row_2,\n", encoding="utf-8")
    arguments = [str(recipe), "--folds", "3", "--output", str(tmp_path / "k"), "--sample-submission", str(sample)]
    monkeypatch.setattr(folding, "train", parrot(trained, {2}))
    with pytest.raises(EngineError, match=r"E2\.91: 1 of 3 folds failed.*the same command"):
        kfold.main(arguments)
    assert "fold 2 failed: error E8.1" in capsys.readouterr().out and not (tmp_path / "k" / "out_of_fold.csv").exists()
    assert [row["status"] for row in rows_of(tmp_path / "k" / "folds.csv")] == ["done", "failed", "done"]

    monkeypatch.setattr(folding, "train", parrot(trained, set()))
    assert kfold.main(arguments) == 0 and trained == [1, 2, 3, 2]
    given, found = rows_of(tmp_path / "train.jsonl"), rows_of(tmp_path / "k" / "out_of_fold.csv")
    for row, own in zip(given, found, strict=True):
        assert {key: own[key] for key in row} == row
        assert own["prediction"] == f"{row['dialogue'].splitlines()[-1]} {int(own['fold']) % 2}"
    *folds, overall = rows_of(tmp_path / "k" / "folds.csv")
    assert overall["fold"] == "all" and overall["dev_rows"] == "20" and float(overall["low"]) <= float(overall["high"])
    mean = sum(float(row["rouge_mean"]) for row in found) / 20
    assert float(overall["rouge_mean"]) == pytest.approx(mean) and sum(int(row["dev_rows"]) for row in folds) == 20
    submitted = rows_of(tmp_path / "k" / "submission.csv")
    assert [row["fname"] for row in submitted] == ["row_0", "row_1", "row_2"]
    assert all(row["summary"].endswith(" 1") for row in submitted), "two of three folds say so"
    printed = capsys.readouterr().out
    assert "fold 1 was done" in printed and "95 % interval" in printed and "submission.csv" in printed

    held_out = {number: rows_of(tmp_path / "k" / f"dev-{number}.jsonl") for number in (1, 2, 3)}
    for number, own in held_out.items():
        others = [row for other, rows in held_out.items() if other != number for row in rows]
        names = {row["fname"] for row in others}
        assert {row["fname"] for row in rows_of(tmp_path / "k" / f"train-{number}.jsonl")} == names
        assert not {row["dialogue"].split("\n")[0] for row in own} & {row["dialogue"].split("\n")[0] for row in others}

    tiny.write_rows(tmp_path / "train.jsonl", 19)
    with pytest.raises(EngineError, match=r"E2\.80.*folds of another data"):
        kfold.main(arguments)
    with pytest.raises(EngineError, match=r"E2\.80.*another data, seed"):
        kfold.main([*arguments, "--seed", "1"])
    with pytest.raises(EngineError, match=r"E2\.80.*holds no folds"):
        kfold.main([*arguments[:3], "--output", str(tmp_path)])


def test_rows_without_ids_find_their_place(recipe, tmp_path, monkeypatch):
    """`id_column: null` numbers rows, within each fold's file anew."""
    rows = [{key: row[key] for key in ("dialogue", "summary")} for row in rows_of(tmp_path / "train.jsonl")]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    def train(run: Path, recipe: str, overrides: list[str], gpu: str | None, follow) -> None:
        own = rows_of(Path(dict(text.split("=", 1) for text in overrides)["data.validation_file"]))
        numbered = [{"id": str(place), "prediction": row["summary"]} for place, row in enumerate(own, start=1)]
        (run / "predictions").mkdir(parents=True)
        write_predictions(run / "predictions" / "dev-step1.csv", numbered)
        write_json_atomically(run / "results.json", {"best_step": 1})

    monkeypatch.setattr(folding, "train", train)
    arguments = [str(recipe), "--folds", "2", "data.id_column=null", "data.test_file=null"]
    assert kfold.main([*arguments, "--output", str(tmp_path / "k")]) == 0
    found = rows_of(tmp_path / "k" / "out_of_fold.csv")
    assert [row["prediction"] for row in found] == [row["summary"] for row in rows]


def test_rows_with_several_summaries_need_not_have_all_of_them(recipe, tmp_path, monkeypatch):
    """The first row has one summary, others two; so have the test rows, of which the first has none."""
    rows = [row | {"s1": row["summary"]} for row in rows_of(tmp_path / "train.jsonl")]
    rows = [row | {"s2": "다른 요약." if number % 2 else ""} for number, row in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    tests = [{"s1": "", "s2": ""} | row for row in rows_of(tmp_path / "test.jsonl")[:1]] + rows[1:3]
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in tests), encoding="utf-8")
    monkeypatch.setattr(folding, "train", parrot([], set()))
    arguments = [str(recipe), "--folds", "2", "--output", str(tmp_path / "k")]
    assert kfold.main([*arguments, "data.summary_column=[s1, s2]"]) == 0
    assert [row["s2"] for row in rows_of(tmp_path / "k" / "out_of_fold.csv")] == [row["s2"] for row in rows]
    assert [row["s2"] for row in rows_of(tmp_path / "k" / "test.csv")] == ["", "다른 요약.", ""]
    data = Data(summary_column=["s1", "s2"])
    for name in ("train-1.jsonl", "dev-1.jsonl", "out_of_fold.csv"):
        read = read_examples(tmp_path / "k" / name, data, require_summary=True)
        assert {len(row.references) for row in read} == {1, 2}


# --- processes ---


def start(recipe: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(runs.ROOT / "tools" / "kfold.py"), str(recipe), "--folds", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "--output", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def ended(process: subprocess.Popen, code: int = 0) -> str:
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == code, printed
    return printed


def until_updated(run: Path, process: subprocess.Popen) -> None:
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="minutes of training; set FULL_TESTS=1")
def test_stopped_and_killed_folds_go_on_to_the_same_predictions(tmp_path):
    """SIGTERM in the first fold, SIGKILL in the second; beside it, the one that is left alone."""
    changes = {"training__num_train_epochs": 30, "evaluation__strategy": "steps", "evaluation__steps": 45}
    recipe = runs.write_recipe(tmp_path, rows=20, data__test_file=str(tmp_path / "dev.jsonl"), **changes)
    whole, stopped = start(recipe, tmp_path / "whole"), start(recipe, tmp_path / "k")
    first = tmp_path / "k" / "fold-1"
    until_updated(first, stopped)
    stopped.send_signal(signal.SIGTERM)
    assert "the same command goes on" in ended(stopped, 75)
    status = read_status(first)
    assert status["code"] == 75 and status["resumable"] and not (tmp_path / "k" / "fold-2").exists()

    killed = start(recipe, tmp_path / "k")
    until_updated(tmp_path / "k" / "fold-2", killed)
    killed.kill()
    killed.communicate()
    steps = [row["step"] for row in runs.rows_of(first)]
    assert steps == sorted(set(steps)) and len(steps) > status["step"], "no update was made twice"

    printed = ended(start(recipe, tmp_path / "k"))
    assert "fold 1 was done" in printed and "fold 1 ..." not in printed
    ended(whole)
    for name in ("out_of_fold.csv", "test.csv", "folds.csv"):
        assert (tmp_path / "k" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
