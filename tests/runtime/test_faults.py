"""What is blamed on a file, and what no file is guilty of."""

from __future__ import annotations

import errno
from pathlib import Path
from string import Template

import pytest

from engine.errors import EngineError
from engine.runtime import faults
from engine.runtime.exits import classify
from engine.runtime.faults import blaming, first_line
from engine.runtime.signals import Stopped


class PanicException(BaseException):
    """As Rust libraries raise it."""


def blamed(error: BaseException) -> EngineError:
    with pytest.raises(EngineError) as caught, blaming("E4.9", "cannot be read", "folder", "look at it"):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad value\nand pages of advice"), "cannot be read: bad value"),
        (KeyError("lr"), "cannot be read: KeyError: 'lr'"),
        (RecursionError("too deep"), "cannot be read: too deep"),
        (PanicException("no entry"), "cannot be read: PanicException: no entry"),
        (FileNotFoundError(errno.ENOENT, "no such file", "config.json"), "cannot be read: [Errno 2]"),
        (RuntimeError(), "cannot be read: RuntimeError"),
    ],
)
def test_whatever_a_library_raises_is_one_line_of_the_folders_code(error: BaseException, text: str) -> None:
    told = blamed(error)
    assert told.code == "E4.9" and str(told).startswith(f"error E4.9: {text}") and len(str(told).splitlines()) == 1
    assert told.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(2), Stopped("on request", saved=True)])
def test_requests_to_stop_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), blaming("E4.9", "cannot be read"):
        raise error


def test_our_own_errors_pass() -> None:
    with pytest.raises(EngineError, match=r"E2\.1"), blaming("E4.9", "cannot be read"):
        raise EngineError("E2.1", "no such key")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 40000000000 bytes"),
        RuntimeError("can't start new thread"),
        SystemError("error return without exception set"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libx.so: cannot allocate memory in static TLS block"),
    ],
)
def test_too_little_memory_is_code_8_wherever_it_is_met(error: Exception) -> None:
    assert classify(error).exit_code == 8
    assert blamed(error).exit_code == 8


def test_a_full_disk_is_no_folders_fault() -> None:
    with pytest.raises(OSError, match="full") as caught, blaming("E4.9", "cannot be read"):
        raise OSError(errno.ENOSPC, "full")
    assert classify(caught.value).exit_code == 6


def test_a_value_of_ten_thousand_letters_is_not_quoted_in_full() -> None:
    assert len(first_line(ValueError("x" * 10_000))) == 200
    told = str(EngineError("E4.9", f"the key {'x' * 10_000!r} is wrong", "/a/folder", "look at it"))
    assert len(told) < 300 and "xxx...xxx" in told and told.endswith("look at it")


def test_half_characters_of_a_file_can_be_printed() -> None:
    assert r"\ud800" in str(EngineError("E4.9", "the key \ud800 is wrong"))


def test_a_bug_of_ours_is_not_blamed_on_the_file_that_was_open(monkeypatch) -> None:
    def blamed_with(broken, *, wide=True):
        with blaming("E4.16", "cannot be used", "folder", wide=wide):
            broken()

    def check():
        raise ValueError("no name")

    monkeypatch.setattr(faults, "_HOME", str(Path(__file__).parent))
    with pytest.raises(KeyError):
        blamed_with(lambda: {}["name"])
    with pytest.raises(EngineError, match=r"E4\.16.*KeyError"):  # of a close look at one file
        blamed_with(lambda: {}["name"], wide=False)
    for broken in (Template("$name").substitute, check):  # a library that met the file's content, and a check of ours
        with pytest.raises(EngineError, match=r"E4\.16"):
            blamed_with(broken)
