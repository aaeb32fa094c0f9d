"""What a program of somebody else's may take, and what its end leaves in this process."""

from __future__ import annotations

import os
import signal
import time

import pytest

from engine.runtime.bounded import fault_of

LIMITS = {"seconds": 1, "mebibytes": 64}


def raises() -> None:
    raise ValueError("its own affair")


@pytest.mark.parametrize("do", [lambda: None, raises, lambda: bytearray(1 << 20)])
def test_what_ends_within_its_bounds_is_nobodys_fault(do) -> None:
    assert fault_of(do, **LIMITS) is None


@pytest.mark.parametrize(
    ("do", "fault"),
    [
        (lambda: 9 ** (9**9), "takes more than 1 s"),
        (lambda: bytearray(128 << 20), "takes more than 64 MiB of memory"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "takes more than 1 s"),  # of the kernel's, where memory is short
    ],
)
def test_what_does_not_is_told_and_costs_this_process_nothing(do, fault) -> None:
    assert fault_of(do, **LIMITS) == fault


def test_a_request_to_stop_is_for_the_parent() -> None:
    asked = []
    old = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        assert fault_of(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)), **LIMITS) is None
    finally:
        signal.signal(signal.SIGTERM, old)
    assert not asked
