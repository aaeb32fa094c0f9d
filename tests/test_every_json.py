"""A wrong value in any JSON file of a model, adapter or run folder is told in one line, under the folder's own exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import wrong_json

FULL = "FULL_TESTS" in os.environ
SEED = os.environ.get("WRONG_JSON_SEED", "0")
SAMPLE = [] if FULL else ["--sample", "12"]  # of as many files; all cases take hours on a small machine


@pytest.mark.slow
def test_no_wrong_value_ends_in_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, wrong_json.__file__, str(tmp_path / "work"), "--seed", SEED, *SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=None if FULL else 900, check=False)
    print(done.stderr[-300:])  # the seed, and how many cases it was
    assert done.returncode == 0 and " 0 findings" in done.stderr, done.stdout[-5000:] + done.stderr[-2000:]


def test_places_are_found_at_every_depth() -> None:
    value = {"a": [1, {"b": 2}], "c": {}}
    assert list(wrong_json.places(value)) == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    assert len(list(wrong_json.places(list(range(1000))))) == 4


@pytest.mark.parametrize(
    ("wrong", "text"),
    [("removed", '{"a": [1]}'), ("nan", '{"a": [1, NaN]}'), ("half character", r'{"a": [1, "\ud800"]}')],
)
def test_a_wrong_value_is_put_in_its_place(wrong: str, text: str) -> None:
    assert wrong_json.with_wrong({"a": [1, 2]}, ("a", 1), wrong) == text


def test_the_judge_lets_only_one_line_of_the_right_code_pass() -> None:
    case = wrong_json.Case("bart", "config.json", (), "x")
    good = {"code": 4, "reason": "error E4.9: no"}
    assert wrong_json.fault(case, {"code": 0}) is None and wrong_json.fault(case, good) is None
    for change in ({"code": 1}, {"reason": "a\nb"}, {"reason": "x" * 501}, {"reason": "\ud800"}):
        assert wrong_json.fault(case, good | change), change


def test_a_child_that_hangs_dies_or_eats_memory_is_told() -> None:
    """Forked from a process of its own: this one may have threads."""
    code = (
        "import os, sys, wrong_json as w\n"
        "w._SECONDS = 1\n"
        "def hang():\n    while True: pass\n"
        "def eat():\n"
        "    try:\n        return {'code': len(bytearray(8 << 30))}\n"
        "    except MemoryError:\n        return {'code': 8, 'reason': 'memory'}\n"
        "for do in (hang, eat, lambda: os._exit(3), lambda: {'code': 0}):\n"
        "    print(w.in_child(do))\n"
    )
    folder = str(Path(wrong_json.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert (
        "not done in 1 s" in lines[0] and "'code': 8" in lines[1] and "died" in lines[2] and lines[3] == "{'code': 0}"
    )
