"""Requests from outside, as one process sees them."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from engine.runtime import signals as runtime_signals
from engine.runtime.signals import Stopped, StopSignal


@pytest.fixture
def signals():
    given_up = []
    catcher = StopSignal(given_up.append)
    catcher.given_up = given_up
    catcher.open()
    yield catcher
    catcher.close()


def test_before_the_loop_a_signal_unwinds_at_once(signals):
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert not caught.value.saved and "SIGINT before the first update" in str(caught.value)


def test_in_the_loop_signals_wait_for_the_boundary(signals):
    signals.enter_loop()
    assert signals.take() == runtime_signals.NOTHING
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.take() == runtime_signals.SAVE and signals.take() == runtime_signals.NOTHING, "one request, one save"
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.take() == runtime_signals.STOP and signals.take() == runtime_signals.STOP and signals.stopping
    os.kill(os.getpid(), signal.SIGTERM)  # Ctrl-C reaches a worker from the terminal and from its launcher
    time.sleep(0.2)
    assert signals.given_up == []
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    assert len(signals.given_up) == 1


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    catcher = StopSignal(lambda reason: None)
    catcher.open()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    catcher.close()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    worker = threading.Thread(target=catcher.open)  # where Python cannot catch signals, nothing happens
    worker.start()
    worker.join()
    assert signal.getsignal(signal.SIGTERM) == before[0]
