"""Metrics and callbacks of a user's own: their scores go everywhere, their failures cost a line and not the run."""

from __future__ import annotations

import csv
import json
import math
import sys

import pytest
import runs
import tiny
from runs import LENGTH_ERROR
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import load_recipe
from engine.errors import EngineError
from engine.train import main, run


def recipe_of(tmp_path, **changes):
    return runs.write_recipe(tmp_path, rows=12, evaluation__strategy="steps", evaluation__steps=1, **changes)


def started(recipe, *overrides, **options):
    return run(load_recipe(recipe, list(overrides)), **options)


def test_a_metric_stands_in_every_record_and_chooses_the_best(tmp_path):
    test = tiny.write_rows(tmp_path / "test.jsonl", 5)
    recipe = recipe_of(
        tmp_path, evaluation__metric="min:drift", data__test_file=str(test), tracking__report_to=["tensorboard"]
    )
    values = iter([7.0, 9.0, 4.0, 6.0, 1.0])  # the trial, three evaluations, the test split

    def drift(predictions, references, dialogues):
        return [next(values)] * len(predictions)

    results = run(load_recipe(recipe), metrics={"drift": drift})
    rows = runs.rows_of(tmp_path / "run", "dev")
    assert [row["drift"] for row in rows] == [9.0, 4.0, 6.0]
    assert (results["best_step"], results["best_value"], results["best_metric"]) == (2, 4.0, "min:drift")
    assert results["metrics"]["drift"] == 4.0 and results["test_metrics"]["drift"] == 1.0
    with (tmp_path / "run" / "predictions" / "dev-step2.csv").open(encoding="utf-8", newline="") as table:
        assert {row["drift"] for row in csv.DictReader(table)} == {"4.0"}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("eval/drift")] == [9.0, 4.0, 6.0]
    assert [event.value for event in events.Scalars("best/drift")] == [9.0, 4.0]
    assert json.loads((tmp_path / "run" / "best.json").read_text())["metric"] == "min:drift"


def test_keys_that_no_metric_may_take_are_those_of_the_row(trained):
    from engine.scoring.extra import TAKEN

    assert set(runs.rows_of(trained[0] / "run", "dev")[0]) <= TAKEN


def test_a_metric_that_fails_later_costs_a_line_and_its_number(tmp_path):
    asked = []

    def fragile(predictions, references):
        asked.append(1)
        return 1 / (len(asked) != 3) if len(asked) != 4 else math.nan

    results = run(load_recipe(recipe_of(tmp_path, evaluation__metric="max:fragile")), metrics={"fragile": fragile})
    rows = runs.rows_of(tmp_path / "run", "dev")
    assert [row["fragile"] for row in rows] == [1.0, None, None] and results["best_step"] == 1
    assert rows[1]["non_finite"] == ["fragile"] and results["last_step"] == 3
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    (failed,) = [line for line in log.splitlines() if "failed" in line]
    assert "step 2: metric fragile failed at test_extras.py:" in failed and "division by zero" in failed
    assert "step 3: metric fragile is nan" in log and "Traceback" not in log


def test_a_metric_that_cannot_work_is_refused_before_training(tmp_path):
    with pytest.raises(EngineError, match="E3.41.*metric typo failed at test_extras.py:.*KeyError"):
        run(load_recipe(recipe_of(tmp_path)), metrics={"typo": lambda predictions, references: {}["x"]})
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("name", "metric"), [("rouge1", len), ("seconds", len), ("bertscore", len), ("two words", len), ("x", "len")]
)
def test_names_that_cannot_be_are_refused(tmp_path, name, metric):
    with pytest.raises(EngineError, match="E2.83"):
        run(load_recipe(recipe_of(tmp_path)), metrics={name: metric})


def test_a_choosing_metric_that_nobody_brings_is_refused(tmp_path):
    with pytest.raises(EngineError, match="E2.83.*there is no metric kiwi: there are apple"):
        started(recipe_of(tmp_path, evaluation__metric="max:kiwi"), metrics={"apple": lambda p, r: 0.0})


# Code that a recipe names


def test_installed_code_runs_only_with_the_users_own_flag(tmp_path, site, capsys):
    (site / "korean_metrics.py").write_text(LENGTH_ERROR, encoding="utf-8")
    recipe = recipe_of(tmp_path, evaluation__extra_metrics=["korean_metrics:length_error"])
    with pytest.raises(EngineError, match="E2.86.*names code to run: korean_metrics:length_error.*--allow-code"):
        main([str(recipe)])
    assert "korean_metrics" not in sys.modules and not (tmp_path / "run").exists()
    assert main([str(recipe), "--allow-code", "evaluation.metric=min:length_error"]) == 0
    assert all(row["length_error"] >= 0 for row in runs.rows_of(tmp_path / "run", "dev"))
    assert (tmp_path / "run" / "final_model").is_dir()


def test_no_recipe_can_set_the_flag(tmp_path):
    for wrong in ("evaluation.allow_code=true", "allow_code=true"):
        with pytest.raises(EngineError, match="E2.2"):
            load_recipe(recipe_of(tmp_path), [wrong])


# BERTScore


@pytest.mark.slow
def test_bertscore_from_a_recipe_changes_no_other_number(tmp_path):
    tiny.bert(tmp_path / "bert")
    recipe = recipe_of(tmp_path, model__dropout=0.1)
    started(recipe, f"experiment.output_dir={tmp_path / 'without'}")
    chosen = ["evaluation.extra_metrics=[bertscore]", f"evaluation.bertscore_model={tmp_path / 'bert'}"]
    started(recipe, *chosen, "evaluation.metric=max:bertscore")
    with_it, without = (
        [{key: row[key] for key in ("loss", "grad_norm")} for row in runs.rows_of(tmp_path / name)]
        for name in ("run", "without")
    )
    assert with_it == without
    assert all(0 < row["bertscore"] <= 100 for row in runs.rows_of(tmp_path / "run", "dev"))
    with pytest.raises(EngineError, match="E2.83.*bertscore_layer is 3, and the model has 2 layers"):
        started(recipe, *chosen, "evaluation.bertscore_layer=3")
    weights = tmp_path / "bert" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "layer.1" not in name}
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(EngineError, match="E4.8.*would be random"):
        started(recipe, *chosen)
    with pytest.raises(EngineError, match="E4.1.*no such model folder"):
        started(recipe, chosen[0], "evaluation.bertscore_model=nowhere/at/all")
