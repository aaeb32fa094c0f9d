"""Checkpoints are whole or absent, and hold everything exactly."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_toys import names, open_store, save, state_of, toy, tree, write_model
from safetensors.torch import load_file

from engine.checkpoints import manifest as checkpoints_manifest
from engine.checkpoints import store as checkpoints_store
from engine.errors import EngineError
from engine.models.weights import weights_of
from engine.runtime import atomic


def test_a_checkpoint_holds_every_file_in_its_manifest(tmp_path):
    store = open_store(tmp_path)
    save(store, 3, metrics={"loss": 1.5})
    assert store.wait()
    folder = tmp_path / "checkpoint-3"
    manifest = checkpoints_manifest.verify(folder)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == set(manifest["files"]) | {"manifest.json"}
    assert {"model.safetensors", "engine_state/optimizer.safetensors", "engine_state/rng-rank0.json"} <= there
    assert manifest["step"] == 3 and manifest["metrics"] == {"loss": 1.5} and manifest["data"] == {"train": "abc"}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]["torch"]
    assert json.loads((tmp_path / "last.json").read_text())["step"] == 3
    assert names(tmp_path) == {"checkpoint-3", "last.json"}
    modes = {(folder / name).stat().st_mode for name in there}
    assert len(modes) == 1, "whoever may read one file of a checkpoint may read all"


@pytest.mark.parametrize("sync", [True, False])
def test_a_save_holds_the_weights_of_its_instant(tmp_path, sync):
    store = open_store(tmp_path, sync=sync)
    model, optimizer = toy()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    store.save(1, state_of(optimizer, 1), weights=lambda: weights_of(model), write_model=write_model)
    with torch.no_grad():  # what training does while the thread writes
        for parameter in model.parameters():
            parameter.add_(1.0)
        optimizer.state_dict()["state"][0]["exp_avg"].add_(1.0)
    store.wait()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert torch.equal(store.load_state(tmp_path / "checkpoint-1").optimizer["state"][0]["exp_avg"], moment)


def points_of_a_save(run: Path) -> list[tuple[str, str]]:
    """Every (point, file) that a save with rotation passes through."""
    seen: list[tuple[str, str]] = []
    store = open_store(run, save_total_limit=1)
    save(store, 1)
    atomic.fail_points.append(lambda point, path: seen.append((point, path.name)))
    save(store, 2, best={"step": 2, "metric": "loss", "value": 1.0})
    atomic.fail_points.clear()
    return seen


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_an_error_at_any_point_keeps_what_was_there(tmp_path, number, sync):
    points = points_of_a_save(tmp_path / "probe")
    assert len(points) > 12
    for index, (point, name) in enumerate(points):
        run = tmp_path / f"{number}-{sync}-{index}"
        store = open_store(run, save_total_limit=2, sync=sync)
        save(store, 1)
        store.wait()
        before, count = tree(run / "checkpoint-1"), iter(range(1000))

        def fail(at, path, count=count, index=index):
            if next(count) == index:
                raise OSError(number, os.strerror(number), str(path))

        atomic.fail_points.append(fail)
        if point.startswith("trash"):  # rotation does not fail a save
            store.history.save_total_limit = 1
            save(store, 2, best={"step": 2, "metric": "loss", "value": 1.0})
            assert store.wait()
        else:
            with pytest.raises(EngineError) as caught:
                save(store, 2, best={"step": 2, "metric": "loss", "value": 1.0})
                store.wait()
            assert caught.value.exit_code == 6, (point, name)
            assert "MiB free" in str(caught.value) and str(run) in str(caught.value)
            assert tree(run / "checkpoint-1") == before, (point, name)
        atomic.fail_points.clear()
        for folder in run.glob("checkpoint-*"):
            checkpoints_manifest.verify(folder)
        assert not list(run.glob(".tmp-*")), (point, name)
        assert open_store(run).find_resume("auto") is not None
        assert not list(run.glob(".trash-*")), (point, name)


def test_on_error_continue_warns_and_saves_again_later(tmp_path, caplog):
    store = open_store(tmp_path, on_error="continue")

    def fail(point, path):
        raise OSError(errno.ENOSPC, "full")

    atomic.fail_points.append(fail)
    save(store, 1)
    assert store.wait() is False and store.wait() is False, "until a save has succeeded"
    atomic.fail_points.clear()
    save(store, 2)
    assert store.wait() is True
    assert names(tmp_path) == {"checkpoint-2", "last.json"}


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    monkeypatch.setattr(checkpoints_store, "free_bytes", lambda folder: 1 << 20)
    with pytest.raises(EngineError, match="not enough space") as caught:
        save(store, 1)
    assert caught.value.exit_code == 6 and names(tmp_path) == set()


def test_a_bug_in_writing_is_not_called_a_full_disk(tmp_path):
    store = open_store(tmp_path, sync=False)
    model, optimizer = toy()

    def broken(folder, weights):
        raise AssertionError("a bug")

    store.save(1, state_of(optimizer, 1), weights=lambda: weights_of(model), write_model=broken)
    with pytest.raises(AssertionError, match="a bug"):
        store.wait()
    assert names(tmp_path) == set()


_FILE_SIZE_LIMIT = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import checkpoint_toys as t
from engine.errors import EngineError
run = Path(sys.argv[1])
store = t.open_store(run)
t.save(store, 1)
before = t.tree(run / "checkpoint-1")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
outcomes = []
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        t.save(store, 2)
        outcomes.append("saved")
    except EngineError as error:
        outcomes.append(error.code)
    assert t.tree(run / "checkpoint-1") == before
    assert {{p.name for p in run.iterdir()}} == {{"checkpoint-1", "last.json"}}, list(run.iterdir())
print(*outcomes)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_a_file(tmp_path, root):
    """Real short writes at growing sizes: they hit the random state, the weights, the optimizer and the manifest."""
    code = _FILE_SIZE_LIMIT.format(root=str(root), tests=str(root / "tests"))
    limits = ["1", "100", "600", "900", "1300", "2000"]
    command = [sys.executable, "-c", code, str(tmp_path / "run"), *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["E6.1"] * len(limits)


def test_saving_a_step_again_never_loses_it(tmp_path):
    """The old one makes way by a rename; if the new one does not come, it comes back, also after a kill."""
    store = open_store(tmp_path)
    save(store, 1, seed=1)
    before = tree(tmp_path / "checkpoint-1")

    def fail(point, path):
        if point == "before-rename":
            raise OSError(errno.EIO, "broken")

    atomic.fail_points.append(fail)
    with pytest.raises(EngineError):
        save(store, 1, seed=2)
    assert tree(tmp_path / "checkpoint-1") == before and names(tmp_path) == {"checkpoint-1", "last.json"}
    atomic.fail_points.clear()
    store.history.make_way(tmp_path / "checkpoint-1")  # and killed here
    assert open_store(tmp_path).find_resume("auto") == tmp_path / "checkpoint-1"
    assert tree(tmp_path / "checkpoint-1") == before
    save(store, 1, seed=2)
    assert store.wait()
    assert tree(tmp_path / "checkpoint-1") != before and names(tmp_path) == {"checkpoint-1", "last.json"}


def test_giving_up_in_the_middle_of_a_save_leaves_nothing_half_done(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    for point in ("file", "before-manifest", "after-manifest", "before-rename"):
        atomic.fail_points.append(lambda at, path, point=point: store._abandon() if at == point else None)
        with pytest.raises(EngineError):
            save(store, 2)
        atomic.fail_points.clear()
        assert names(tmp_path) == {"checkpoint-1", "last.json"}, point


def test_state_comes_back(tmp_path):
    store = open_store(tmp_path)
    best = {"step": 4, "metric": "rouge_sum", "value": 100 / 3}
    save(store, 4, best=best)
    state = open_store(tmp_path).load_state(tmp_path / "checkpoint-4")
    assert state.position == {"step": 4, "loss": 0.1 + 0.2} and state.best == best
    assert state.scheduler == {"last_epoch": 4} and state.rng["python"][1][0] >= 0
