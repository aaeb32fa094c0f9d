"""Checkpoints are whole or absent, hold everything exactly, and refuse what is damaged, foreign or hostile."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import history, identity, state_files
from engine.checkpoints import manifest as checkpoints_manifest
from engine.checkpoints import store as checkpoints_store
from engine.checkpoints.host_copies import HostCopies
from engine.checkpoints.store import CheckpointStore, EngineState
from engine.errors import EngineError
from engine.models.weights import weights_of
from engine.recipe.schema import Recipe
from engine.runtime import atomic
from engine.runtime import lock as runtime_lock
from engine.runtime.ranks import RankGroup
from engine.runtime.run_status import RunStatus

IDENTITY = {"training.learning_rate": 1e-4, "data": {"train": "abc"}, "tokenizer": "t", "world_size": 1}
IDENTITY |= {"training.per_device_train_batch_size": 4, "training.gradient_accumulation_steps": 2}


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch):
    """Flushing to a real disk takes most of a save's time and shows only in a power cut, which no test makes."""
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: None)
    yield
    atomic.fail_points.clear()


def fake_runtime() -> SimpleNamespace:
    return SimpleNamespace(ranks=RankGroup(), status=RunStatus(), when_giving_up=lambda undo: None)


def open_store(run: Path, **settings) -> CheckpointStore:
    run.mkdir(parents=True, exist_ok=True)
    settings = {"identity": IDENTITY, "sync": True} | settings
    return CheckpointStore(run, fake_runtime(), **settings)


def toy(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def state_of(optimizer, step: int, best: dict | None = None) -> EngineState:
    rng = {"torch": torch.get_rng_state(), "python": random.getstate()}
    return EngineState({"step": step, "loss": 0.1 + 0.2}, best, optimizer.state_dict(), {"last_epoch": step}, {}, rng)


def write_model(folder: Path, weights) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def save(store: CheckpointStore, step: int, *, best: dict | None = None, metrics: dict | None = None, seed: int = 0):
    model, optimizer = toy(seed or step)
    weights = lambda: weights_of(model)  # noqa: E731
    store.save(step, state_of(optimizer, step, best), weights=weights, write_model=write_model, metrics=metrics)


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


# Nested state


def test_nested_state_comes_back_exactly(tmp_path):
    import numpy

    shared = torch.arange(6, dtype=torch.uint8)
    value = {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).t()},
        "betas": (0.9, 0.1 + 0.2),
        "floats": [5e-324, -0.0, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "nothing": None,
        "flags": [True, 1],
        "bf16": torch.randn(4).bfloat16(),
        "empty": torch.zeros(0, 3),
        "twice": [shared, shared],
        "numpy": numpy.random.RandomState(1).get_state(),
        "한국어": "요약",
    }
    flat, tensors = state_files.flatten_state(value)
    state_files.write_state(tmp_path, "state", flat, tensors)
    back = state_files.read_state(tmp_path, "state")
    assert list(back) == list(value)
    assert back["betas"] == value["betas"] and isinstance(back["betas"], tuple)
    assert [repr(x) for x in back["floats"]] == [repr(x) for x in value["floats"]]
    assert back["flags"] == [True, 1] and back["flags"][0] is True and back["nothing"] is None
    assert torch.equal(back[0]["exp_avg"], value[0]["exp_avg"]) and back[0]["step"].shape == ()
    assert back["bf16"].dtype == torch.bfloat16 and torch.equal(back["bf16"], value["bf16"])
    assert back["empty"].shape == (0, 3)
    assert back["twice"][0] is back["twice"][1], "one tensor is stored once"
    assert back["numpy"][1].dtype == numpy.uint32 and (back["numpy"][1] == value["numpy"][1]).all()
    numpy.random.RandomState().set_state(back["numpy"])


def test_what_json_and_safetensors_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="cannot store a set"):
        state_files.flatten_state({"x": {1, 2}})


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    if kind == "adamw_8bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        factory = bitsandbytes.optim.AdamW8bit
    else:
        factory = torch.optim.AdamW

    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 64)  # 8,192 weights: enough for the 8-bit state, which starts at 4,096
        return model, factory(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            model(torch.randn(4, 128)).square().mean().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(3))
    state_files.write_state(tmp_path, "optimizer", *state_files.flatten_state(optimizer.state_dict()))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer, range(3, 6))

    again, resumed = build()
    again.load_state_dict(weights)
    resumed.load_state_dict(state_files.read_state(tmp_path, "optimizer"))
    if kind == "adamw_8bit":
        assert resumed.state[again.weight]["state1"].dtype == torch.uint8
    train(again, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# Saving


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


def test_tied_tensors_share_their_copy():
    weight = torch.randn(3, 3)
    copies = HostCopies().take("model", {"a": weight, "b": weight, "c": weight.clone()})
    assert copies["a"] is copies["b"] and copies["a"] is not copies["c"] and copies["a"] is not weight
    assert torch.equal(copies["a"], weight)


def test_a_peft_model_is_saved_by_what_is_trained():
    from peft import LoraConfig, get_peft_model

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x)

    model = get_peft_model(Base(), LoraConfig(target_modules=["linear"], r=2))
    assert weights_of(model) and all("lora_" in name for name in weights_of(model))


