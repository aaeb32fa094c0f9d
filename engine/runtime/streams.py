"""Standard streams that cannot end a run: UTF-8 whatever the locale says, and readers may leave (`| head -1`)."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, TextIO


class PatientStream:
    """A standard stream whose reader may leave, or whose disk may fill: what nobody can read is dropped, nothing is raised."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._leave()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def _leave(self) -> None:
        # The descriptor itself, so that libraries' own writes and the interpreter's last flush go nowhere too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Called once by each command, before anything is read or written.

    May start the interpreter anew: under `LC_ALL=C` Python 3.10 to 3.14 may have decoded names of files as ASCII, which
    only its UTF-8 mode, chosen at its start, mends.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by the caller: the next file opened would become this stream
            _fill(descriptor)
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a test's capture has no encoding to change
            stream.reconfigure(errors="replace")
            setattr(sys, name, PatientStream(stream))
    threading.excepthook = _tell_in_one_line


def _fill(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _tell_in_one_line(failed: threading.ExceptHookArgs) -> None:
    """A library's helper thread (TensorBoard's writer on a full disk) is no reason for a page of traceback."""
    who = failed.thread.name if failed.thread is not None else "a thread"
    text = " ".join(f"{failed.exc_type.__name__}: {failed.exc_value}".split())[:300]
    print(f"warning: {who} stopped: {text}", file=sys.stderr)
