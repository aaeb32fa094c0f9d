"""Signals through real launchers: the run ends saved, its status file is right, and no process stays behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import runs

from engine import train
from engine.checkpoints import manifest

SLOW_SAVE = """
import sys, time
sys.path.insert(0, {root!r})
from engine.runtime import atomic
from engine.runtime.exits import main_guard
from engine.train import main
atomic.fail_points.append(lambda point, path: time.sleep(30) if point == "before-manifest" else None)
sys.exit(main_guard(main))
"""
FULL = pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="minutes of launching; set FULL_TESTS=1")
pytestmark = pytest.mark.slow
ENDS_WITHIN = 10.0  # seconds, on an idle machine


class Launched:
    """A training run under a launcher, with all processes that belong to it."""

    def __init__(self, launcher: str, ranks: int, folder: Path, root: Path, *, script: Path | None = None) -> None:
        self.run_dir = folder / "run"
        changes = {"training__num_train_epochs": 10_000, "evaluation__strategy": "no", "checkpoint__strategy": "no"}
        recipe = runs.write_recipe(folder, rows=16, **changes)
        self.recipe, self.root = recipe, root
        self.command = [*_prefix(launcher, ranks), str(script or root / "engine" / "train.py"), str(recipe)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
        self.log = (folder / "output.log").open("w")
        self.process = subprocess.Popen(
            self.command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=root,
            start_new_session=True,
            preexec_fn=_heed_sigint,
        )
        self.await_(lambda: self.rows() >= 2, 120, "two updates")
        self.family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes that train: those without children of their own."""
        return [process for process in self.family if not process.children()]

    def rows(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def status(self) -> dict:
        return json.loads((self.run_dir / "run_status.json").read_text())

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in self.run_dir.glob("checkpoint-*"))

    def await_(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self.process.poll() is not None and what == "two updates"):
                self.stop()
                pytest.fail(f"no {what} within {seconds} s:\n{Path(self.log.name).read_text()[-3000:]}")
            time.sleep(0.02)

    def await_end(self, seconds: float = 3 * ENDS_WITHIN) -> None:
        """No process of the run may be left; machines that run tests are slow, hence the factor."""
        self.await_(lambda: not any(_runs(process) for process in self.family), seconds, "end of all processes")

    def stop(self) -> None:
        for process in [*self.family] if hasattr(self, "family") else []:
            if _runs(process):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


def _heed_sigint() -> None:
    """A shell starts its background jobs with SIGINT ignored; tests run in one would hand that on to the launcher."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _prefix(launcher: str, ranks: int) -> list[str]:
    python = sys.executable
    if launcher == "python":
        return [python]
    if launcher == "torchrun":
        return [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    prefix = [python, "-m", "accelerate.commands.launch", "--num_processes", str(ranks), "--num_machines", "1"]
    prefix += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*prefix, "--multi_gpu"] if ranks > 1 else prefix


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


CASES = [
    ("python", 1), ("torchrun", 1), ("torchrun", 2), ("accelerate", 1), ("accelerate", 2),
]  # fmt: skip
QUICK = {("python", 1, "INT"), ("torchrun", 2, "TERM"), ("accelerate", 1, "TERM")}


def _cases():
    for launcher, ranks in CASES:
        for kind in ("TERM", "INT"):
            quick = (launcher, ranks, kind) in QUICK
            yield pytest.param(launcher, ranks, kind, marks=() if quick else FULL)


def check_way_on(launched: Launched, ranks: int) -> None:
    """The last words say what is saved, and the next line is a command that goes on with it; the log has them too."""
    said = Path(launched.log.name).read_text().splitlines()
    at = next(number for number, line in enumerate(said) if line.endswith("; to go on:"))
    assert said[at] == f"saved {launched.run_dir}/{launched.status()['last_checkpoint']}; to go on:", said
    command = shlex.split(said[at + 1])
    script = next(number for number, word in enumerate(command) if word.endswith("engine/train.py"))
    assert (command[:script] == ["python"]) == (ranks == 1), command
    options = train.parse(command[script + 1 :])
    assert options.resume == "auto" and f"experiment.output_dir={launched.run_dir}" in options.overrides
    assert said[at + 1] in (launched.run_dir / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("launcher", "ranks", "kind"), list(_cases()))
def test_a_stop_saves_and_ends(tmp_path, root, launcher, ranks, kind):
    """The launcher gets the signal. `accelerate launch` with one process dies of it and leaves an orphan, which ends too."""
    launched = Launched(launcher, ranks, tmp_path, root)
    try:
        began = time.monotonic()
        launched.process.send_signal(getattr(signal, f"SIG{kind}"))
        launched.await_end()
        took = time.monotonic() - began
    finally:
        launched.stop()
    status = launched.status()
    assert status["code"] == 75 and status["resumable"], (status, Path(launched.log.name).read_text()[-2000:])
    assert launched.checkpoints() == [status["step"]] and status["last_checkpoint"] == f"checkpoint-{status['step']}"
    manifest.verify(launched.run_dir / status["last_checkpoint"])
    assert launched.process.returncode in ((75,) if launcher == "python" else (75, 1, -signal.SIGTERM, -signal.SIGINT))
    assert took < 3 * ENDS_WITHIN
    check_way_on(launched, ranks)
    assert not list(launched.run_dir.glob(".tmp-*")) and not (launched.run_dir / ".lock").exists()


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [pytest.param(*case, marks=() if case == ("torchrun", 2) else FULL) for case in CASES],
)
def test_usr1_saves_and_goes_on_and_one_rank_stops_all(tmp_path, root, launcher, ranks):
    """Sent to the last worker alone: the ranks agree, save one checkpoint, train on, then stop at the same step."""
    launched = Launched(launcher, ranks, tmp_path, root)
    try:
        worker = launched.workers[-1]
        worker.send_signal(signal.SIGUSR1)
        launched.await_(lambda: len(launched.checkpoints()) == 1, 30, "checkpoint")
        rows = launched.rows()
        launched.await_(lambda: launched.rows() > rows + 2, 30, "further updates")
        assert launched.status()["code"] is None
        worker.send_signal(signal.SIGTERM)
        launched.await_end()
    finally:
        launched.stop()
    status, steps = launched.status(), launched.checkpoints()
    assert status["code"] == 75 and len(steps) == 2 and steps[-1] == status["step"]


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [pytest.param(*case, marks=() if case == ("python", 1) else FULL) for case in CASES],
)
def test_a_second_stop_gives_up_at_once(tmp_path, root, launcher, ranks):
    """During a save that would take half a minute: the temporary folder goes, the code is 76."""
    script = tmp_path / "slow_save.py"
    script.write_text(SLOW_SAVE.format(root=str(root)))
    launched = Launched(launcher, ranks, tmp_path, root, script=script)
    try:
        for worker in launched.workers:
            worker.send_signal(signal.SIGTERM)
        launched.await_(lambda: bool(list(launched.run_dir.glob(".tmp-checkpoint-*"))), 30, "save under way")
        time.sleep(0.8)
        began = time.monotonic()
        for worker in launched.workers:
            worker.send_signal(signal.SIGTERM)
        launched.await_end()
        took = time.monotonic() - began
    finally:
        launched.stop()
    assert launched.status()["code"] == 76 and took < ENDS_WITHIN
    assert launched.checkpoints() == [] and not list(launched.run_dir.glob(".tmp-*"))
