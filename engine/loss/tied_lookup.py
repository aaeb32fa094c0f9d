"""Token embeddings that share the output head's trained weight, without a gradient as large as that weight for each of them.

Of a shared weight (V, D) the head wants a gradient at every row, an embedding only at the rows that it looked up; autograd
would fill a second (V, D) with zeros around these and then add the two. Here an embedding passes the weight on to the head,
so the head's gradient comes back through it and takes the rows in, in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class PassedOn:
    """The weight (V, D) as the latest lookup has passed it on; None before the first, and where there is none."""

    weight: Tensor | None = None


@contextmanager
def passing_on(model: nn.Module, head: nn.Module) -> Iterator[PassedOn]:
    """While open, the model's plain `nn.Embedding`s that share the head's weight pass it on.

    An embedding that scales, renormalises or counts is left as it is, and so is a head that is more than a matrix. Hooks of
    others still see the rows, after this one.
    """
    passed = PassedOn()

    def hook(module: nn.Embedding, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if len(arguments) != 1 or not torch.is_grad_enabled():
            return None
        weight = module.weight if passed.weight is None else passed.weight
        rows, passed.weight = _Lookup.apply(weight, arguments[0], module.padding_idx)
        return rows

    handles = [module.register_forward_hook(hook, prepend=True) for module in _lookups(model, head)]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _lookups(model: nn.Module, head: nn.Module) -> list[nn.Embedding]:
    if type(head) is not nn.Linear or not head.weight.requires_grad:
        return []
    return [
        module
        for module in model.modules()
        if type(module) is nn.Embedding
        and module.weight is head.weight
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
    ]


class _Lookup(torch.autograd.Function):
    """Rows of a weight, and the weight for its next user."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = weight.shape, padding
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, by_rows: Tensor | None, by_weight: Tensor | None) -> tuple[Tensor | None, None, None]:
        if by_rows is None:
            return by_weight, None, None
        ids, rows = ctx.saved_tensors[0].reshape(-1), by_rows.reshape(-1, by_rows.shape[-1])
        total = rows.new_zeros(ctx.shape) if by_weight is None else by_weight.contiguous()
        if ctx.padding is not None:
            rows = rows.masked_fill((ids == ctx.padding)[:, None], 0)
        if rows.device.type == "cuda":  # sorts, where index_add_ would add in no fixed order
            total.index_put_((ids,), rows.to(total.dtype), accumulate=True)
        else:  # first of each token among themselves, as autograd would: the same sum to the bit, whatever the threads
            tokens, places = ids.unique(return_inverse=True)
            summed = torch.ops.aten.embedding_dense_backward(rows, places, len(tokens), -1, False)
            total.index_add_(0, tokens, summed.to(total.dtype))
        return total, None, None