# Failures of a save


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
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
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
import test_store as t
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
    except t.EngineError as error:
        outcomes.append(error.code)
    assert t.tree(run / "checkpoint-1") == before
    assert {{p.name for p in run.iterdir()}} == {{"checkpoint-1", "last.json"}}, list(run.iterdir())
print(*outcomes)
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_file(tmp_path, root):
    """Real short writes at growing sizes: they hit the random state, the weights, the optimizer and the manifest."""
    code = _FILE_SIZE_LIMIT.format(root=str(root), tests=str(root / "tests" / "checkpoints"))
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


# Rotation, best and last


def test_random_histories_keep_the_latest_and_the_best(tmp_path):
    """Over random scores, limits and restarts: the latest k and the best stay, foreign entries are never touched."""
    rng = random.Random(7)
    for trial in range(25):
        run = tmp_path / str(trial)
        run.mkdir()
        (run / "checkpoint-3-backup").mkdir()
        (run / "checkpoint-abc").mkdir()
        (run / "checkpoint-0007").write_text("a file")
        (run / "step-1").mkdir()
        foreign = {"checkpoint-3-backup", "checkpoint-abc", "checkpoint-0007", "step-1"}
        limit, step, best = rng.randint(1, 4), 0, None
        store, saved = open_store(run, save_total_limit=limit, sync=rng.random() < 0.5), []
        for _ in range(rng.randint(2, 9)):
            step += rng.randint(1, 30)
            value = rng.choice([rng.random(), 0.5])
            if best is None or value > best["value"]:
                best = {"step": step, "metric": "rouge_sum", "value": value}
            save(store, step, best=best, metrics={"rouge_sum": value})
            store.wait()
            saved.append(step)
            expected = {f"checkpoint-{s}" for s in {*saved[-limit:], best["step"]}}
            assert {n for n in names(run) if n.startswith("checkpoint-")} - foreign == expected
            assert json.loads((run / "best.json").read_text())["step"] == best["step"]
            assert json.loads((run / "last.json").read_text())["step"] == step
            if rng.random() < 0.3:
                store = open_store(run, save_total_limit=limit)
                assert store.load_state(store.find_resume("auto")).position["step"] == step
        assert foreign <= names(run)


def test_a_checkpoint_that_cannot_be_removed_only_warns_and_goes_next_time(tmp_path, monkeypatch, caplog):
    store = open_store(tmp_path, save_total_limit=1)
    save(store, 1)
    real = shutil.rmtree

    def refuse(path, *args, **settings):
        if ".trash-" in str(path) and not settings.get("ignore_errors"):
            raise PermissionError(errno.EPERM, "immutable", str(path))
        if ".trash-" not in str(path):
            real(path, *args, **settings)

    monkeypatch.setattr(history.shutil, "rmtree", refuse)
    save(store, 2)
    assert store.wait()
    assert any(name.startswith(".trash-") for name in names(tmp_path))
    monkeypatch.setattr(history.shutil, "rmtree", real)
    save(store, 3)
    assert names(tmp_path) == {"checkpoint-3", "last.json"}


def test_best_is_found_again_by_the_manifests(tmp_path):
    store = open_store(tmp_path)
    for step, value in [(1, 30.0), (2, 50.0), (3, 40.0)]:
        best = {"step": 2 if step > 1 else 1, "metric": "rouge_sum", "value": max(value, 50.0 if step > 1 else 0)}
        save(store, step, best=best, metrics={"rouge_sum": value})
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = open_store(tmp_path)
    again.load_state(again.find_resume("auto"))
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["step"], best["value"]) == (3, 40.0)


def test_best_json_follows_the_checkpoint_and_not_the_other_way_round(tmp_path):
    store = open_store(tmp_path, sync=False)
    store.mark_best(5, "loss", 1.0)
    assert store.best_path() is None
    save(store, 5, best={"step": 5, "metric": "loss", "value": 1.0})
    store.wait()
    assert store.best_path() == tmp_path / "checkpoint-5"


