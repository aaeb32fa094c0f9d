"""Requests from outside: stop (SIGTERM, SIGINT), save and go on (SIGUSR1), give up (a second stop), and a vanished
launcher.

A request never interrupts an update: a rank that left in the middle of one would leave the others in a collective, and
its weights between two steps. It is noted, the ranks agree on it at the next update boundary, and the loop acts there.
Giving up is different. Python runs signal handlers in the main thread alone, and only between two bytecodes, so a
handler would wait for a C function, for a collective that will never end, or for a save. A thread that reads the
signals' wake-up pipe does not wait for any of them.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

NOTHING, SAVE, STOP = 0, 1, 2
_ECHO = 0.5  # seconds: Ctrl-C in a terminal reaches a worker twice, from the terminal and from its launcher
_WATCH = 0.5  # seconds between two looks at the parent process


class Stopped(BaseException):
    """The run ended on request; `saved` decides between exit codes 75 and 76.

    Like KeyboardInterrupt it is no Exception: an `except Exception` on its way must not swallow it.
    """

    def __init__(self, reason: str, *, saved: bool) -> None:
        super().__init__(reason)
        self.saved = saved


class StopSignal:
    """Catches signals while it is open. Outside the main thread, where Python cannot, it does nothing.

    Args:
        give_up: called from the watching thread with a reason on a second stop signal; must end the process.
        follow_parent: treat the death of the parent process (a launcher) as SIGTERM.
    """

    def __init__(self, give_up: Callable[[str], None], *, follow_parent: bool = False) -> None:
        self._give_up, self._follow_parent = give_up, follow_parent
        self._parent = os.getppid()
        self._lock = threading.Lock()
        self._request = NOTHING
        self._stop_at: float | None = None
        self._in_loop = False
        self._old: dict[int, Any] = {}
        self._pipe: tuple[socket.socket, socket.socket] | None = None
        self.reason = ""

    # Open and close

    def open(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._pipe = socket.socketpair()
        for end in self._pipe:
            end.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._pipe[1].fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", None)):
            if number is not None:
                self._old[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()

    def close(self) -> None:
        if self._pipe is None:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        pipe, self._pipe = self._pipe, None
        pipe[1].close()  # the watching thread sees the end of its pipe, and ends

    # Receiving

    def _on_signal(self, number: int, frame: Any) -> None:
        """Runs in the main thread. Before the loop there is nothing to finish or to save: unwind at once."""
        self._note(number)
        if not self._in_loop and self._request == STOP:
            raise Stopped(f"{self.reason} before the first update", saved=False)

    def _watch(self, pipe: socket.socket) -> None:
        """Runs in its own thread, also while the main thread cannot."""
        while True:
            ready, _, _ = select.select([pipe], [], [], _WATCH)
            if ready:
                numbers = pipe.recv(64)
                if not numbers:
                    return pipe.close()
                for number in numbers:
                    self._note(number)
            # A launcher that was killed cannot pass its signal on; its workers would train on as orphans.
            elif self._follow_parent and os.getppid() != self._parent:
                self._follow_parent = False
                os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int) -> None:
        # Both threads see every stop signal; whichever comes first notes it, and the other's look falls under the
        # echo rule.
        second, main = False, threading.current_thread() is threading.main_thread()
        with self._lock:
            if number == getattr(signal, "SIGUSR1", None):
                self._request = max(self._request, SAVE if main else NOTHING)
            elif number in (signal.SIGTERM, signal.SIGINT):
                now, name = time.monotonic(), signal.Signals(number).name
                second = self._stop_at is not None and now - self._stop_at > _ECHO
                if self._stop_at is None:
                    self._stop_at, self.reason = now, f"stopped by {name}"
                self._request = STOP
        if second and not main:
            self._give_up(f"{self.reason}, then again before the save was done")

    # Asking

    def ask(self, reason: str) -> None:
        """As a first SIGTERM from within: stop at the next update boundary."""
        with self._lock:
            self.reason, self._request = self.reason or reason, STOP

    def enter_loop(self) -> None:
        """From here on requests wait for update boundaries."""
        self._in_loop = True

    @property
    def stopping(self) -> bool:
        """Whether this rank has been asked to stop; the others may not know yet."""
        return self._request == STOP

    def take(self) -> int:
        """NOTHING, SAVE or STOP, as this rank sees it. A request to save is taken once; one to stop stays."""
        with self._lock:
            request = self._request
            if request == SAVE:
                self._request = NOTHING
        return request
