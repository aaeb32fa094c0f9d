"""One run at a time in a folder, and turns at a shared table."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import EngineError

_UNSUPPORTED_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


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
            "wait for it, or set another experiment.output_dir",
            safe="nothing was touched",
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
