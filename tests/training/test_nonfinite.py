"""Numbers that go wrong end the run before they are saved, or are skipped on request, but not for ever."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from engine.errors import EngineError
from engine.recipe.schema import Training
from engine.training import nonfinite
from engine.training.state import TrainerState, Update, Window


def test_skipping_for_ever_ends_the_run():
    training = Training(max_skipped_updates=3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainerState()
    skipped = Update(loss=math.nan, grad_norm=math.nan, learning_rate=0.0, applied=False)
    for _ in range(3):
        state.advance(Window([], 1, 1, []), skipped, updates_per_epoch=100)
        nonfinite.check_skipping(state, scaler, training)
    state.advance(Window([], 1, 1, []), skipped, updates_per_epoch=100)
    with pytest.raises(EngineError, match="4 updates in a row") as caught:
        nonfinite.check_skipping(state, scaler, training)
    assert caught.value.exit_code == 7


def test_a_collapsed_scale_ends_the_run():
    scaler = torch.amp.GradScaler("cpu", init_scale=0.25)
    with pytest.raises(EngineError, match="fell to 0.25"):
        nonfinite.check_skipping(TrainerState(), scaler, Training())


@pytest.mark.parametrize(("loss", "policy", "fp16", "ends"), [
    (math.nan, "abort", False, True), (math.inf, "abort", False, True), (1.0, "abort", False, False),
    (None, "abort", False, False), (math.nan, "skip", False, False), (math.nan, "abort", True, False),
])  # fmt: skip
def test_a_dev_loss_that_is_no_number_ends_the_run_unless_it_may_come_back(loss, policy, fp16, ends):
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    with pytest.raises(EngineError, match=r"E7\.4") if ends else nullcontext():
        nonfinite.check_evaluation(loss, 3, scaler, Training(on_nonfinite=policy))


def test_broken_weights_are_not_saved():
    model = torch.nn.Linear(3, 2)
    nonfinite.check_weights(model, 4)
    model.weight.data[0, 0] = math.inf
    with pytest.raises(EngineError, match=r"E7\.3.*after step 4"):
        nonfinite.check_weights(model, 4)
    model.requires_grad_(False)
    nonfinite.check_weights(model, 4)  # a frozen base is not ours to judge
