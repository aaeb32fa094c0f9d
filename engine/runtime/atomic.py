"""Files that are whole or absent: atomic writes, hashes, free space, and failed writes as errors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from engine.errors import EngineError

_SAMPLES, _SAMPLE_BYTES = 64, 65536  # of a weight file: enough to tell two trainings apart, quick for 16 GB
_MAX_JSON_BYTES = 64 * 2**20  # ours have kilobytes, the largest weight indexes some megabytes
_GO_ON = "free some space or choose another experiment.output_dir, then run again with --resume auto"
_PARTIAL = re.compile(r"\.(.+)\.\d+\.partial")
# Callables `(point, path)` met on the way through a save. Only tests fill this list, to kill or to fail there.
fail_points: list[Callable[[str, Path], None]] = []


def reached(point: str, path: Path) -> None:
    """Name an instant of a save, for tests that interrupt it there."""
    for callback in fail_points:
        callback(point, path)


def fsync_file(path: Path) -> None:
    """Force a file's (or folder's) contents to the disk, not only into the page cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_atomically(path: Path, *, durable: bool = True, errors: str = "strict") -> Iterator[IO[str]]:
    """A handle on what will replace `path` when the block ends well: a reader, or a crash, sees the old file or the new one.

    `durable=False` skips the flush to disk: still whole after a crash of this process, not after one of the machine.
    A kill leaves a `.<name>.<pid>.partial` behind, for `remove_partials`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # by a killed process of the same number, or somebody's link
        # "x" follows no link; csv brings line ends of its own.
        with partial.open("x", encoding="utf-8", errors=errors, newline="") as handle:
            yield handle
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        fsync_file(path.parent)


def write_text_atomically(path: Path, text: str, *, durable: bool = True, errors: str = "strict") -> None:
    """Replace `path` by `text`, as `written_atomically` does."""
    with written_atomically(path, durable=durable, errors=errors) as handle:
        handle.write(text)


def append_text(path: Path, text: str) -> None:
    """Add to a file that is this run's own. Raises: OSError where a link stands in its place."""
    with open(path, "a", encoding="utf-8", opener=without_links) as handle:
        handle.write(text)


def without_links(path: str, flags: int) -> int:
    """As `opener` of `open`: refuses a link in the file's place (Windows has no such flag)."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill. It gets its name when the block has ended well, and is gone when it has not.

    Raises: EngineError E2.63 as `refuse_existing`.
    """
    refuse_existing(output)
    partial = output.with_name(f".{output.name}.partial")
    _remove(partial)  # of a killed process, or somebody's link
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    finally:
        _remove(partial)


def refuse_existing(output: Path) -> None:
    """Raises: EngineError E2.63 where something has that name, be it a link that leads nowhere."""
    if os.path.lexists(output):
        what, advice = "the output is there already", "remove it, or name a new folder"
        raise EngineError("E2.63", what, str(output), advice, safe="nothing was written")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Remove what killed writes left behind: of the file of that name, or of all files in a folder of ours."""
    for path in folder.iterdir():
        match = _PARTIAL.fullmatch(path.name)
        if match and name in (None, match[1]) and path.is_file():
            path.unlink(missing_ok=True)


def write_json_atomically(path: Path, value: Any, *, durable: bool = True) -> None:
    """Strict JSON (no NaN), indented, through `write_text_atomically`."""
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_text_atomically(path, text, durable=durable)


def read_json(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        strict: refuse NaN and Infinity, which JSON does not have; model configurations write them all the same.

    Raises:
        ValueError: not a JSON object, nested too deeply, or larger than 64 MiB.
        OSError: no such file.
    """

    if path.exists() and not path.is_file():
        raise ValueError("no regular file")  # a pipe would be waited for, a device read for ever

    def constant(name: str) -> float:
        if strict:
            raise ValueError(f"{name} is not JSON")
        return float(name)

    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def add_samples(digest: Any, path: Path) -> None:
    """Feed a hash with evenly spaced samples of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


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
    return EngineError("E6.1", f"{doing} failed: {cause[:200]}", f"{path}, {room}", next, safe=safe)
