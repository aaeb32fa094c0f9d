"""One run at a time in a folder, and turns at a shared table."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from engine.errors import EngineError
from engine.runtime.atomic import read_json, write_json_atomically

_NO_KERNEL_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # on some network file systems


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
    """One run at a time in a folder: a lock on `.lock`, and beside it `.lock.json`, which says who holds it.

    Args:
        name: of the lock's file, where a folder holds several things to lock.
        thing: what is locked, and
        advice: what to do while somebody else has it, in the message.

    The kernel frees the lock when its process ends, however it ends. The record then stays behind, and the next run
    can say whose place it takes. Where the file system has no kernel locks, the library's lock by process id decides.
    """

    def __init__(
        self,
        folder: Path,
        name: str = ".lock",
        *,
        thing: str = "in this folder",
        advice: str = "wait for it, or set another experiment.output_dir",
    ) -> None:
        self.path, self.owner_file = folder / name, folder / f"{name}.json"
        self._thing, self._advice = thing, advice
        self._lock: BaseFileLock | None = None

    def acquire(self) -> str | None:
        """Take the lock; returns a note when it was taken over from a dead run.

        Raises:
            EngineError: E2.30 when a living process holds it.
        """
        try:
            self._lock = _locked(self.path)
        except Timeout:
            raise self._busy() from None
        owner = self._owner()
        this = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json_atomically(self.owner_file, this, durable=False)
        return f"took over the lock of process {owner['pid']}, which is gone" if owner else None

    def release(self) -> None:
        """Give the lock back and remove its files. Safe to call twice."""
        if self._lock is not None:
            self.owner_file.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it locked no name
            self._lock.release()
            self._lock = None

    def _owner(self) -> dict[str, Any] | None:
        try:
            owner = read_json(self.owner_file)
            return {"pid": owner["pid"], "host": owner["host"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _busy(self) -> EngineError:
        owner = self._owner()
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        return EngineError(
            "E2.30",
            f"{who} is running {self._thing}",
            str(self.path),
            self._advice,
            safe="nothing was touched",
        )


def _locked(path: Path) -> BaseFileLock:
    """A lock that is held. Raises: Timeout at once when another process holds it."""
    lock: BaseFileLock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in _NO_KERNEL_LOCKS:
            raise
        lock = SoftFileLock(
            path.with_name(f"{path.name}.soft")
        )  # not `.lock`, which the attempt above may have emptied
        lock.acquire(timeout=0)
    return lock
