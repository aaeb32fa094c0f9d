"""Sweeps: values and refusals before anything starts, the table, and sweeps that are killed, that fail, or run side by side."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import search_space
import sweep
from search_space import Axis, parse_axis

from engine.errors import EngineError
from engine.recipe.load import load_recipe
from engine.runtime.run_status import read_status

optuna = pytest.importorskip("optuna")
RATES = "training.learning_rate=1e-3,3e-3"


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lora.r=8,16", Axis("lora.r", ("8", "16"))),
        ("lora.target_modules=[q_proj,v_proj],[q_proj]", Axis("lora.target_modules", ("[q_proj,v_proj]", "[q_proj]"))),
        ("model.name_or_path=../a,b", Axis("model.name_or_path", ("../a", "b"))),
        ("training.learning_rate=1e-5..1e-3", Axis("training.learning_rate", (), 1e-5, 1e-3)),
        ("lora.r=8..64", Axis("lora.r", (), 8, 64)),
    ],
)
def test_values(text, axis):
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lora.r=64..8", "from the lower to the higher"),
        ("lora.r=8,8", "is there twice"),
        ("lora.r=8,", "write key=value"),
        ("=1,2", "write key=value"),
        ("data.validation_file=a.csv,b.csv", "the same for all trials"),
        ("evaluation.metric=loss,rouge1", "the same for all trials"),
    ],
)
def test_values_that_are_none(text, why):
    with pytest.raises(EngineError, match=why) as error:
        parse_axis(text)
    assert error.value.code == "E2.79"


def test_ranges_are_drawn_as_what_they_are():
    """Whole numbers stay whole, a decade is drawn by its logarithm, and the text is a recipe's value again."""
    from engine.recipe.yaml_subset import plain_scalar

    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    texts = [parse_axis(text).suggest(trial) for text in ("a.b=8..64", "a.c=1e-7..1e-3", "a.d=0.0..0.3", "a.e=x,y")]
    values = [plain_scalar(text) for text in texts]
    assert isinstance(values[0], int) and 8 <= values[0] <= 64 and isinstance(values[1], float) and values[3] in "xy"
    assert [trial.distributions[key].log for key in ("a.b", "a.c", "a.d")] == [False, True, False]


@pytest.fixture
def recipe(tmp_path):
    return runs.write_recipe(tmp_path, evaluation__strategy="steps", evaluation__steps=2)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--set", "training.lr=1e-3,2e-3"], "training.lr"),
        (["--set", "training.learning_rate=1e-3,fast"], "training.learning_rate must be"),
        (["--set", "training.warmup_ratio=0.1..2.0", "--trials", "3"], "training.warmup_ratio must be"),
        (["--set", "training.warmup_ratio=0.1..0.5", "--search", "grid"], "a range has no grid"),
        (["--set", RATES, "--search", "random"], "needs a number of trials"),
        (["--set", "training.learning_rate=1e-3"], "several values"),
        (["experiment.output_dir=x", "--set", RATES], "a folder of its own"),
        (["--set", RATES, "evaluation.strategy=no"], "evaluates none"),
        (["--set", RATES, "--metric", "bleu"], "evaluation.metric must be"),
        (["--set", RATES, "evaluation.extra_metrics=[mine:score]"], "run no code that a recipe names"),
    ],
)
def test_refused_before_anything_starts(recipe, tmp_path, arguments, why):
    with pytest.raises(EngineError, match=why) as error:
        sweep.main([str(recipe), *arguments, "--output", str(tmp_path / "out")])
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_the_search_follows_the_values(recipe):
    def plan(*written, **more):
        return search_space.make_plan(str(recipe), written, **more)

    grid = plan(RATES, "training.seed=1,2,3", "training.weight_decay=0.1")
    assert (grid.search, grid.trials, grid.fixed) == ("grid", 6, ("training.weight_decay=0.1",))
    assert plan(RATES, "training.seed=1,2,3", trials=4).trials == 4
    assert plan("training.learning_rate=1e-4..1e-2", trials=9).search == "tpe"
    with pytest.raises(EngineError, match="a grid of 501 trials"):
        plan("training.seed=" + ",".join(map(str, range(501))))


def test_the_table_has_the_best_first_and_failures_last():
    head = {"trial": "", "status": "done", "loss": None, "step": 4, "a.b": "1", "reason": None}
    rows = [
        head | {"trial": "trial-000", "loss": 2.5},
        head | {"trial": "trial-001", "status": "failed", "step": None, "reason": "error E8.1: out of memory"},
        head | {"trial": "trial-002", "loss": 1.5},
        head | {"trial": "trial-003", "status": "pruned", "loss": 1.0},
    ]
    lines = sweep.in_words(rows, "loss")
    assert [line.split()[0] for line in lines[1:]] == ["trial-002", "trial-000", "trial-003", "trial-001"]
    assert lines[1].endswith("best") and lines[4].endswith("out of memory") and "1.5000" in lines[1]


# --- processes ---


