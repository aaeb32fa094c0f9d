"""What the training loop shows: the bar and the lines count the same updates, skipped ones too."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from engine.recipe.schema import Evaluation
from engine.runtime import console
from engine.training.progress import Progress, Schedule
from engine.training.state import TrainerState, Update, Window

RUNTIME = SimpleNamespace(show_progress=True, is_main=True)
PER_EPOCH = 5


@pytest.mark.parametrize("by_epochs", [True, False])
@pytest.mark.parametrize("bar", [True, False])
def test_skipped_updates_leave_bar_and_line_together(monkeypatch, caplog, by_epochs, bar):
    """Of ten updates two overflow: two epochs then make eight, and a run of ten updates tries twelve windows."""
    monkeypatch.setattr(console, "draws_bars", lambda: bar)
    caplog.set_level(logging.INFO)
    settings = Evaluation(strategy="no")
    plan = Schedule.of(settings, updates=10, per_epoch=PER_EPOCH, dev_rows=0, test_rows=0, by_epochs=by_epochs)
    state, progress, seen = TrainerState(), Progress(RUNTIME, plan), []
    for number in range(10 if by_epochs else 12):
        window, update = Window([], 5, 9, []), Update(1.0, 1.0, 1e-3, applied=number not in (1, 3))
        state.advance(window, update, updates_per_epoch=PER_EPOCH)
        progress.update(state.step, window, update, 0.1)
        if not update.applied:
            continue
        if bar:
            seen.append(f"{progress.bar.tqdm.n}/{progress.bar.tqdm.total}")
        else:
            seen.append(next(part for part in caplog.messages[-1].split("  ") if "step" in part).split()[1])
    progress.close()
    totals = [10, 9, *[8] * 6] if by_epochs else [10] * 10
    assert seen == [f"{step}/{total}" for step, total in enumerate(totals, start=1)]
    epochs = (10 if by_epochs else 12) / PER_EPOCH
    assert bar or f"epoch {epochs:.2f}" in caplog.messages[-1] and "ETA 0" in caplog.messages[-1]