def test_a_better_score_in_an_abandoned_future_is_forgotten(tmp_path):
    """Back to step 1 although step 2 was better: best.json must not point past the end of history."""
    store = open_store(tmp_path)
    save(store, 1, best={"step": 1, "metric": "loss", "value": 2.0})
    save(store, 2, best={"step": 2, "metric": "loss", "value": 1.0})
    again = open_store(tmp_path)
    again.load_state(again.find_resume(tmp_path / "checkpoint-1"))
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1
    assert [name for name in names(tmp_path) if name.startswith(".later-checkpoint-2")], "nothing valid is deleted"


# Resuming


def test_state_comes_back(tmp_path):
    store = open_store(tmp_path)
    best = {"step": 4, "metric": "rouge_sum", "value": 100 / 3}
    save(store, 4, best=best)
    state = open_store(tmp_path).load_state(tmp_path / "checkpoint-4")
    assert state.position == {"step": 4, "loss": 0.1 + 0.2} and state.best == best
    assert state.scheduler == {"last_epoch": 4} and state.rng["python"][1][0] >= 0


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "flip":
        at = random.Random(str(path)).randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path.write_bytes(data[: int(len(data) * float(how))])


@pytest.mark.parametrize("how", ["0", "0.3", "0.95", "flip", "gone"])
def test_any_damaged_file_is_found(tmp_path, how, caplog):
    """auto names the file and goes back to the checkpoint before; the explicit path is refused."""
    origin = tmp_path / "origin"
    store = open_store(origin)
    save(store, 1)
    save(store, 2)
    files = sorted(path.relative_to(origin) for path in (origin / "checkpoint-2").rglob("*") if path.is_file())
    assert len(files) > 8
    for index, name in enumerate(files):
        run = tmp_path / f"run{index}"
        shutil.copytree(origin, run)
        damage(run / name, how)
        caplog.clear()
        again = open_store(run)
        with caplog.at_level("WARNING", logger="engine.checkpoints"):
            assert again.find_resume("auto") == run / "checkpoint-1", name
        with pytest.raises(EngineError) as caught:
            again.find_resume(run / "checkpoint-2")
        assert caught.value.exit_code == 5 and name.name in str(caught.value)
        again.load_state(run / "checkpoint-1")
        save(again, 2)
        assert again.wait(), "step 2 comes again, in a fresh folder"
        checkpoints_manifest.verify(run / "checkpoint-2")
        assert sum(entry.startswith(".bad-checkpoint-2") for entry in names(run)) == 1