def start(recipe: Path, folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(runs.ROOT / "tools" / "sweep.py"), str(recipe), "--output", str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ended(process: subprocess.Popen, code: int = 0) -> str:
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == code, printed
    return printed


def until_updated(run: Path, process: subprocess.Popen) -> None:
    """Wait for the first logged update of a trial."""
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_table(recipe, tmp_path):
    """SIGKILL in the second trial, which ends with its sweep. Beside it, and sharing results.csv, runs the one left alone."""
    arguments = ("--set", RATES, "training.num_train_epochs=2")
    whole = start(recipe, tmp_path / "whole", *arguments)
    killed = start(recipe, tmp_path / "killed", *arguments)
    until_updated(tmp_path / "killed" / "trial-001", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(table(tmp_path / "killed")) == 1
    printed = ended(start(recipe, tmp_path / "killed", *arguments))
    assert "1 of 2 trials are done" in printed and "trial-000 ..." not in printed
    ended(whole)
    rows = table(tmp_path / "whole")
    assert table(tmp_path / "killed") == rows and [row["status"] for row in rows] == ["done", "done"]
    assert {row["training.learning_rate"] for row in rows} == {"1e-3", "3e-3"}

    best = max(rows, key=lambda row: float(row["rouge_sum"]))
    assert load_recipe(tmp_path / "killed" / "best.yaml").training.learning_rate == float(
        best["training.learning_rate"]
    )
    assert f"{best['trial']}, the best of 2" in (tmp_path / "killed" / "best.yaml").read_text(encoding="utf-8")
    with (tmp_path / "experiments" / "results.csv").open(encoding="utf-8", newline="") as file:
        models = sorted(Path(row["final_model_path"]).parent for row in csv.DictReader(file))
    assert models == sorted(tmp_path / name / f"trial-00{n}" for name in ("whole", "killed") for n in (0, 1))

    # the folder is this search's, and another one is refused
    refused = ended(start(recipe, tmp_path / "killed", "--set", RATES), 2)
    assert "error E2.80" in refused and "another recipe" in refused


@pytest.mark.slow
def test_failures_keep_their_reason_and_bad_trials_are_stopped(recipe, tmp_path, monkeypatch, capsys):
    """Two workers; one value fails in the run itself. The pruner here wants the first evaluation to be out of reach."""
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda: optuna.pruners.ThresholdPruner(lower=1e9))
    broken = tmp_path / "broken"
    broken.mkdir()
    arguments = [str(recipe), "--set", f"model.name_or_path={tmp_path / 'model'},{broken}", "--parallel", "2"]
    assert sweep.main([*arguments, "--search", "grid", "--output", str(tmp_path / "grid")]) == 0
    good, bad = sorted(table(tmp_path / "grid"), key=lambda row: row["status"])
    assert good["status"] == "done" and float(good["rouge_sum"]) >= 0 and int(good["step"]) > 0
    assert bad["status"] == "failed" and bad["reason"].startswith("error E4.") and not bad["rouge_sum"]
    assert bad["reason"] in capsys.readouterr().out

    pruned = [
        str(recipe),
        "--set",
        "training.learning_rate=1e-4..1e-2",
        "--trials",
        "1",
        "training.num_train_epochs=40",
    ]
    with pytest.raises(EngineError, match="no trial came to a score") as error:
        sweep.main([*pruned, "--output", str(tmp_path / "tpe")])
    assert error.value.code == "E2.81"
    (row,) = table(tmp_path / "tpe")
    assert (
        row["status"] == "pruned"
        and row["step"] == "2"
        and not (tmp_path / "tpe" / "trial-000" / "results.json").exists()
    )


def test_folders_and_studies_of_something_else_are_refused(recipe, tmp_path):
    arguments = [str(recipe), "--set", RATES, "--output", str(tmp_path)]
    with pytest.raises(EngineError, match=r"E2\.80.*holds no sweep"):
        sweep.main(arguments)
    (tmp_path / "study.db").write_text("no database, and longer than its header would be" * 20, encoding="utf-8")
    with pytest.raises(EngineError, match=r"E6\.9.*cannot be read"):
        sweep.main(arguments)


@pytest.mark.slow
def test_a_trial_saves_and_stops_when_its_sweep_is_killed(tmp_path):
    """No orphan goes on computing: it ends as by SIGTERM, long before its 10,000 epochs."""
    forever = {"training__num_train_epochs": 10_000, "training__logging_steps": 1}
    recipe = runs.write_recipe(tmp_path, checkpoint__strategy="no", **forever)
    killed = start(recipe, tmp_path / "sweep", "--set", RATES, "evaluation.steps=100000", "evaluation.strategy=steps")
    run = tmp_path / "sweep" / "trial-000"
    until_updated(run, killed)
    killed.kill()
    killed.communicate()
    end = time.monotonic() + 120
    while (status := read_status(run))["code"] in (None, 76) and time.monotonic() < end:  # 76 until it has saved
        time.sleep(0.1)
    assert status["code"] == 75 and status["resumable"] and "SIGTERM" in status["reason"]
