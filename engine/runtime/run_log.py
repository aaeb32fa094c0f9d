"""The log of a run: everything to `train.log`, the important lines to the console."""

from __future__ import annotations

import logging
import re
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO
from unicodedata import east_asian_width

from engine.runtime.atomic import without_links

_WIDTH = 100  # columns of the console
_ALL = 1 << 30  # more than any number of records, above any level
log = logging.getLogger("engine")


def wrap(line: str, width: int = _WIDTH) -> list[str]:
    """A line cut at spaces to so many columns of a terminal, where Hangul takes two; what follows is indented."""
    lines, used = [""], 0

    def columns_of(text: str) -> int:
        return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)

    for word in re.findall(r"\s*\S+", line):  # each with the spaces before it, which separate fields
        if used and used + columns_of(word) > width:
            lines.append("")
            word, used = f"  {word.lstrip()}", 0
        lines[-1] += word
        used += columns_of(word)
    return lines


class _Console(logging.Handler):
    """Lines of at most 100 columns on stderr, written above a progress bar where one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        text = (
            record.getMessage()
            if record.levelno < logging.WARNING
            else f"{record.levelname.lower()}: {record.getMessage()}"
        )
        lines = [part for line in text.splitlines() for part in wrap(line)]
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write("\n".join(lines), file=sys.stderr)
        else:
            print("\n".join(lines), file=sys.stderr, flush=True)


class _RunFile(logging.FileHandler):
    """A log file that is the run's own: a link in its place is an OSError."""

    def _open(self) -> TextIO:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=without_links)


class RunLog:
    """The loggers under `engine`: everything to `train.log`, the important lines to the console, on the main rank."""

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main
        self.handlers: list[logging.Handler] = []
        log.setLevel(logging.DEBUG)
        log.propagate = False
        # Keeps what is said before there is a file to write it to.
        self._early = MemoryHandler(_ALL, flushLevel=_ALL, flushOnClose=False)
        for handler in [self._early, _Console(logging.INFO)] if is_main else [logging.NullHandler()]:
            self._add(handler)

    def _add(self, handler: logging.Handler) -> None:
        self.handlers.append(handler)
        log.addHandler(handler)

    def open(self, folder: Path) -> None:
        """Start `train.log`; a resumed run continues it."""
        if not self.is_main:
            return
        handler = _RunFile(folder / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self._early.setTarget(handler)
        self._early.flush()
        log.removeHandler(self._early)
        self._add(handler)

    def close(self) -> None:
        for handler in self.handlers:
            log.removeHandler(handler)
            handler.close()
        self.handlers = []