def test_twenty_flipped_bits_in_tensors(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    data, rng = path.read_bytes(), random.Random(3)
    for _ in range(20):
        at = rng.randrange(len(data) - 200, len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        with pytest.raises(checkpoints_manifest.DamagedError, match=r"model\.safetensors has other contents"):
            checkpoints_manifest.verify(tmp_path / "checkpoint-1")


def test_when_all_are_damaged_nothing_is_resumed(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    damage(tmp_path / "checkpoint-1" / "config.json", "0")
    with pytest.raises(EngineError, match=r"error E5\.7"):
        open_store(tmp_path).find_resume("auto")


def test_nothing_to_resume(tmp_path):
    assert open_store(tmp_path).find_resume("auto") is None
    assert open_store(tmp_path).find_resume(None) is None
    with pytest.raises(EngineError, match=r"error E5\.3"):
        open_store(tmp_path).find_resume(tmp_path / "checkpoint-9")


def test_leftovers_of_killed_saves_are_bounded(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    for number in range(20):
        (tmp_path / f".tmp-checkpoint-2-{number:08x}").mkdir()
        (tmp_path / f".trash-checkpoint-1-{number:08x}").mkdir()
    (tmp_path / f".best.json.{99}.partial").write_text("{")
    (tmp_path / f".metrics.jsonl.{99}.partial").write_text("{")
    (tmp_path / ".tmp-something-else").mkdir()
    open_store(tmp_path)
    assert names(tmp_path) == {"checkpoint-1", "last.json", ".tmp-something-else"}


def test_foreign_checkpoints_in_the_way_are_refused_and_untouched(tmp_path):
    store = open_store(tmp_path / "mine")
    save(store, 5)
    other = open_store(tmp_path / "other")
    save(other, 9)
    for kind in ("folder", "link", "file"):
        run = tmp_path / kind
        shutil.copytree(tmp_path / "mine", run)
        target = run / "checkpoint-9"
        if kind == "folder":
            shutil.copytree(tmp_path / "other" / "checkpoint-9", target)
        elif kind == "link":
            target.symlink_to(tmp_path / "other" / "checkpoint-9")
        else:
            target.write_text("a file named like a checkpoint")
        again = open_store(run)
        found = again.find_resume("auto")
        assert found == run / "checkpoint-5"
        with pytest.raises(EngineError, match=r"error E2\.35"):
            again.load_state(found)
        assert target.exists()
    with pytest.raises(EngineError, match="another run"):
        open_store(tmp_path / "folder").find_resume(tmp_path / "folder" / "checkpoint-9")


# What may change


CHANGES = [
    ("training.learning_rate", 2e-4),
    ("data", {"train": "abd"}),
    ("tokenizer", "other"),
    ("training.seed", 1),
    ("world_size", 2),
]


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_changes_are_refused_with_both_values(tmp_path, key, value):
    store = open_store(tmp_path)
    save(store, 1)
    with pytest.raises(EngineError, match=r"error E5\.5") as caught:
        open_store(tmp_path, identity=IDENTITY | {key: value}).load_state(tmp_path / "checkpoint-1")
    text = str(caught.value)
    assert (
        f"{key}: " in text
        and json.dumps(value) in text
        and json.dumps(IDENTITY.get(key, "(absent)")).strip('"') in text
    )


def test_several_changes_are_told_at_once(tmp_path):
    save(open_store(tmp_path), 1)
    changed = IDENTITY | {"training.learning_rate": 1.0, "tokenizer": "x"}
    with pytest.raises(EngineError) as caught:
        open_store(tmp_path, identity=changed).load_state(tmp_path / "checkpoint-1")
    assert "training.learning_rate: 0.0001 -> 1.0" in str(caught.value) and 'tokenizer: "t" -> "x"' in str(caught.value)


def test_allowed_changes_are_logged_and_the_rest_still_refused(tmp_path, caplog):
    save(open_store(tmp_path), 1)
    two = {"world_size": 2, "training.gradient_accumulation_steps": 1}
    store = open_store(tmp_path, identity=IDENTITY | two, allow_change=tuple(two))
    with caplog.at_level("WARNING", logger="engine.checkpoints"):
        store.load_state(tmp_path / "checkpoint-1")
    with pytest.raises(EngineError, match="rows of one update would change from 8 to 16"):
        open_store(tmp_path, identity=IDENTITY | {"world_size": 2}, allow_change=["world_size"]).load_state(
            tmp_path / "checkpoint-1"
        )
    with pytest.raises(EngineError, match=r"error E2\.34"):
        open_store(tmp_path, allow_change=["training.seed"])


def test_identity_leaves_out_what_changes_no_number():
    recipe, other = Recipe(), Recipe()
    other.experiment.name, other.tracking.report_to, other.training.logging_steps = "b", [], 1
    other.checkpoint.sync, other.data.train_file = True, "elsewhere.csv"
    assert identity.identity_of(recipe, data="d") == identity.identity_of(other, data="d")
    other.training.seed = 43
    assert identity.identity_of(recipe) != identity.identity_of(other)
    assert identity.identity_of(recipe, **{"training.seed": 9})["training.seed"] == 9, "values in force win"


# Hostile checkpoints


class Canary:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def rewrite_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = checkpoints_manifest.digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def plant_pickle(folder: Path, canary: Path, name: str, listed: bool) -> None:
    import pickle

    data = pickle.dumps(Canary(canary))
    (folder / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if listed:
        rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    "name",
    ["optimizer.bin", "scheduler.pt", "engine_state/random_states_0.pkl", "custom_checkpoint_0.PKL", "scaler.pth"],
)
def test_planted_pickles_are_refused_and_not_run(tmp_path, name, listed):
    run = tmp_path / "run"
    store = open_store(run)
    save(store, 1)
    save(store, 2)
    plant_pickle(run / "checkpoint-2", tmp_path / "canary", name, listed)
    for spec in ("auto", run / "checkpoint-2"):
        with pytest.raises(EngineError, match=r"error E5\.4") as caught:
            open_store(run).find_resume(spec)
        assert Path(name).name in str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "..\\b", "C:/x", "engine_state/../../c"])
def test_manifest_paths_stay_inside(tmp_path, path):
    save(open_store(tmp_path), 1)
    entry = {"size": 1, "sha256": "0" * 64}
    rewrite_manifest(tmp_path / "checkpoint-1", lambda manifest: manifest["files"].update({path: entry}))
    with pytest.raises(EngineError, match="outside the checkpoint"):
        open_store(tmp_path).find_resume("auto")


@pytest.mark.parametrize("what", ["file", "folder", "checkpoint"])
def test_links_are_refused(tmp_path, what):
    run = tmp_path / "run"
    save(open_store(run), 1)
    folder = run / "checkpoint-1"
    if what == "checkpoint":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        target = folder / ("config.json" if what == "file" else "engine_state")
        target.rename(tmp_path / "elsewhere")
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError) as caught:
        open_store(run).find_resume(folder)
    assert caught.value.exit_code == 5


BAD_MANIFESTS = [
    "", "[]", "null", "{", '{"files": {}}', '{"schema": 1, "files": [], "run_id": "x", "step": 1}',
    '{"schema": 2, "files": {}, "run_id": "x", "step": 1}', '{"schema": 1, "files": {}, "run_id": "x", "step": 2}',
    '{"schema": 1, "files": {"a": 1}, "run_id": "x", "step": 1}', '{"schema": 1, "files": {"a": {"size": NaN}}}',
    '{"schema": 1, "files": {"a": {"size": 1, "sha256": "zz"}}, "run_id": "x", "step": 1}', "[" * 100000,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_MANIFESTS, ids=range(len(BAD_MANIFESTS)))
def test_unreadable_manifests_are_damage(tmp_path, text):
    save(open_store(tmp_path), 1)
    (tmp_path / "checkpoint-1" / "manifest.json").write_text(text)
    with pytest.raises(EngineError) as caught:
        open_store(tmp_path).find_resume("auto")
    assert caught.value.exit_code == 5


BAD_STATES = ["[]", '{"dict": 1}', '{"tensor": "none"}', '{"what": 1}', '{"dict": [[[1], 2]]}', "[" * 100000, "1"]


@pytest.mark.parametrize("text", BAD_STATES, ids=range(len(BAD_STATES)))
@pytest.mark.parametrize("name", ["trainer_state", "optimizer"])
def test_a_state_that_fits_its_manifest_but_nothing_else(tmp_path, text, name):
    """Someone who can write files can write hashes too: the contents are not trusted either."""
    save(open_store(tmp_path), 1)
    folder = tmp_path / "checkpoint-1"
    path = folder / "engine_state" / f"{name}.json"
    path.write_text(text)
    entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({f"engine_state/{name}.json": entry}))
    store = open_store(tmp_path)
    found = store.find_resume("auto")
    try:
        with checkpoints_store.refusing(found):
            state = store.load_state(found)
            toy()[1].load_state_dict(state.optimizer)
    except EngineError as error:
        assert error.exit_code == 5
    else:
        pytest.fail("accepted")


