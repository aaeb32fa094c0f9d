"""A terminal for tests: a pty of some width, and what a person would see on it, scrolled lines included."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from unicodedata import combining, east_asian_width

import pytest

_TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|([\r\n])|(.)", re.DOTALL)


class Screen:
    """Letters, newlines, carriage returns and the two escapes that tqdm uses. `lines` holds all that ever scrolled by."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self.overflows = 0  # letters that did not fit and began a new line
        self.history: list[str] = []  # what stood on a line each time it was redrawn

    def feed(self, text: str) -> None:
        for number, command, control, letter in (match.groups() for match in _TOKEN.finditer(text)):
            if command == "A":
                self.row = max(0, self.row - int(number or 1))
            elif command == "K":
                del self.lines[self.row][self.column :]
            elif control == "\n":
                self._down()
            elif control == "\r":
                self.history.append("".join(self.lines[self.row]).rstrip())
                self.column = 0
            elif letter:
                self._put(letter)

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append([])

    def _put(self, letter: str) -> None:
        wide = 0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1
        if self.column + wide > self.width:
            self.overflows += 1
            self._down()
        line = self.lines[self.row]
        line += [" "] * (self.column + wide - len(line))
        if wide:
            line[self.column] = letter
        for blank in range(self.column + 1, self.column + wide):
            line[blank] = ""  # the second half of a wide letter
        self.column += wide

    @property
    def text(self) -> list[str]:
        return [line for line in ("".join(line).rstrip() for line in self.lines) if line]


@contextmanager
def terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """Within it this process's stdout and stderr are a terminal of `width` columns; afterwards the screen can be read."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    written: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(ours, written), daemon=True)
    reader.start()
    screen = Screen(width)
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield screen
    reader.join(timeout=30)
    os.close(ours)
    screen.feed(b"".join(written).decode("utf-8"))


def _drain(descriptor: int, into: list[bytes]) -> None:
    with suppress(OSError):  # Linux says so when the last writer has gone
        while part := os.read(descriptor, 65536):
            into.append(part)
