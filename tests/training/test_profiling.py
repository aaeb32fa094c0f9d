"""`runtime.profile`: shares that add up, a bounded trace, a page, on one rank and two; and nothing of it when off."""

from __future__ import annotations

import gzip
import json

import pytest
import runs

from engine.errors import EngineError
from engine.training import profiling
from engine.training.profiling import PHASES, PhaseClock


def trace_of(run_dir):
    with gzip.open(run_dir / "profile" / "trace.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def named(events, name):
    return [event for event in events if event.get("name") == name and event.get("cat") == "user_annotation"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    recipe = runs.write_recipe(folder, rows=40, runtime__profile=True, training__gradient_accumulation_steps=2)
    return folder, runs.train(recipe, "training.num_train_epochs=2")  # 10 updates


def test_a_clock_is_always_in_one_phase(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(times)))
    clock = PhaseClock()  # 0
    clock.enter("forward")  # 1
    with clock.within("evaluation"):  # 2
        clock.enter("saving")  # 3
    assert clock.phase == "forward"  # from 4 on
    seconds = clock.read()  # 5
    expected = {"other": 1.0, "forward": 2.0, "evaluation": 1.0, "saving": 1.0}
    assert seconds == dict.fromkeys(PHASES, 0.0) | expected


def test_shares_add_up_and_every_phase_of_an_update_has_one(profiled, capsys):
    folder, results = profiled
    shares = results["profile"]
    assert sum(shares.values()) == pytest.approx(1.0) and tuple(shares) == PHASES
    for phase in ("data", "forward", "backward", "optimizer", "evaluation", "saving", "profiling"):
        assert shares[phase] > 0, phase
    page = (folder / "run" / "profile" / "summary.txt").read_text(encoding="utf-8")
    assert "up to step 10" in page and "aten::addmm" in page and len(page.splitlines()) < 60
    assert "profile: " in (folder / "run" / "train.log").read_text(encoding="utf-8")


def test_the_trace_holds_two_updates_phase_by_phase(profiled):
    events = trace_of(profiled[0] / "run")
    assert [len(named(events, name)) for name in ("data", "forward", "backward", "waiting")] == [2, 4, 4, 2]
    assert not named(events, "evaluation") and any(event.get("name") == "aten::addmm" for event in events)
    assert sorted(path.name for path in (profiled[0] / "run" / "profile").iterdir()) == ["summary.txt", "trace.json.gz"]


def test_profiling_changes_no_number_and_off_leaves_nothing(profiled, tmp_path):
    folder, results = profiled
    plain = runs.train(
        folder / "recipe.yaml",
        "training.num_train_epochs=2",
        "runtime.profile=false",
        f"experiment.output_dir={tmp_path / 'run'}",
    )
    assert "profile" not in plain and not (tmp_path / "run" / "profile").exists()
    losses = [[row["loss"] for row in runs.rows_of(run)] for run in (folder / "run", tmp_path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 10


@pytest.mark.slow
def test_accumulation_does_not_make_the_trace_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "_WARM_UP", 0)
    recipe = runs.write_recipe(tmp_path, rows=40, runtime__profile=True, evaluation__strategy="no")
    runs.train(recipe, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=20")
    assert len(named(trace_of(tmp_path / "run"), "forward")) == 8


@pytest.mark.slow
def test_a_resumed_run_is_profiled_again_but_not_through_a_link(tmp_path):
    recipe = runs.write_recipe(tmp_path, rows=32, runtime__profile=True, evaluation__strategy="no")
    runs.train(recipe, "checkpoint.strategy=steps", "checkpoint.steps=1", "checkpoint.save_total_limit=null")
    run = tmp_path / "run"
    page = (run / "profile" / "summary.txt").read_text(encoding="utf-8")
    for name in ("run_status.json", "results.json"):
        (run / name).unlink()
    victim = tmp_path / "victim"
    victim.write_text("victim")
    (run / "profile" / "trace.json.gz").unlink(missing_ok=True)
    (run / "profile" / "trace.json.gz").symlink_to(victim)
    with pytest.raises(EngineError, match=r"E6\.8"):
        runs.train(recipe, resume=str(run / "checkpoint-1"))
    (run / "profile" / "trace.json.gz").unlink()
    runs.train(recipe, resume=str(run / "checkpoint-1"))
    assert trace_of(run) and (run / "profile" / "summary.txt").read_text(encoding="utf-8") != page
    assert victim.read_text() == "victim"


@pytest.mark.slow
def test_two_ranks_wait_for_each_other_and_rank_0_writes(tmp_path):
    recipe = runs.write_recipe(tmp_path, rows=64, runtime__profile=True, evaluation__strategy="no")
    done = runs.launch(runs.ROOT / "engine" / "train.py", recipe, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["profile"]["waiting"] > 0
    assert "rank 0 of 2" in (tmp_path / "run" / "profile" / "summary.txt").read_text(encoding="utf-8")
    assert len(named(trace_of(tmp_path / "run"), "backward")) == 2
