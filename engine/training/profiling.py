"""Where a run's time goes (`runtime.profile`): its shares by phase, a torch.profiler trace of a few updates, a page of both.

The loop knows nothing of it. The job of a profiled run keeps a clock, and an update names its phases by calls that it makes
anyway: moving a batch begins the forward pass, scaling the loss the backward pass, unscaling gradients the optimizer's work.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.runtime.atomic import write_text_atomically
from engine.runtime.console import duration
from engine.runtime.run_folder import refuse_link
from engine.training.job import Job

if TYPE_CHECKING:
    from engine.training.state import Update, Window

PHASES = ("data", "forward", "backward", "optimizer", "waiting", "evaluation", "saving", "profiling", "other")
_WARM_UP, _TRACED = 5, 2  # updates of this process that are left alone, and that are traced after them
_MOST_BATCHES = 8  # micro-batches of a trace: its size does not grow with accumulation
_OPERATORS = 20  # on the page
_TRACE, _PAGE = "trace.json.gz", "summary.txt"


class PhaseClock:
    """Seconds by phase. Exactly one phase runs at any time, so they add up to the time that has passed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.phase, self.since = "other", time.perf_counter()

    def enter(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def read(self) -> dict[str, float]:
        """Seconds of all PHASES until now."""
        self.enter(self.phase)
        return {phase: self.seconds[phase] for phase in PHASES}


class ProfiledJob(Job):
    """The main rank's job under `runtime.profile`. On a GPU each phase waits for the device, which costs a little overlap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clock_of_phases = PhaseClock()
        self.in_update = False
        self.updates = self.batches = 0  # of this process; of the trace
        self.trace: profile | None = None  # while it is recorded
        self.annotation: record_function | None = None
        self.operators = ["no update was traced: the run was over before"]
        ranks = self.runtime.ranks
        self._mark(self.runtime, "to_device", "forward")
        self._mark(self.scaler, "scale", "backward")
        self._mark(self.scaler, "unscale_", "optimizer")
        self._mark(ranks, "sum_across_ranks", "waiting", then="optimizer")

    def load_window(self, epoch: int, index: int) -> Window:
        if self.updates == _WARM_UP:
            self._start_trace()
        self.in_update = True
        self._begin("data")
        return super().load_window(epoch, index)

    def log_update(self, window: Window, update: Update) -> None:
        self._begin("other")
        self.in_update = False
        super().log_update(window, update)
        self.updates += 1
        if self.updates == _WARM_UP + _TRACED:
            self._end_trace()

    def evaluate(self) -> None:
        self._end_trace()  # or it would grow with the rows that are decoded
        with self.clock_of_phases.within("evaluation"):
            super().evaluate()

    def save(self) -> None:
        self._end_trace()
        with self.clock_of_phases.within("saving"):
            super().save()

    def answer_signals(self) -> None:
        with self.clock_of_phases.within("waiting"):
            super().answer_signals()

    def time_shares(self) -> dict[str, float]:
        self._end_trace()
        return self._write_page()

    # Phases

    def _mark(self, owner: Any, name: str, phase: str, then: str | None = None) -> None:
        """Have a call begin a phase of the update that makes it, and its end the phase `then`."""
        call = getattr(owner, name)

        def marked(*arguments: Any, **settings: Any) -> Any:
            if not self.in_update:  # of an evaluation
                return call(*arguments, **settings)
            self._begin(phase)
            result = call(*arguments, **settings)
            if then is not None:
                self._begin(then)
            return result

        setattr(owner, name, marked)

    def _begin(self, phase: str) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        self.batches += self.trace is not None and phase == "forward"
        if self.batches > _MOST_BATCHES:
            self._end_trace()
        if self.trace is not None:
            self._annotate(phase)
            phase = "profiling"  # what is recorded is slower than the rest
        self.clock_of_phases.enter(phase)

    def _annotate(self, phase: str | None) -> None:
        """Name what follows in the trace."""
        if self.annotation is not None:
            self.annotation.__exit__(None, None, None)
        self.annotation = None if phase is None else record_function(phase).__enter__()

    # Trace

    def _start_trace(self) -> None:
        with self._apart():
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self.runtime.device.type == "cuda" else []
            self.trace = profile(activities=activities)
            self.trace.start()

    def _end_trace(self) -> None:
        """Stop, write the trace, and the page as far as it is known: a run that is stopped later keeps both."""
        if self.trace is None:
            return
        with self._apart():
            self._annotate(None)
            trace, self.trace = self.trace, None
            trace.stop()
            self.operators = _operators(trace, self.state.step, on_gpu=self.runtime.device.type == "cuda")
            folder = self._folder()
            with tempfile.TemporaryDirectory(
                prefix=".tmp-", dir=folder
            ) as own:  # the profiler follows links, we do not
                trace.export_chrome_trace(str(Path(own, _TRACE)))
                os.replace(Path(own, _TRACE), folder / _TRACE)
        self._write_page()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Work that is no part of the update around it."""
        started = time.perf_counter()
        with self.clock_of_phases.within("profiling"):
            yield
        self.clock += time.perf_counter() - started

    def _folder(self) -> Path:
        folder = self.run_dir / "profile"
        refuse_link(folder)
        folder.mkdir(exist_ok=True)
        return folder

    def _write_page(self) -> dict[str, float]:
        """Write profile/summary.txt; returns the shares of the time so far."""
        seconds = self.clock_of_phases.read()
        total = sum(seconds.values())
        shares = {phase: value / total for phase, value in seconds.items()}
        ranks = f"rank 0 of {self.runtime.world_size}" if self.runtime.world_size > 1 else str(self.runtime.device)
        lines = [
            f"{self.run_dir.name}: {duration(total)} of training on {ranks}, up to step {self.state.step}",
            "",
            *(f"{phase:12}{share:7.1%}{seconds[phase]:10.1f} s" for phase, share in shares.items()),
            "",
            "waiting: for other ranks, outside the backward pass, which the exchange of gradients is a part of",
            "profiling: the traced updates, and writing the trace",
            "",
            *self.operators,
        ]
        write_text_atomically(self._folder() / _PAGE, "\n".join(lines) + "\n")
        return shares


def _operators(trace: profile, step: int, *, on_gpu: bool) -> list[str]:
    """The operators that took longest by themselves, without what they call."""
    place = "device" if on_gpu else "cpu"
    time_of = f"self_{place}_time_total"  # microseconds
    events = [event for event in trace.key_averages() if event.key not in PHASES]
    events.sort(key=lambda event: -getattr(event, time_of))
    total = max(1e-9, sum(getattr(event, time_of) for event in events))
    lines = [
        f"operators of the updates before step {step}, by {place} time of their own ({_TRACE}: open it in ui.perfetto.dev)",
        f"{'calls':>9}{'ms':>12}{'share':>8}  operator",
    ]
    for event in events[:_OPERATORS]:
        spent = getattr(event, time_of)
        lines.append(f"{event.count:9,}{spent / 1000:12.1f}{spent / total:8.1%}  {event.key[:80]}")
    return lines
