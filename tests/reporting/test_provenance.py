"""Where numbers come from: hashes that change with what matters only, the checkout's state, speeds over a whole run."""

from __future__ import annotations

import csv
import re
import subprocess

import pytest
import torch

from engine import __version__, load_recipe
from engine.recipe.schema import Recipe
from engine.reporting import provenance
from engine.reporting.tracking import read_rows
from engine.scoring.intervals import bootstrap_interval


def test_the_recipes_hash_is_of_its_settings(root):
    hashes = [
        provenance.recipe_sha256(load_recipe(root / "recipes" / "quickstart.yaml", list(changes)))
        for changes in ([], ["experiment.name=other", "training.max_grad_norm=1.0"], ["training.seed=43"])
    ]
    assert hashes[0] == hashes[1] != hashes[2] and re.fullmatch("[0-9a-f]{64}", hashes[0])
    with_token = [Recipe(model={"config": {"model_type": "bart", "token": token}}) for token in ("a", "b")]
    assert provenance.recipe_sha256(with_token[0]) == provenance.recipe_sha256(with_token[1]), "no trace of a secret"


def git(folder, *words):
    named = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    return subprocess.run(["git", "-C", folder, *named, *words], check=True, capture_output=True, text=True).stdout


def test_a_checkout_tells_its_commit_and_whether_it_was_changed(tmp_path):
    unknown = {"version": __version__, "commit": None, "dirty": None}
    assert provenance.code_state(tmp_path) == unknown
    git(tmp_path, "init", "-q")
    assert provenance.code_state(tmp_path) == unknown, "nothing was committed yet"
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "first")
    (tmp_path / "run.log").write_text("what is not tracked is no change")
    clean = provenance.code_state(tmp_path)
    assert clean == unknown | {"commit": git(tmp_path, "rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert provenance.code_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "package").mkdir()
    assert provenance.code_state(tmp_path / "package") == unknown, (
        "a repository around an installed package is not ours"
    )


def test_speeds_are_means_over_time():
    rows = [
        {"split": "train", "seconds": 1.0, "samples_per_second": 10.0, "tokens_per_second": 100.0},
        {"split": "train", "seconds": 3.0, "samples_per_second": 2.0, "tokens_per_second": 20.0},
        {"split": "dev", "seconds": 2.0, "samples_per_second": 5.0},
    ]
    found = provenance.speeds(rows, {"seconds": 2.0, "samples_per_second": 3.0})
    assert found == {
        "train_samples_per_second": 4.0,
        "train_tokens_per_second": 40.0,
        "eval_samples_per_second": 4.0,
        "wall_seconds": 8.0,
    }
    assert set(provenance.speeds([], None).values()) == {None, 0}


def test_a_run_records_all_of_it(trained):
    folder, results = trained
    run = folder / "run"
    assert results["code"] == provenance.code_state()
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "transformers", "python-mecab-ko-dic"} <= set(results["versions"])
    machine = results["hardware"]
    assert (machine["device"], machine["gpu"], machine["gpus"]) == ("cpu", None, 0)
    assert machine["cpu"] and machine["cpus"] >= 1 and machine["memory_gib"] > machine["peak_memory_gib"] > 0
    data = results["data"]
    assert (data["train_rows"], data["dev_rows"], data["test_rows"]) == (24, 6, 5)
    assert len({data[f"{split}_sha256"] for split in ("train", "dev", "test")}) == 3
    assert results["recipe"]["sha256"] == provenance.recipe_sha256(load_recipe(run / "recipe.yaml"))

    rows = read_rows(run / "metrics.jsonl")
    took = sum(row["seconds"] for row in rows if row["split"] == "train")
    assert took == pytest.approx(results["train_seconds"], rel=0.01)
    assert results["speeds"]["train_samples_per_second"] == pytest.approx(48 / took)
    with (run / "predictions" / f"dev-step{results['best_step']}.csv").open(encoding="utf-8", newline="") as file:
        means = [sum(float(row[name]) for name in ("rouge1", "rouge2", "rougeL")) / 3 for row in csv.DictReader(file)]
    low, high = results["intervals"]["dev"]
    assert (low, high) == pytest.approx(bootstrap_interval(means)[1:])
    assert low <= results["metrics"]["rouge_mean"] <= high and results["intervals"]["test"] is not None


def test_a_prediction_file_that_is_gone_costs_the_interval_only(tmp_path, caplog):
    assert provenance.interval_of(tmp_path / "dev-step4.csv") is None and "no interval" in caplog.text
