"""Somebody else's program, tried in a process that may be killed: C code cannot be interrupted, and memory not be given back.

`9 ** 9 ** 9` in a chat template holds the interpreter for hours in one operation, and no signal handler runs until it is done.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from engine import errors
from engine.runtime.exits import classify

_FORGOTTEN = 60  # seconds on the clock, for a child that waits: nothing that is tried here should


def fault_of(do: Callable[[], object], *, seconds: int, mebibytes: int) -> str | None:
    """What is wrong with the appetite of `do`, which runs in a forked child; None where it ends, well or with an exception.

    Args:
        seconds: of computing; a busy machine does not count.
        mebibytes: of memory beyond what this process has.
    """
    pid = os.fork()
    if pid == 0:
        _run_and_leave(do, seconds, mebibytes << 20)
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return None
    return f"takes more than {seconds} s" if os.WIFSIGNALED(status) else f"takes more than {mebibytes} MiB of memory"


def _run_and_leave(do: Callable[[], object], seconds: int, bytes: int) -> None:
    """The child: nothing of it may reach the terminal or the caller's `finally` clauses."""
    short_of_memory = False
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the whole group; the parent answers it
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_FORGOTTEN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _lower(resource.RLIMIT_CPU, seconds)
        statm = Path("/proc/self/statm")
        if statm.exists():
            _lower(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + bytes)
        do()
    except BaseException as error:
        short_of_memory = classify(error).exit_code == errors.MEMORY
    finally:
        os._exit(short_of_memory)


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))
