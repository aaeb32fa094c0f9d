"""`results.csv`, the table of all runs: no row is lost, whoever writes beside us and whatever was done to the file."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import shutil

import pytest
import runs

from engine import load_recipe
from engine.checkpoints.store import CheckpointStore
from engine.reporting.tracking import rows_sha256
from engine.train import run
from engine.training.finish import append_result


def row_of(folder: str, value: float = 1.0) -> dict:
    return {"run": "run", "best_value": value, "final_model_path": f"{folder}/run/final_model"}


def rows_of(path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def test_runs_of_the_same_name_are_told_apart_and_a_rerun_replaces_its_row(tmp_path):
    path = tmp_path / "results.csv"
    for folder, value in (("/a", 1.0), ("/b", 2.0), ("/a", 3.0)):
        append_result(path, row_of(folder, value))
    assert [(row["final_model_path"][:2], row["best_value"]) for row in rows_of(path)] == [("/b", "2.0"), ("/a", "3.0")]


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / ".results.csv.99.partial").write_text("run,fin")
    append_result(tmp_path / "results.csv", row_of("/a"))
    assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def _append_many(path, start, name) -> None:
    start.wait()
    for number in range(10):
        append_result(path, row_of(f"/{name}-{number}"))


def test_runs_that_end_together_all_get_their_row(tmp_path):
    """Sweeps end several runs at once; each reads the table and replaces it."""
    context, path = multiprocessing.get_context("fork"), tmp_path / "results.csv"
    start = context.Event()
    writers = [context.Process(target=_append_many, args=(path, start, name)) for name in range(4)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join()
    assert len(rows_of(path)) == 40 and [file.name for file in tmp_path.iterdir()] == ["results.csv"]


def test_a_table_with_columns_and_marks_of_others_is_kept(tmp_path):
    """A spreadsheet adds a byte order mark, its user a column."""
    path = tmp_path / "results.csv"
    path.write_text("run,final_model_path,memo\nold,/old/final_model,좋음\n", encoding="utf-8-sig")
    append_result(path, row_of("/a"))
    old, new = rows_of(path)
    assert (old["run"], old["memo"], new["run"], new["memo"]) == ("old", "좋음", "run", "")


@pytest.mark.parametrize(
    "content", ["이름,값\n".encode("cp949"), b"run\nold,more,cells\n", b"a,b\n\0\0,1\n", b'a\n"torn']
)
def test_a_table_that_cannot_be_read_is_left_alone(tmp_path, content, caplog):
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    append_result(path, row_of("/a"))
    if path.read_bytes() == content:
        assert "results.json" in caplog.text
    else:
        assert rows_of(path)[-1]["run"] == "run" and content.splitlines()[-1] in path.read_bytes()


def test_an_older_table_gains_the_new_columns_and_keeps_its_rows(tmp_path):
    """As 0.1.0 wrote it: without rows, seed or kind."""
    path = tmp_path / "results.csv"
    path.write_text("run,best_step,best_value,final_model_path\nold,4,22.46,/old/final_model\n", encoding="utf-8")
    append_result(path, row_of("/a") | {"dev_rows": 10, "kind": "debug"})
    old, new = rows_of(path)
    assert list(old) == ["run", "best_step", "best_value", "final_model_path", "dev_rows", "kind"]
    assert (old["best_value"], old["dev_rows"], new["dev_rows"], new["kind"]) == ("22.46", "", "10", "debug")


@pytest.mark.slow
def test_the_table_says_what_may_be_compared(tmp_path):
    """A debug run on 10 rows and the real one are told apart by kind, rows and the hash of the dev rows."""
    recipe = runs.write_recipe(tmp_path, rows=60)
    real = runs.train(recipe, "training.num_train_epochs=2", "training.gradient_accumulation_steps=2")
    small = run(
        load_recipe(
            recipe, [f"experiment.output_dir={tmp_path / 'small'}", "data.max_validation_samples=4"], debug=True
        )
    )
    first, second = rows_of(tmp_path / "experiments" / "results.csv")
    assert (first["kind"], first["train_rows"], first["dev_rows"], first["batch"]) == ("done", "60", "6", "8")
    assert (second["kind"], second["train_rows"], second["dev_rows"], second["batch"]) == ("debug", "50", "4", "2")
    assert first["seed"] == "42" and float(first["learning_rate"]) == 1e-3 and float(first["epochs"]) == 2.0
    assert first["dev_sha256"] == real["data"]["dev_sha256"] != second["dev_sha256"] == small["data"]["dev_sha256"]
    with (tmp_path / "run" / "predictions" / f"dev-step{real['best_step']}.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        assert rows_sha256(list(csv.DictReader(file))) == first["dev_sha256"]


def test_the_share_of_evaluations_is_told(trained):
    folder, results = trained
    total = results["train_seconds"] + results["evaluation_seconds"]
    assert results["evaluation_share"] == pytest.approx(results["evaluation_seconds"] / total) and total > 0
    log = (folder / "run" / "train.log").read_text(encoding="utf-8")
    assert f"of it evaluations ({results['evaluation_share']:.0%})" in log and "profile:" not in log


def test_best_weights_are_the_final_model(trained):
    from safetensors.torch import load_file

    folder, results = trained
    run_dir = folder / "run"
    best = load_file(run_dir / f"checkpoint-{results['best_step']}" / "model.safetensors")
    final = load_file(run_dir / "final_model" / "model.safetensors")
    assert best.keys() == final.keys() and all((best[name] == final[name]).all() for name in best)
    assert not (run_dir / "final_model" / "engine_state").exists()


@pytest.mark.slow
def test_a_best_checkpoint_that_is_lost_costs_no_run(tmp_path, monkeypatch, caplog):
    """Deleted before a resume, or never saved under `on_save_error: continue`: the next best is handed on, and told."""
    steps = "evaluation.strategy=steps evaluation.steps=1 checkpoint.strategy=steps checkpoint.steps=1".split()
    steps += ["checkpoint.save_total_limit=null", "evaluation.generate=false", "evaluation.metric=loss"]
    recipe = runs.write_recipe(tmp_path, rows=20)

    def losses(run):
        return {row["step"]: row["loss"] for row in runs.rows_of(run, "dev")}

    whole = runs.train(recipe, *steps)
    ranked = sorted(losses(tmp_path / "run"), key=losses(tmp_path / "run").get)
    assert whole["best_step"] == ranked[0]
    for name in ("results.json", "run_status.json"):
        (tmp_path / "run" / name).unlink()
    for folder in ("final_model", f"checkpoint-{ranked[0]}"):
        shutil.rmtree(tmp_path / "run" / folder)
    again = runs.train(recipe, *steps, resume="auto")
    last = ranked[0] == max(ranked)  # then the resume trains it again
    expected = ranked[0] if last else ranked[1]
    assert again["best_step"] == expected and again["best_value"] == losses(tmp_path / "run")[expected]

    real = CheckpointStore._write_manifest

    def fail(self, job):
        if job.step == ranked[0]:
            raise OSError(errno.ENOSPC, "full")
        real(self, job)

    monkeypatch.setattr(CheckpointStore, "_write_manifest", fail)
    other = f"experiment.output_dir={tmp_path / 'other'}"
    found = runs.train(recipe, *steps, other, "checkpoint.on_save_error=continue")
    assert found["best_step"] == ranked[1] and found["best_value"] == losses(tmp_path / "other")[ranked[1]]
    assert (tmp_path / "other" / "final_model" / "model.safetensors").is_file()
    assert f"of step {ranked[0]}, is not there; next best: {ranked[1]}" in caplog.text


@pytest.mark.slow
def test_scores_of_two_scales_are_not_compared(tmp_path):
    """rouge_sum is thrice rouge_mean: a best of the one would stay the best for ever among the other's."""
    steps = "evaluation.strategy=steps evaluation.steps=1 checkpoint.strategy=steps checkpoint.steps=1".split()
    recipe = runs.write_recipe(tmp_path, rows=20)
    runs.train(recipe, *steps, "evaluation.metric=rouge_sum")
    run = tmp_path / "run"
    for name in ("results.json", "run_status.json"):
        (run / name).unlink()
    allowed = ["evaluation.metric", "training.num_train_epochs"]
    more = ["evaluation.metric=rouge_mean", "training.num_train_epochs=2"]
    done = runs.train(recipe, *steps, *more, resume="auto", allow_change=allowed)
    assert done["best_metric"] == "rouge_mean" and done["best_value"] == done["metrics"]["rouge_mean"]
    assert done["best_step"] > 3 and json.loads((run / "best.json").read_text())["metric"] == "rouge_mean"
