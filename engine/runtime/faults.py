"""The border at which other people's files are read: what they did wrong there is told in one line, under its exit code.

Libraries raise anything on a bad file, and each release something else; so the places that read files do not list types of
exceptions but stand inside `blaming`.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine import errors
from engine.errors import EngineError
from engine.runtime.exits import DISK, classify

_LONGEST = 200  # characters of a library's own words
_SLIPS = (AssertionError, AttributeError, LookupError, NameError, TypeError)  # what a line that is wrong raises
_HOME = str(Path(errors.__file__).parent) + os.sep
_PLAIN = (ValueError, RuntimeError, OSError)  # their text is a sentence; of other types the name says half of it


@contextmanager
def blaming(
    code: str, what: str, where: str | Path = "", next: str = "", *, safe: str | None = None, wide: bool = False
) -> Iterator[None]:
    """Turn whatever fails inside into `EngineError(code)`, "<what>: <the library's first line>".

    Left alone are errors that are told already, requests to stop, and what no file is guilty of: too little memory (E8)
    and a disk that is full or broken (E6).

    Args:
        wide: more is inside than the reading of files. What breaks in our own code is then left alone too.
    """
    try:
        yield
    except EngineError:
        raise
    except BaseException as error:
        # Rust libraries panic past `except Exception`, on nothing worse than a key that is missing in a file.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        known = classify(error)
        if known.exit_code == errors.MEMORY:
            raise known from error
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        if wide and _is_a_bug(error):
            raise
        raise EngineError(code, f"{what}: {first_line(error)}", str(where), next, safe=safe) from error


def _is_a_bug(error: BaseException) -> bool:
    """Whether a line of ours slipped: on an odd file a library fails, or a check of ours, which says so in a sentence."""
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    return isinstance(error, _SLIPS) and at.tb_frame.f_code.co_filename.startswith(_HOME)


def at_line(error: BaseException) -> str:
    """Where code that is not ours raised it: " at mine.py:12", or nothing where our own did."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = next((frame.filename for frame in frames if not frame.filename.startswith(_HOME)), None)
    lines = [frame.lineno for frame in frames if frame.filename == theirs]  # not in the libraries that it called
    return f" at {os.path.basename(theirs)}:{lines[-1]}" if lines else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, of bounded length: libraries append pages of advice, and whole files."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not isinstance(error, _PLAIN) or not line:
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
