"""Is this checkpoint whole and harmless? Manifests, and their verification.

Two kinds of trouble are kept apart. A *damaged* checkpoint (a file missing, cut short or altered) is an accident: an
automatic resume goes back to the one before. A *hostile* one (pickle files, links, paths that leave the folder) is
never passed over in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import EngineError
from engine.runtime.atomic import read_json, sha256_of
from engine.runtime.run_folder import MANIFEST

SCHEMA = 1
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
_REFUSED = PICKLES | {".npy", ".npz", ".msgpack", ".h5"}  # may hold pickles, or code of other libraries
_LIBRARIES = ("torch", "accelerate", "transformers", "peft", "bitsandbytes", "safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedError(Exception):
    """A checkpoint that an accident has left incomplete or altered; the text names the file."""


def hostile(what: str, where: Path) -> EngineError:
    """The refusal of a checkpoint that no accident makes."""
    return EngineError(
        "E5.4", what, str(where), "do not use this checkpoint; ask whoever made it", safe="nothing was loaded"
    )


# Manifest


def build_manifest(files: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Contents of `manifest.json`: facts about the run, library versions, and size and sha256 of every file."""
    versions = {name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    manifest = {"schema": SCHEMA, **facts, "versions": versions, "files": dict(sorted(files.items()))}
    return manifest | {"manifest_sha256": digest_of(manifest)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked for shape and for paths that leave the folder.

    Raises:
        DamagedError: there is none, or it is no manifest.
        EngineError: E5.4 for a path that leaves the folder.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        shaped = (
            manifest["schema"] == SCHEMA and isinstance(manifest["run_id"], str) and isinstance(manifest["step"], int)
        )
        rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        shaped = shaped and manifest["manifest_sha256"] == digest_of(rest)
        shaped = shaped and all(isinstance(e["size"], int) and _SHA256.fullmatch(e["sha256"]) for e in files.values())
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not readable ({type(error).__name__})") from error
    if not shaped or f"checkpoint-{manifest['step']}" != folder.name:
        raise DamagedError(f"{MANIFEST} is not the manifest of {folder.name}")
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or "\\" in name or "\0" in name or ":" in name or name.startswith("/") or ".." in parts:
            raise hostile(f"the manifest names a path outside the checkpoint: {name!r}", folder / MANIFEST)
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Hold every file of a checkpoint against its manifest, sizes first; returns the manifest.

    Raises:
        DamagedError: a file is missing, has another size or other contents, or is not in the manifest.
        EngineError: E5.4 for links, pickle files and paths that leave the folder.
    """
    present = list_files(folder)
    manifest = read_manifest(folder)
    listed = manifest["files"]
    for name in sorted(present - set(listed) - {MANIFEST}):
        raise DamagedError(f"{name} is not in the manifest")
    for name, entry in listed.items():
        if name not in present:
            raise DamagedError(f"{name} is missing")
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            raise DamagedError(f"{name} has {size} bytes instead of {entry['size']}")
    for name, entry in listed.items():
        if sha256_of(folder / name) != entry["sha256"]:
            raise DamagedError(f"{name} has other contents than when it was saved")
    return manifest


def list_files(folder: Path) -> set[str]:
    """Relative paths of all files below a checkpoint. Raises: EngineError E5.4 for links and pickle files."""
    if folder.is_symlink():
        raise hostile("a link is no checkpoint", folder)
    names = set()
    for root, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            path = Path(root) / name
            if path.is_symlink():
                raise hostile("a checkpoint holds no links", path)
            if path.suffix.lower() in _REFUSED:
                raise hostile("a checkpoint holds no pickle files; they run code when they are loaded", path)
        names |= {(Path(root) / name).relative_to(folder).as_posix() for name in files}
    return {name for name in names if not PurePosixPath(name).name.startswith(".")}


def digest_of(value: Mapping[str, Any]) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
