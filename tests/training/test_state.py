"""What the loop counts, and that a checkpoint gives it back."""

from __future__ import annotations

import json

import pytest

from engine.training.state import TrainerState, Update, Window


def test_skipped_windows_use_up_data_but_are_no_steps():
    state = TrainerState()
    window = Window([], 1, 1, [])
    for applied in (True, False, True):
        state.advance(window, Update(1.0, 1.0, 0.1, applied), updates_per_epoch=2)
    assert (state.step, state.epoch, state.window, state.skipped, state.skipped_in_a_row) == (2, 1, 1, 1, 0)


def test_padding_is_counted_by_part_and_over_all():
    state = TrainerState()
    assert state.padding_shares() == {"padding_share": 0.0}
    for _ in range(2):
        state.count_cells(Window([], 1, 1, [], cells=(8, 2), padding=(2, 1)))
    assert state.padding_shares() == {
        "padding_share": 0.3, "source_padding_share": 0.25, "target_padding_share": 0.5,
    }  # fmt: skip


def test_a_checkpoint_gives_the_counts_back_to_the_bit():
    state = TrainerState(step=3, best_value=0.1 + 0.2, interval_all_tokens=7, stop_reason="done")
    assert TrainerState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_counts_under_a_former_name_are_read_and_unknown_ones_refused():
    former = TrainerState.from_dict({"step": 3, "interval_cells": 7})
    assert former == TrainerState(step=3, interval_all_tokens=7, row_order=1), "and their rows go on in their order"
    with pytest.raises(TypeError, match="colour"):
        TrainerState.from_dict({"step": 3, "colour": "red"})
    with pytest.raises(ValueError, match="row_order 3 is not known"):
        TrainerState.from_dict({"row_order": 3})


def test_patience_goes_on_unless_the_best_is_gone():
    """Two NaN evaluations count after a resume too; a best that is lost, or of another scale, begins anew."""
    never = TrainerState(step=4, evaluations_without_gain=2)
    assert never.with_best(None) == never
    known = TrainerState(step=4, best_step=2, best_value=1.5, evaluations_without_gain=2)
    best = {"step": 2, "metric": "loss", "value": 1.5}
    assert known.with_best(best) == known
    lost = known.with_best(None)
    assert (lost.best_step, lost.best_value, lost.evaluations_without_gain) == (None, None, 0)
