"""Files that are whole or absent: atomic writes, hashes, nested state as JSON + safetensors, and the lock of a run
folder.

Nothing here reads or writes pickle. A nested state (an optimizer's, a random generator's) becomes a JSON tree in
which every tensor is a name, and one safetensors file that holds the tensors under those names; both together restore
it bit for bit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import EngineError

_UNSUPPORTED_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_GO_ON = "free some space or choose another experiment.output_dir, then run again with --resume auto"
# Callables `(point, path)` met on the way through a save. Only tests fill this list, to kill or to fail there.
fail_points: list[Callable[[str, Path], None]] = []


def reached(point: str, path: Path) -> None:
    """Name an instant of a save, for tests that interrupt it there."""
    for callback in fail_points:
        callback(point, path)


# Files


def fsync_file(path: Path) -> None:
    """Force a file's (or folder's) contents to the disk, not only into the page cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by `text` so that a reader, or a crash, sees the old file or the new one and nothing between.

    `durable=False` skips the flush to disk: still whole after a crash of this process, not after one of the machine.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        fsync_file(path.parent)


def write_json_atomically(path: Path, value: Any, *, durable: bool = True) -> None:
    """Strict JSON (no NaN), indented, through `write_text_atomically`."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_text_atomically(path, text, durable=durable)


def read_json(path: Path) -> Any:
    """Strict JSON of a file. Raises ValueError where it is not, OSError where there is none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """What a manifest holds for one file, after forcing it to the disk."""
    fsync_file(path)
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def free_bytes(folder: Path) -> int:
    """Bytes a normal user may still write below `folder` (its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def storage_error(error: BaseException, path: Path, doing: str, safe: str, next: str = _GO_ON) -> EngineError:
    """A failed write as E6, with the free space: libraries report a full disk as anything but OSError."""
    try:
        room = f"{free_bytes(path) / 2**20:.0f} MiB free"
    except OSError:
        room = "free space unknown"
    cause = (
        os.strerror(error.errno) if isinstance(error, OSError) and error.errno else f"{type(error).__name__}: {error}"
    )
    return EngineError("E6.1", f"{doing} failed: {cause[:200]}", f"{path}, {room}", safe, next)


# Nested state <-> two files


def flatten_state(value: Any) -> tuple[Any, dict[str, Any]]:
    """A nested state as (JSON tree, tensors by name). The same tensor met twice is stored once.

    Dicts keep the type of their keys and tuples stay tuples, which optimizers insist on; floats survive exactly because
    JSON writes the shortest decimal that reads back as the same double.
    """
    tensors: dict[str, Any] = {}
    names: dict[tuple, str] = {}
    return _pack(value, tensors, names), tensors


def _pack(value: Any, tensors: dict[str, Any], names: dict[tuple, str]) -> Any:
    import numpy
    import torch

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value, tensors, names)
    if isinstance(value, numpy.ndarray):
        return {"array": _pack_tensor(torch.from_numpy(_signed(value)), tensors, names), "dtype": str(value.dtype)}
    if isinstance(value, numpy.generic):
        return _pack(value.item(), tensors, names)
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, tensors, names)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_pack(item, tensors, names) for item in value]}
    raise TypeError(f"cannot store a {type(value).__name__} in a checkpoint")


def _signed(array: Any) -> Any:
    # Same bits under a dtype that every torch and safetensors version knows.
    return (
        array.view(f"i{array.dtype.itemsize}").copy()
        if array.dtype.kind == "u" and array.dtype.itemsize > 1
        else array.copy()
    )


def _pack_tensor(tensor: Any, tensors: dict[str, Any], names: dict[tuple, str]) -> dict[str, str]:
    tensor = tensor.detach()
    identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if tensor.numel() == 0 or identity not in names:
        names[identity] = f"t{len(tensors)}"
        tensors[names[identity]] = tensor
    return {"tensor": names[identity]}


def restore_state(tree: Any, tensors: Mapping[str, Any]) -> Any:
    """Inverse of `flatten_state`. Raises ValueError or KeyError for a tree that it did not write."""
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("a bare list in a stored state")
        return tree
    if "dict" in tree:
        return {key: restore_state(item, tensors) for key, item in tree["dict"]}
    if "list" in tree:
        return [restore_state(item, tensors) for item in tree["list"]]
    if "tuple" in tree:
        return tuple(restore_state(item, tensors) for item in tree["tuple"])
    if "float" in tree:
        return float(tree["float"])
    if "array" in tree:
        return tensors[tree["array"]["tensor"]].numpy().view(tree["dtype"])
    return tensors[tree["tensor"]]


def write_state(folder: Path, name: str, tree: Any, tensors: Mapping[str, Any]) -> list[Path]:
    """Write `<name>.json` and, if there are tensors, `<name>.safetensors`; returns the paths written."""
    from safetensors.torch import save_file

    written = [folder / f"{name}.json"]
    written[0].write_text(json.dumps(tree, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    if tensors:
        written.append(folder / f"{name}.safetensors")
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, written[1])
    return written


def read_state(folder: Path, name: str) -> Any:
    """Inverse of `write_state` after `flatten_state`; tensors arrive on the CPU."""
    from safetensors.torch import load_file

    tensor_file = folder / f"{name}.safetensors"
    tensors = load_file(tensor_file) if tensor_file.exists() else {}
    return restore_state(read_json(folder / f"{name}.json"), tensors)


# Locks


@contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside for this folder. Leaves no file; without `flock` there is no waiting."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class FolderLock:
    """One run at a time in a folder.

    The lock is the kernel's (`flock`): it ends with the process that holds it, however that ends, so nothing is ever
    cleaned up by hand. On file systems without it, the process id, host and boot id in the file decide instead.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._handle: int | None = None

    def acquire(self) -> str | None:
        """Take the lock; returns a note when it was taken over from a dead run.

        Raises:
            EngineError: E2 when a living process holds it.
        """
        for _ in range(5):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            owner = _lock_owner(handle)
            if not self._lock_file(handle, owner):
                os.close(handle)
                raise self._busy(owner)
            if self._is_current(handle):
                self._handle = handle
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
                dead = owner is not None and owner.get("pid") != os.getpid()
                return f"took over the lock of process {owner.get('pid')}, which is gone" if dead else None
            os.close(handle)
        raise self._busy(None)

    @staticmethod
    def _lock_file(handle: int, owner: dict[str, Any] | None) -> bool:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except ImportError:
            return not _is_alive(owner)
        except OSError as error:
            if error.errno not in _UNSUPPORTED_LOCK:
                raise
            return not _is_alive(owner)
        return True

    def _is_current(self, handle: int) -> bool:
        # The former owner may have removed the file between our opening and our locking it.
        try:
            return os.fstat(handle).st_ino == os.stat(self.path, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return False

    def _busy(self, owner: dict[str, Any] | None) -> EngineError:
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        return EngineError(
            "E2.30",
            f"{who} is running in this folder",
            str(self.path),
            "nothing was touched",
            "wait for it, or set another experiment.output_dir",
        )

    def release(self) -> None:
        """Give the lock back and remove its file. Safe to call twice."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _lock_owner(handle: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return owner if {"pid", "host", "boot"} <= set(owner) else None
    except (ValueError, TypeError):
        return None


def _is_alive(owner: dict[str, Any] | None) -> bool:
    if owner is None:
        return False
    if owner["host"] != socket.gethostname():
        return True  # cannot be told from here
    if owner["boot"] != _boot_id():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
