"""The one GPU call: parts that fail, crash or hang stop no other; each is told by name; the plan fits its time."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
sys.path.append(str(BENCH))

import gpu as bench  # noqa: E402

FIGURES = "import json, pathlib; pathlib.Path(r'{out}/a.json').write_text(json.dumps({'x': {'y': 3.0}}))"
HANGS = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); open(r'{mark}', 'w').write(str(p.pid)); time.sleep(60)"

FULL = pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="minutes of benches; set FULL_TESTS=1")


def part(name, code, seconds=20.0, **more):
    return bench.Part(name, seconds, ("-c", code), **more)


def run(parts, tmp_path, *, limit=100.0, gpus=1):
    output, result = tmp_path / "results" / "gpu.json", {"commit": "abc"}
    well = bench.run_parts(parts, limit, gpus, dict(os.environ), result, output)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written == result and written["commit"] == "abc"
    return well, written["parts"]


def test_no_part_stops_another(tmp_path):
    mark = tmp_path / "pid"
    parts = [
        part("passes", FIGURES, goals=(("x/y", ">=", 2.0), ("x/y", "<=", 2.0), ("x/z", "<=", 2.0))),
        part("fails", "print('first'); raise SystemExit(3)"),
        part("crashes", "import os; os.abort()"),
        part("hangs", HANGS.replace("{mark}", str(mark)), seconds=2.0),
        part("leaves nothing", "pass"),
        part("breaks off", FIGURES + "; pathlib.Path(r'{out}/b.json').write_text('{')"),
        part("lacks", "pass", needs=("json", "no_such_module")),
        part("wide", "pass", gpus=2),
    ]
    started = time.monotonic()
    well, found = run(parts, tmp_path)
    assert not well and time.monotonic() - started < 30.0
    assert list(found) == [one.name for one in parts]
    assert {name: one["status"] for name, one in found.items()} == {
        "passes": "passed",
        "fails": "failed",
        "crashes": "failed",
        "hangs": "timed out",
        "leaves nothing": "failed",
        "breaks off": "failed",
        "lacks": "skipped",
        "wide": "skipped",
    }
    assert found["passes"]["figures"] == {"x": {"y": 3.0}} and found["passes"]["seconds"] > 0
    assert found["passes"]["goals"] == {"x/y >= 2.0": True, "x/y <= 2.0": False, "x/z <= 2.0": None}
    assert found["fails"]["log"] == ["first"] and found["crashes"]["reason"] == "killed by SIGABRT"
    assert found["lacks"]["reason"] == "not installed: no_such_module" and found["wide"]["reason"] == "needs 2 GPUs"
    assert not alive(int(mark.read_text())), "a part's children end with it"


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_missed_goals_and_skipped_parts_are_no_failures(tmp_path):
    parts = [part("slow", FIGURES, goals=(("x/y", "<=", 1.0),)), part("lacks", "pass", needs=("no_such_module",))]
    well, found = run(parts, tmp_path)
    assert well and found["slow"]["goals"] == {"x/y <= 1.0": False}


def test_time_is_shared_out_in_order(tmp_path, monkeypatch):
    """A part gets what it asks for or what is left; with less than the least it is not started."""
    given, clock = [], [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])

    def spend(one, seconds, *_):
        given.append((one.name, seconds))
        clock[0] += min(seconds, 50.0)  # none takes longer than this
        return {"status": "passed", "seconds": 0.0}

    monkeypatch.setattr(bench, "run_part", spend)
    parts = [part("a", "", 30.0), part("b", "", 90.0), part("c", "", 90.0), part("d", "", 90.0)]
    _, found = run(parts, tmp_path, limit=110.0)
    assert given == [("a", 30.0), ("b", 80.0), ("c", 30.0)]
    assert found["d"] == {"status": "skipped", "reason": "only 0 s of the limit were left", "seconds": 0.0}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_fits_ten_minutes_and_names_what_exists(device, root):
    parts = bench.plan(device, tiny=device == "cpu")
    assert sum(one.seconds for one in parts) <= 590.0 and len({one.name for one in parts}) == len(parts)
    for one in parts:
        files = [word for word in one.command if word.endswith(".py") or word.startswith("tests/")]
        assert files and all((root / word).exists() for word in files), one.name


def test_every_test_that_needs_a_gpu_belongs_to_a_part(root):
    marked = {path for path in (root / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text("utf-8")}
    marked -= {Path(__file__).resolve()}
    listed = {root / word for one in bench.plan("cuda", False) for word in one.command if word.startswith("tests/")}
    assert len(marked) >= 6
    assert all(listed & {path, path.parent} for path in marked), marked - listed


# What the next test runs; its skipped test is there to be told by name, and none of ours.
SUITE = """
import pytest
def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip(reason="could not import 'mecab'")
def test_lacking(): pass
"""


@pytest.mark.slow
def test_outcomes_of_tests_are_told_by_name(tmp_path):
    (tmp_path / "test_some.py").write_text(SUITE)
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "--junitxml={out}/tests.xml")
    one = bench.Part("tests", 60.0, (*options, str(tmp_path / "test_some.py")))
    _, found = run([one, bench.Part("none", 60.0, (*one.command, "-k", "lacking"))], tmp_path)
    told, none = found["tests"], found["none"]
    assert (
        told["status"] == "failed"
        and told["figures"]["passed"] == 1
        and any("assert False" in line for line in told["log"])
    )
    assert [name.rpartition(".")[2] for name in told["figures"]["failed"]] == ["test_bad"]
    assert list(told["figures"]["skipped"]) == ["could not import 'mecab'"]
    assert none["status"] == "skipped" and none["reason"] == "could not import 'mecab'"


def test_the_list_and_a_machine_without_a_gpu(tmp_path, monkeypatch, capsys):
    assert bench.main(["--list", "--only", "KoBART"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("KoBART" in line for line in lines)
    monkeypatch.setattr(bench, "about", lambda environment: {"gpus": [], "commit": None})
    output = tmp_path / "gpu.json"
    assert bench.main(["--output", str(output)]) == 4 and not output.exists()


def test_wheels_that_cannot_be_used_are_told_and_stop_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    monkeypatch.setattr(bench, "plan", lambda *_: [part("passes", FIGURES)])
    monkeypatch.setattr(bench, "about", lambda environment: {"gpus": [], "commit": None})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    output = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--wheels", str(tmp_path / "wheels"), "--output", str(output), "--commit", "abc"]
    assert bench.main(options) == 1
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["commit"] == "abc" and written["parts"]["passes"]["status"] == "passed"
    assert "broken" in written["unusable_wheels"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=FULL) for name in ("KoBART trains", "Qwen3-4B trains", "Qwen3-4B decodes")),
        "KoBART decodes",
    ],
)
def test_each_bench_runs_on_toys(tmp_path, name):
    """So that the first call on a GPU does not die of a typo; `tests of ...` run as tests, on a CPU by TEST_DEVICE=cpu."""
    output = tmp_path / "gpu.json"
    code = bench.main(["--device", "cpu", "--tiny", "--only", name, "--output", str(output)])
    (found,) = json.loads(output.read_text(encoding="utf-8"))["parts"].values()
    assert code == 0 and found["status"] == "passed", found
    assert found["figures"] and all(
        type(reached) is bool for goal, reached in found["goals"].items() if "graphs" not in goal
    )
