"""Parameter groups, optimizers, and learning-rate schedules counted in optimizer updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.errors import EngineError
from engine.models import sharding

if TYPE_CHECKING:
    from engine.recipe.schema import Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: decayed, and biases and normalisation weights, which are not.

    One-dimensional parameters are the biases and the norms of the models trained here (LayerNorm, RMSNorm); T5's table of
    relative attention biases is a bias with two dimensions, recognised by its name.
    """
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if parameter.ndim < 2 or "bias" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict[str, Any]], training: Training, device: torch.device, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) by torch, or one of bitsandbytes' with 8-bit or paged state.

    Args:
        fused: torch's AdamW in one kernel for each group; see `may_fuse`.

    Raises:
        EngineError: E2 when a paged optimizer is asked for without CUDA, whose unified memory it lives in.
    """
    settings = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    if training.optim == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=fused or None)
    if training.optim.startswith("paged") and device.type != "cuda":
        what = f"training.optim: {training.optim} keeps its state in CUDA unified memory, and this run has no GPU"
        raise EngineError("E2.20", what, f"device {device}", "set training.optim=adamw or adamw_8bit")
    import bitsandbytes

    factories = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return factories[training.optim](groups, **settings)


def may_fuse(model: nn.Module, precision: str, device: torch.device) -> bool:
    """Whether AdamW's step may be one fused kernel: where that was measured to be faster, and is known to be safe.

    On CPUs only (`tools/bench/optim.py`; no GPU has been measured). Never under fp16, where GradScaler cannot see whether a
    fused step was skipped; and not for parts of a sharded model.
    """
    return device.type == "cpu" and precision != "fp16" and not sharding.is_sharded(model)


def as_saved(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of an optimizer whose step this run can take; its groups and `optimizer`'s then agree in `fused`.

    A fused step rounds differently, so a resumed run keeps the kernel of its checkpoint: of an earlier version's, too.
    Raises: ValueError for a `fused` that is none.
    """
    groups = []
    for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if "fused" in own:
            if group["fused"] is not None and group["fused"] is not True:
                raise ValueError("optimizer.param_groups: fused is neither true nor null")
            own["fused"] = own["fused"] and group["fused"]
            group = group | {"fused": own["fused"]}
        groups.append(group)
    return dict(saved) | {"param_groups": groups}


def check_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Raises: ValueError for moments that the optimizer would only stumble over in its next update.

    Libraries with 8-bit moments keep other things for large parameters than for small ones; of those only the kind is known.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    if [group["params"] for group in saved["param_groups"]] != ids:
        raise ValueError("the optimizer's groups hold other parameters")
    for index, moments in saved["state"].items():
        shape = parameters[index].shape
        for name, value in moments.items():
            values = (
                value.values() if isinstance(value, Mapping) else [value]
            )  # bitsandbytes keeps its 8-bit parts in one
            if not all(isinstance(part, torch.Tensor | int | float) for part in values):
                raise ValueError(f"optimizer.{index}.{name} is no number")
        if not isinstance(optimizer, torch.optim.AdamW):
            continue
        kept = {name: value.shape for name, value in moments.items() if isinstance(value, torch.Tensor)}
        if kept != {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError(f"optimizer.{index} holds {kept} for a parameter of shape {tuple(shape)}")


def total_updates(training: Training, updates_per_epoch: int) -> int:
    """Updates the schedule is laid out for: `max_steps`, or the epochs' windows."""
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * updates_per_epoch))


def warmup_updates(training: Training, total_updates: int) -> int:
    """Updates of linear warm-up: `warmup_steps` if set, else `warmup_ratio` of the total, rounded up."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return math.ceil(training.warmup_ratio * total_updates)


def build_schedule(
    optimizer: torch.optim.Optimizer, training: Training, total_updates: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate as a function of the number of updates made, independent of ranks and accumulation.

    The schedule is stepped once after each update that was really made, and is not given to Accelerate, whose wrapper would
    step it once per process. The factors are those of transformers' `get_scheduler`.
    """
    warmup = warmup_updates(training, total_updates)
    kind = training.lr_scheduler_type

    def factor(update: int) -> float:
        if kind != "constant" and update < warmup:
            return update / max(1, warmup)
        progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
        if kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if kind == "linear":
            return 1.0 - progress
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
