"""What a training run does when numbers go wrong: non-finite losses and gradients, windows with nothing to learn."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from torch import nn

from engine.errors import EngineError
from engine.models.sharding import full

if TYPE_CHECKING:
    import torch

    from engine.recipe.schema import Training
    from engine.training.state import TrainerState, Window

log = logging.getLogger("engine.train")
_ADVICE = "lower training.learning_rate, or set training.on_nonfinite=skip"
_NOT_SAVED = "earlier checkpoints are untouched, and this state is not saved"
SMALLEST_SCALE = 1.0  # below this, fp16 gradients overflow without any scaling: the model, not the scale, is at fault


def check_finite(loss: float, norm: float, window: Window, scaler: torch.amp.GradScaler, training: Training) -> bool:
    """May the optimizer touch the weights? All ranks see the same numbers, so all ranks answer alike.

    Raises:
        EngineError: E7.1 for a NaN or an infinity under fp32 and bf16, unless the recipe says to skip it. Under fp16 an
            overflow is ordinary; the scaler skips it.
    """
    if window.tokens == 0:
        log.warning("no supervised token in this window, no update made (rows %s)", _some(window.ids))
        return False
    if scaler.is_enabled() or (math.isfinite(loss) and math.isfinite(norm)):
        return True
    text = f"loss {loss}, gradient norm {norm} in the window of rows {_some(window.ids)}"
    if training.on_nonfinite == "abort":
        raise EngineError("E7.1", text, "before the update", _ADVICE, safe="weights and checkpoints are untouched")
    log.warning("%s: update skipped", text)
    return False


def check_skipping(state: TrainerState, scaler: torch.amp.GradScaler, training: Training) -> None:
    """Raises: EngineError E7.2 when updates are skipped again and again: the run would go on without learning."""
    collapsed = scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE
    if not collapsed and state.skipped_in_a_row <= training.max_skipped_updates:
        return
    what = f"{state.skipped_in_a_row} updates in a row were skipped, more than training.max_skipped_updates"
    if collapsed:
        what = f"the fp16 loss scale fell to {scaler.get_scale():g}"
    raise EngineError(
        "E7.2", what, f"after step {state.step}", "use training.precision=bf16 or fp32, or lower training.learning_rate"
    )


def check_evaluation(loss: float | None, step: int, scaler: torch.amp.GradScaler, training: Training) -> None:
    """Raises: EngineError E7.4 for a NaN or infinite dev loss under fp32 and bf16, unless the recipe says to go on."""
    if loss is None or math.isfinite(loss) or scaler.is_enabled() or training.on_nonfinite != "abort":
        return
    raise EngineError("E7.4", f"the dev loss is {loss}", f"after step {step}", _ADVICE, safe=_NOT_SAVED)


def check_weights(model: nn.Module, step: int) -> None:
    """No checkpoint of broken weights: resumed, it could only break again. Ranks hold the same weights and answer alike.

    Raises: EngineError: E7.3 for a NaN or an infinity among the trainable weights, as after an update with an absurd rate.
    """
    trainable = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    largest = float(full(nn.utils.get_total_norm(trainable, norm_type=math.inf)))
    if not math.isfinite(largest):
        advice = "lower training.learning_rate, or set training.max_grad_norm"
        raise EngineError("E7.3", f"the weights hold {largest}", f"after step {step}", advice, safe=_NOT_SAVED)


def _some(ids: list[str], most: int = 16) -> str:
    return ", ".join(ids[:most]) + (f", and {len(ids) - most} more" if len(ids) > most else "")