# The lock


_HOLD_LOCK = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from engine.runtime.lock import FolderLock
lock = FolderLock(Path({run!r}))
lock.acquire()
print("locked", flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time_and_a_dead_one_holds_nothing(tmp_path, root):
    code = _HOLD_LOCK.format(root=str(root), run=str(tmp_path))
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(EngineError, match=f"process {owner.pid}") as caught:
            runtime_lock.FolderLock(tmp_path).acquire()
        assert caught.value.exit_code == 2
    finally:
        owner.kill()
        owner.wait()
    lock = runtime_lock.FolderLock(tmp_path)
    assert f"process {owner.pid}, which is gone" in lock.acquire()
    lock.release()
    assert names(tmp_path) == set()
    assert lock.acquire() is None


def test_the_lock_follows_no_link(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "run").mkdir()
    for name in (".lock", ".lock.json"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
        with suppress(OSError):
            runtime_lock.FolderLock(tmp_path / "run").acquire()
        (tmp_path / "run" / name).unlink()
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_without_kernel_locks_the_process_id_in_a_file_decides(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    here = socket.gethostname()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for owner, held in ((f"1\n{here}\n", True), (f"{dead.pid}\n{here}\n", False), ("1\nelsewhere\n", True)):
        (tmp_path / ".lock.soft").write_text(owner)
        lock = runtime_lock.FolderLock(tmp_path)
        if held:
            with pytest.raises(EngineError, match=r"error E2\.30"):
                lock.acquire()
        else:
            lock.acquire()
            with pytest.raises(EngineError, match=f"process {os.getpid()}"):
                runtime_lock.FolderLock(tmp_path).acquire()
            lock.release()
            assert names(tmp_path) == set()
