"""One run at a time in a folder."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
from checkpoint_toys import names

from engine.errors import EngineError
from engine.runtime.lock import FolderLock

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
            FolderLock(tmp_path).acquire()
        assert caught.value.exit_code == 2
    finally:
        owner.kill()
        owner.wait()
    lock = FolderLock(tmp_path)
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
            FolderLock(tmp_path / "run").acquire()
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
        lock = FolderLock(tmp_path)
        if held:
            with pytest.raises(EngineError, match=r"error E2\.30"):
                lock.acquire()
        else:
            lock.acquire()
            with pytest.raises(EngineError, match=f"process {os.getpid()}"):
                FolderLock(tmp_path).acquire()
            lock.release()
            assert names(tmp_path) == set()
