"""How far a run is and how long it will take: a bar on a terminal, elsewhere some thirty lines a run."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.runtime import console
from engine.runtime.console import duration, pace

if TYPE_CHECKING:
    from engine.recipe.schema import Evaluation
    from engine.runtime.process import Runtime
    from engine.training.state import Update, Window

log = logging.getLogger("engine.train")
_LINES = 30  # lines of a run, beside those of its evaluations
_RECENT = 50  # updates that loss, pace and ETA are measured on
_LONGEST_SILENCE = 300.0  # seconds
_FIRST_LINE = 15.0  # seconds; early, because it brings the first estimate of the run's time


@dataclass(frozen=True)
class Schedule:
    """What a run has ahead of it: updates, evaluations between them, rows to decode at its end."""

    updates: int  # to be tried in its epochs, or to be made where their number is given
    per_epoch: int
    evaluate_every: int | None  # updates; None: never
    dev_rows: int = 0
    test_rows: int = 0
    by_epochs: bool = True

    @classmethod
    def of(
        cls, settings: Evaluation, *, updates: int, per_epoch: int, dev_rows: int, test_rows: int, by_epochs: bool
    ) -> Schedule:
        every = {"epoch": per_epoch, "steps": settings.steps}.get(settings.strategy) if dev_rows else None
        return cls(updates, per_epoch, every, dev_rows, test_rows, by_epochs)

    def evaluations(self, after: int) -> int:
        """Evaluations that come later than the one at update `after`; the last update is always evaluated."""
        if self.evaluate_every is None or after >= self.updates:
            return 0
        return math.ceil(self.updates / self.evaluate_every) - after // self.evaluate_every


class Progress:
    """What the main rank shows of the training loop.

    Args:
        done: updates that a resumed run has made.
        windows: those that it has tried; some may have been skipped.
    """

    def __init__(self, runtime: Runtime, schedule: Schedule, *, done: int = 0, windows: int = 0) -> None:
        self.schedule, self.done, self.windows = schedule, done, windows
        self.recent: deque[tuple[float, int, float, int]] = deque(
            maxlen=_RECENT
        )  # seconds, all tokens, loss sum, tokens
        self.warming_up = True
        self.seconds_per_row: float | None = None  # of the last evaluation
        self.shown = runtime.show_progress and runtime.is_main
        self.told_at, self.told, self.begun = time.perf_counter(), done, done
        self.bar = None
        if self.shown:
            self._start()
        if self.shown and console.draws_bars():
            self.bar = console.Bar(total=self.total, initial=done, desc="train")

    @property
    def total(self) -> int:
        """Updates that the run will have made at its end: epochs do not make up for one that was skipped."""
        plan = self.schedule
        return self.done + max(0, plan.updates - self.windows) if plan.by_epochs else plan.updates

    def _start(self) -> None:
        plan = self.schedule
        left = plan.evaluations(self.windows)
        parts = [f"{plan.updates:,} updates in {plan.updates / plan.per_epoch:.3g} epochs"]
        parts += [f"{left} evaluations of {plan.dev_rows:,} rows to come"] if left else []
        parts += [f"{self.done:,} updates are done"] if self.done else []
        log.info("%s", "; ".join(parts))

    def update(self, step: int, window: Window, update: Update, seconds: float) -> None:
        """Count one window; `step` is the number of updates made, `seconds` what this one took."""
        if self.warming_up and self.recent:
            self.recent.clear()  # the first update also pays for compiled kernels and memory pools
            self.warming_up = False
        made, self.done, self.windows = step - self.done, step, self.windows + 1
        tokens = window.tokens if update.applied else 0
        self.recent.append((seconds, window.all_tokens, update.loss * tokens if tokens else 0.0, tokens))
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.tqdm.total = self.total
            self.bar.update(made, self._bar_fields(update))
        elif self._line_due():
            self.told, self.told_at = self.done, time.perf_counter()
            log.info("%s", "  ".join([f"step {step}/{self.total}", *self._line_fields(update)]))

    def _line_due(self) -> bool:
        silent = time.perf_counter() - self.told_at
        count = self.done - self.told
        first = self.told == self.begun and count >= 3 and silent > _FIRST_LINE
        due = count >= math.ceil(self.schedule.updates / _LINES) or silent > _LONGEST_SILENCE
        return due or first or self.done >= self.total

    def _measured(self) -> tuple[float, float, float]:
        """Updates a second, tokens a second, loss per token, over the last updates."""
        seconds, all_tokens, loss, tokens = map(sum, zip(*self.recent, strict=True))
        seconds = max(seconds, 1e-9)
        return len(self.recent) / seconds, all_tokens / seconds, loss / tokens if tokens else math.nan

    def _bar_fields(self, update: Update) -> list[str]:
        """The most important first: a narrow terminal shows no more than it holds."""
        updates, tokens, loss = self._measured()
        epoch = self.windows / self.schedule.per_epoch
        rest = [f"epoch {epoch:.2f}", f"lr {update.learning_rate:.1e}", f"{tokens:,.0f} tokens/s"]
        return [f"ETA {self.eta()}", f"loss {loss:.3f}", pace(updates), *rest]

    def _line_fields(self, update: Update) -> list[str]:
        _, tokens, loss = self._measured()
        epoch = self.windows / self.schedule.per_epoch
        where = [f"epoch {epoch:.2f}", f"loss {loss:.4f}", f"lr {update.learning_rate:.2e}"]
        return [*where, f"{tokens:,.0f} tokens/s", f"ETA {self.eta()}"]

    def eta(self) -> str:
        """Time to the run's end, evaluations and the decoding of the test rows counted in; ">" while they are unmeasured."""
        plan = self.schedule
        left = max(0, self.total - self.done) / self._measured()[0]
        # The evaluation that is due at this very update has not run yet.
        rows = plan.evaluations(self.windows - 1) * plan.dev_rows + plan.test_rows
        if self.seconds_per_row is None:
            return f"{'>' if rows else ''}{duration(left)}"
        return duration(left + rows * self.seconds_per_row)

    # Evaluations

    def evaluating(self, step: int, split: str, rows: int) -> None:
        """Before the rows are decoded. On a terminal the decoding's own bar says it."""
        if self.bar is None and self.shown:
            known = self.seconds_per_row
            about = "" if known is None else f", about {duration(rows * known)}"
            log.info("step %d  evaluating %d %s rows%s", step, rows, split, about)

    def evaluated(self, rows: int, seconds: float) -> None:
        self.seconds_per_row = seconds / max(1, rows)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
