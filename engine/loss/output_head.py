"""The loss behind an output head, piece by piece: of its N x V logits only a few rows exist at any time.

With a vocabulary of 150,000 the logits, their probabilities and gradients outweigh the rest of a training step. The gradient
of a cross-entropy is known as soon as its logits are (softmax minus target), so each piece of rows gives its share of the
loss and of all gradients before the next piece overwrites it.

Shapes: N supervised positions, D hidden, V vocabulary, n positions of one piece.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("engine.train")
PIECE = 1 << 24  # logits of one piece: 64 MiB in float32
_tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # head -> whether its form is known


@dataclass(frozen=True)
class HeadForm:
    """What a family makes of its head's output z (n, V): `cap * tanh(scale * (z + bias) / cap)`.

    Bart and its relatives add a bias, Cohere and Granite scale, Gemma 2 caps; for most families nothing of it is there.
    """

    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> HeadForm:
        """Read from a transformers model, PEFT's wrapper around it included."""
        config = model.config.get_text_config()
        bias = getattr(model, "final_logits_bias", None)
        scale = getattr(model, "logit_scale", None)
        if scale is None:
            scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(None if bias is None else bias.reshape(-1), scale, cap)

    def logits(self, z: Tensor) -> Tensor:
        """Logits (n, V), at least float32, from the head's output."""
        logits = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def slope(self, slope: Tensor, logits: Tensor) -> Tensor:
        """From the loss's gradient by the logits to the one by the head's output, in place; all (n, V)."""
        if self.cap is not None:
            slope *= 1.0 - (logits / self.cap).square()
        return slope if self.scale == 1.0 else slope.mul_(self.scale)


def known(head: nn.Module) -> bool:
    """Whether the head may be taken apart: not found otherwise by `confirm` before."""
    return _tried.get(head, True)


def confirm(model: nn.Module, head: nn.Module, hidden: Tensor, logits: Tensor) -> bool:
    """Hold one position's logits as the model computed them (1, V) against `HeadForm`'s; once for each head.

    A model that does something else with its head's output trains on whole logits, as any model could, and is told so.
    """
    if head in _tried or not len(hidden):
        return known(head)
    with torch.no_grad():
        ours = HeadForm.of(model).logits(head.forward(hidden))
        theirs = logits.reshape(-1, logits.shape[-1]).to(ours.dtype)
        exact = hidden.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(hidden.device.type)
        tolerance = (1e-5 if exact else 0.03) * theirs.abs().max()
        _tried[head] = ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)
    if not _tried[head]:
        log.warning(
            "%s computes its logits in a way of its own: the loss needs them whole, %d tokens wide",
            type(model).__name__,
            logits.shape[-1],
        )
    return _tried[head]


def cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    model: nn.Module,
    head: nn.Module,
    label_smoothing: float,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of N positions, a scalar of at least float32, that never holds N x V logits.

    Args:
        hidden: (N, D), what the head is applied to.
        targets: (N,), token ids.
        label_smoothing: as of torch's `cross_entropy`.
        weight: the head's, where its gradient is to go through a tensor of the same values (`tied_lookup`).
    """
    form = HeadForm.of(model)
    if type(head) is not nn.Linear or (head.bias is not None and form.bias is not None):
        return _recomputed(hidden, targets, head, form, label_smoothing)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    bias = form.bias if head.bias is None else head.bias
    form = HeadForm(None, form.scale, form.cap)  # the bias is an input of its own, as it may be trained
    weight = head.weight if weight is None else weight
    return _InPieces.apply(hidden, weight, bias, targets, form, label_smoothing, dtype)


def tied(value: Tensor, *, to: Tensor) -> Tensor:
    """`value` unchanged, with `to` before it in the graph: a backward pass through it gives `to` a gradient of zeros."""
    return _Tied.apply(value, to)


def piece_rows(vocabulary: int) -> int:
    """Positions of one piece."""
    return max(1, PIECE // vocabulary)


def _recomputed(hidden: Tensor, targets: Tensor, head: nn.Module, form: HeadForm, label_smoothing: float) -> Tensor:
    """For heads that are more than a matrix (adapters, a trained copy): each piece is computed again for its gradient."""

    def piece_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = form.logits(head.forward(hidden))  # past the hooks: this runs inside one of them
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)

    rows = piece_rows(head.weight.shape[0])
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.stack([checkpoint(piece_loss, *piece, use_reentrant=False) for piece in pieces]).sum()


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, to: Tensor) -> Tensor:
        ctx.like = to.shape, to.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.like
        return gradient, gradient.new_zeros(shape, dtype=dtype)


class _InPieces(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T + bias`, with gradients for these three."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        # Half precision has no room for the gradient of one token among 150,000 before the loss scale is on it, which only
        # the backward pass brings.
        ctx.rest, ctx.gradients = rest, None
        if rest[-1] == torch.float16 and any(wanted):
            ctx.save_for_backward(hidden, weight, bias)
            wanted = (False, False, False)
        loss, gradients = _sum_pieces(hidden, weight, bias, *rest, wanted)
        if any(wanted):
            ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            _, gradients = _sum_pieces(*ctx.saved_tensors, *ctx.rest, ctx.needs_input_grad[:3], factor)
        else:
            gradients = [None if gradient is None else gradient.mul_(factor) for gradient in ctx.gradients]
            ctx.gradients = None
        return *gradients, None, None, None, None


def _sum_pieces(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    form: HeadForm,
    smoothing: float,
    dtype: torch.dtype,
    wanted: tuple[bool, ...],
    factor: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and its gradients by hidden, weight and bias where wanted, times `factor`."""
    vocabulary = weight.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    inputs = (hidden, weight, bias)
    by_hidden, by_weight, by_bias = (
        torch.zeros_like(tensor) if want else None for tensor, want in zip(inputs, wanted, strict=True)
    )
    rows = piece_rows(vocabulary)
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)
        for start in range(0, len(hidden), rows):
            piece, target = hidden[start : start + rows].to(dtype), targets[start : start + rows, None]
            z = (piece @ matrix.T).to(wide)  # (n, V)
            logits = form.logits(z if bias is None else z.add_(bias))
            scores = F.log_softmax(logits, dim=-1)
            loss -= (1.0 - smoothing) * scores.gather(1, target).sum()
            if smoothing:
                loss -= smoothing / vocabulary * scores.sum()
            if not any(wanted):
                continue
            slope = scores.exp_()
            if smoothing:
                slope -= smoothing / vocabulary
            slope.scatter_add_(1, target, torch.full_like(target, smoothing - 1.0, dtype=wide))
            slope = form.slope(slope, logits)
            if factor is not None:
                slope *= factor
            narrow = slope.to(dtype)
            if by_hidden is not None:
                by_hidden[start : start + rows] = narrow @ matrix
            if by_weight is not None:
                _add_product(by_weight, narrow.T, piece)
            if by_bias is not None:
                by_bias += slope.sum(0)
    return loss, [by_hidden, by_weight, by_bias]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; summed over pieces in the weight's own type, which is wider than the products under autocast."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
