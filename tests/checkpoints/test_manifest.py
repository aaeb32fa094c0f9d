"""What is damaged is found; what is hostile is refused and not run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from checkpoint_toys import damage, names, open_store, rewrite_manifest, save

from engine.checkpoints import manifest as checkpoints_manifest
from engine.errors import EngineError


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


def test_a_damaged_manifest_names_no_owner(tmp_path):
    """One flipped bit in its run id makes nobody else's checkpoint of it: auto goes back to the one before."""
    store = open_store(tmp_path)
    save(store, 1)
    save(store, 2)
    run_id = json.loads((tmp_path / "last.json").read_text())["run_id"]
    path = tmp_path / "checkpoint-2" / "manifest.json"
    path.write_text(path.read_text().replace(run_id, ("0" if run_id[0] != "0" else "1") + run_id[1:]))
    for pointer in ("last.json", "best.json"):
        assert open_store(tmp_path).find_resume("auto") == tmp_path / "checkpoint-1"
        (tmp_path / pointer).unlink(missing_ok=True)
    again = open_store(tmp_path)
    assert again.find_resume("auto") == tmp_path / "checkpoint-1"
    again.load_state(tmp_path / "checkpoint-1")
    assert sum(entry.startswith(".bad-checkpoint-2") for entry in names(tmp_path)) == 1


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


class Canary:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


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
