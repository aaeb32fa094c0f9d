"""Averaged checkpoints: the mean is decoded and scored as its members are, wherever it lies and whatever chose the best."""

from __future__ import annotations

import average_checkpoints
import pytest
import tiny

from engine.prediction.predictor import recipe_of


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints; the validation file's columns are its recipe's own."""
    rows = tiny.write_rows(tmp_path / "dev.jsonl", 3).read_text(encoding="utf-8").replace('"summary"', '"요약"')
    (tmp_path / "dev.jsonl").write_text(rows, encoding="utf-8")
    for step in (5, 10):
        tiny.save("bart", tmp_path / "run" / f"checkpoint-{step}", seed=step)
    recipe = f"model:\n  name_or_path: m\ndata:\n  train_file: t\n  validation_file: {tmp_path / 'dev.jsonl'}\n"
    recipe += "  summary_column: 요약\n  max_source_length: 77\n"
    recipe += "generation:\n  num_beams: 1\n  max_new_tokens: 3\nevaluation:\n  rouge_tokenizer: whitespace\n"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return tmp_path / "run"


def members(run) -> list[str]:
    return [str(run / f"checkpoint-{step}") for step in (5, 10)]


def test_a_mean_outside_the_run_keeps_the_recipe(run, tmp_path, capsys):
    output = tmp_path / "mean"
    assert average_checkpoints.main([*members(run), "--output", str(output), "--device", "cpu"]) == 0
    recipe = recipe_of(output)
    assert (recipe.generation.max_new_tokens, recipe.data.max_source_length) == (3, 77)
    assert recipe == recipe_of(run / "checkpoint-10") and "3 rows of dev.jsonl" in capsys.readouterr().out
    foreign = [str(tiny.save("bart", tmp_path / name)) for name in "ab"]
    assert average_checkpoints.main([*foreign, "--output", str(tmp_path / "c"), "--no-score"]) == 0
    assert not (tmp_path / "c" / "recipe.yaml").exists(), "models without a recipe get none"


@pytest.mark.parametrize("metric", ["max:closeness", "min:length_error"])
def test_a_metric_of_the_users_own_is_not_computed_here(run, capsys, metric):
    with (run / "recipe.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write(f"  metric: {metric}\n  extra_metrics: [metrics_of_mine:{metric[4:]}]\n")
    assert average_checkpoints.main([*members(run), "--output", str(run / "m"), "--device", "cpu"]) == 0
    assert "rouge_sum" in capsys.readouterr().out
