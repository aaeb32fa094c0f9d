"""Checkpoints of a toy model, without a training run around them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from engine.checkpoints import manifest as checkpoints_manifest
from engine.checkpoints.store import CheckpointStore, EngineState
from engine.models.weights import weights_of
from engine.runtime.ranks import RankGroup
from engine.runtime.run_status import RunStatus

IDENTITY = {"training.learning_rate": 1e-4, "data": {"train": "abc"}, "tokenizer": "t", "world_size": 1}
IDENTITY |= {"training.per_device_train_batch_size": 4, "training.gradient_accumulation_steps": 2}


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


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "flip":
        at = random.Random(path.name).randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path.write_bytes(data[: int(len(data) * float(how))])


def rewrite_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = checkpoints_manifest.digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
