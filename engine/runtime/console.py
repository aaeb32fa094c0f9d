"""What people look at: the terminal's width, lines and commands that fit it, bars, and lines in place of bars."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

log = logging.getLogger("engine")

_NO_TERMINAL = 100  # columns of a line in a file
_LEAST_BAR, _GOOD_BAR = 4, 12  # columns of the bar: what the first fields leave to it, and the others
_FIRST_FIELDS = 3
_LINE_EVERY = 60.0  # seconds between two lines of a long decoding that nobody sees a bar of


def is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def draws_bars() -> bool:
    """Whether a bar can be redrawn in place: on a terminal, or under the cell of a notebook."""
    return is_terminal(sys.stderr) or "ipykernel" in sys.modules


def columns(stream: Any) -> int:
    """Columns to write in: the terminal's, or 100 where the stream is a file, a pipe or a notebook."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or _NO_TERMINAL
    except (OSError, ValueError, AttributeError):
        return _NO_TERMINAL


def columns_of(text: str) -> int:
    """Columns that a text takes: Hangul and other wide letters take two, combining marks none."""
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def wrap(line: str, width: int) -> list[str]:
    """A line cut at spaces to `width` columns; what follows is indented. Paths and ids stay whole, to be copied."""
    words = re.findall(r"\s*\S+", line)  # each with the spaces before it, which separate fields
    return _laid([part for word in words for part in _pieces(word, width)], width)


def wrap_command(words: Sequence[str], width: int) -> list[str]:
    """A command for the shell, quoted; a line that is not the last ends in a backslash, so that all of it can be copied."""
    quoted = [" " + shlex.quote(word) for word in words]
    lines = _laid([quoted[0].lstrip(), *quoted[1:]], width - len(" \\"))
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _laid(words: Sequence[str], width: int) -> list[str]:
    lines, used = [""], 0
    for word in words:
        if used and used + columns_of(word) > width:
            word = word.lstrip()
            word, used = word if width - 2 < columns_of(word) <= width else f"  {word}", 0
            lines.append("")
        lines[-1] += word
        used += columns_of(word)
    return lines


def _pieces(word: str, width: int) -> list[str]:
    """Korean that no line can hold, in parts that fit: a prediction of an untrained model may lack any space."""
    if columns_of(word) <= width or "/" in word or columns_of(word) == len(word):
        return [word]
    pieces = [""]
    for letter in word.lstrip():
        if columns_of(pieces[-1] + letter) > width - 2:  # two for the indent
            pieces.append("")
        pieces[-1] += letter
    return [" " + pieces[0], *pieces[1:]] if word[0].isspace() else pieces


def from_here(path: Path) -> str:
    """The path as a command typed in the current folder takes it: relative below that folder, else as it is."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def duration(seconds: float) -> str:
    """45s, 12m05s, 3h07m or 2d04h: never to be mistaken for the time of day."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = whole // 60
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes < 1440 else f"{minutes // 1440}d{minutes // 60 % 24:02d}h"


def pace(per_second: float, unit: str = "it") -> str:
    """1.2 it/s, or 3.4 s/it where one takes longer than a second."""
    if per_second <= 0:
        return f"? {unit}/s"
    return f"{per_second:.1f} {unit}/s" if per_second >= 1 else f"{1 / per_second:.1f} s/{unit}"


class Bar:
    """A tqdm bar on stderr that fits the terminal, also after it was resized. Fields follow it as far as they fit."""

    def __init__(self, *, total: int, initial: int = 0, desc: str, unit: str = "it") -> None:
        from tqdm import tqdm

        self.initial, self.unit = initial, unit
        self.started = time.perf_counter()
        self.tqdm = tqdm(
            total=total,
            initial=initial,
            desc=desc,
            file=sys.stderr,
            leave=False,
            miniters=1,  # so that only time decides when to draw
            ncols=self._columns(),
            bar_format="{desc}{percentage:4.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    @staticmethod
    def _columns() -> int:
        return columns(sys.stderr) - 1  # a letter in the last column makes some terminals begin a new line

    def update(self, count: int, fields: Sequence[str] | None = None) -> None:
        """Move on; without `fields` the time left and the pace are shown, as measured since the bar was made."""
        bar = self.tqdm
        count = min(count, bar.total - bar.n)  # the rows of other ranks are guessed from this rank's
        done = bar.n + count
        if fields is None:
            fields = left_and_pace(done - self.initial, bar.total - done, time.perf_counter() - self.started, self.unit)
        bar.ncols = self._columns()
        room = bar.ncols - columns_of(f"{bar.desc} 100%|| {done}/{bar.total}")
        kept: list[str] = []
        for field in fields:
            room -= columns_of(field) + len(", ")
            if room < (_LEAST_BAR if len(kept) < _FIRST_FIELDS else _GOOD_BAR):
                break
            kept.append(field)
        bar.set_postfix_str(", ".join(kept), refresh=False)
        bar.update(count)

    def close(self) -> None:
        self.tqdm.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Lines:
    """Stands in for a bar where there is no terminal: a line of the log once a minute, none for what is quick."""

    def __init__(
        self, *, total: int, initial: int = 0, desc: str, unit: str = "it", every: float = _LINE_EVERY
    ) -> None:
        self.total, self.done, self.initial, self.desc, self.unit, self.every = (
            total,
            initial,
            initial,
            desc,
            unit,
            every,
        )
        self.started = self.told = time.perf_counter()

    def update(self, count: int) -> None:
        self.done = min(self.total, self.done + count)
        now = time.perf_counter()
        if now - self.told < self.every or self.done == self.total:
            return
        self.told = now
        fields = left_and_pace(self.done - self.initial, self.total - self.done, now - self.started, self.unit)
        log.info("%s  %d/%d  %s", self.desc, self.done, self.total, "  ".join(fields))

    def close(self) -> None:
        pass

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def meter(*, shown: bool, **settings: Any) -> Bar | Lines:
    """What goes with a long piece of work: a bar on a terminal, lines without one, nothing unless it is to be shown."""
    if not shown:
        return Lines(**settings, every=math.inf)
    return Bar(**settings) if draws_bars() else Lines(**settings)


def left_and_pace(done: int, left: int, seconds: float, unit: str) -> list[str]:
    """The fields of a piece of work that goes on as it went so far."""
    if done <= 0 or seconds <= 0:
        return []
    return [f"ETA {duration(left * seconds / done)}", pace(done / seconds, unit)]
