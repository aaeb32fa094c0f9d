"""The log of a run: everything to `train.log`, the important lines to the console."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

from engine.errors import printable
from engine.runtime import console
from engine.runtime.atomic import without_links

RESULT = "engine.result"  # the logger of a command's result
_ALL = 1 << 30  # more than any number of records, above any level
log = logging.getLogger("engine")


class _Console(logging.Handler):
    """Lines as wide as the terminal, written above a progress bar where one is drawn.

    What a run says on its way goes to stderr; what it has brought (`RESULT`) goes to stdout, where a script looks for it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.name == RESULT else sys.stderr
        lines = _lines_of(record, stream)
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write("\n".join(lines), file=stream)
            stream.flush()
        else:
            print("\n".join(lines), file=stream, flush=True)


def _lines_of(record: logging.LogRecord, stream: Any) -> list[str]:
    """`extra={"command": words}` marks a command to be copied: in a file it stays one line."""
    width = console.columns(stream)
    command = getattr(record, "command", None)
    if command is not None:
        return console.wrap_command(command, width) if console.is_terminal(stream) else [record.getMessage()]
    text = printable(record.getMessage())
    if record.levelno >= logging.WARNING:
        text = f"{record.levelname.lower()}: {text}"
    return [part for line in text.splitlines() for part in console.wrap(line, width)]


class _RunFile(logging.FileHandler):
    """A log file that is the run's own: a link in its place is an OSError."""

    def _open(self) -> TextIO:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=without_links)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))  # a log is read on terminals too


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
        handler.setFormatter(_Plain("%(asctime)s %(levelname)-7s %(message)s"))
        self._early.setTarget(handler)
        self._early.flush()
        log.removeHandler(self._early)
        self._add(handler)

    def close(self) -> None:
        for handler in self.handlers:
            log.removeHandler(handler)
            handler.close()
        self.handlers = []
