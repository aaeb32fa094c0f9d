"""A training run in a process of its own, as sweeps and folds start it: resumed where it was, its output in a log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from screen import reason

from engine.errors import STOPPED_SAVED, STOPPED_UNSAVED, EngineError
from engine.runtime.atomic import without_links
from engine.runtime.process import ENDS_WITH_PARENT
from engine.runtime.run_status import read_status
from engine.runtime.signals import Stopped

if TYPE_CHECKING:
    from engine.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
GOES_ON = "the same command goes on"
_STOPPED = {STOPPED_SAVED, STOPPED_UNSAVED, -signal.SIGTERM, -signal.SIGINT}


class Failed(Exception):
    """A run that came to no score; the reason is its text."""


def refuse_code(recipe: Recipe) -> None:
    """Raises: EngineError E2.86 for a recipe that names code, which nobody allowed: each of its trainings would end."""
    if any(":" in name for name in recipe.evaluation.extra_metrics):
        what = "sweeps and folds run no code that a recipe names"
        raise EngineError("E2.86", what, "evaluation.extra_metrics", "leave it out; bertscore may stay")


def train(
    run: Path, recipe: str, overrides: Sequence[str], gpu: str | None, follow: Callable[[subprocess.Popen[bytes]], int]
) -> None:
    """Train in the folder `run` until the end, from its newest checkpoint where there is one; `<run>.log` is the output.

    Args:
        gpu: what CUDA_VISIBLE_DEVICES is set to; None leaves it alone.
        follow: waits for the process; its exit code.

    Raises:
        Failed: with the run's own reason.
        Stopped: where a signal stopped it.
    """
    log = run.with_name(f"{run.name}.log")
    command = [sys.executable, str(ROOT / "engine" / "train.py"), recipe, *overrides]
    command += ["--resume", "auto", f"experiment.output_dir={run}"]
    environment = os.environ | {ENDS_WITH_PARENT: "1"} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    while True:
        with open(log, "w", encoding="utf-8", opener=without_links) as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        code = follow(process)
        if code != 2 or "error E2.30" not in log.read_text(encoding="utf-8", errors="replace"):
            break
        time.sleep(1)  # the process of a call that was killed is still saving there
    if code in _STOPPED:
        raise Stopped(f"{run.name} was stopped; {GOES_ON}", saved=code == STOPPED_SAVED)
    if code:
        status = read_status(run) or {}
        raise Failed(" ".join(status["reason"].split()) if status.get("code") == code else reason(code, log, None))
