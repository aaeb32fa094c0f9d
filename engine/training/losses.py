"""Summed cross-entropy over supervised tokens only: the one place that shifts labels.

The sum (not the mean) is what makes accumulation and data parallelism exact: the training step divides it by the number
of supervised tokens of the whole update, counted over all micro-batches and ranks.

Shapes: B examples, S source tokens, T target tokens, V vocabulary, D hidden, N supervised positions of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from engine.data.collate import IGNORE_INDEX
from engine.generation.modelstate import bare


def aligned_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Labels (B, T) placed at the position whose output predicts them.

    An encoder-decoder's decoder inputs are already shifted right, so its labels stand where they are. A causal LM predicts
    the token after each position: labels move one to the left and the last position predicts nothing.
    """
    labels = batch["labels"]
    if "decoder_input_ids" in batch:
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Number of supervised tokens of the batch, after the shift, as an int64 scalar on the batch's device."""
    return (aligned_labels(batch) != IGNORE_INDEX).sum()


@contextmanager
def _head_sees_only(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Narrow the LM head's input from (B, T, D) to the N supervised positions (N, D) while the context is open.

    With a vocabulary of 150,000 the logits of unsupervised positions dominate time and memory, and none of them reaches the
    loss. A hook on the head keeps this independent of the model class and of PEFT, DDP and autocast wrappers around it.
    """

    def narrow(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = arguments[0]
        if hidden.dim() == 4:  # (B, G, T, D): ProphetNet's streams; the first predicts the next token, as in decoding
            return (hidden[:, 0].flatten(0, 1)[positions][:, None],)  # (N, 1, D), of which the model takes stream 0
        return (hidden.reshape(-1, hidden.shape[-1])[positions],)  # (B, T, D) -> (N, D)

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def summed_cross_entropy(model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the token cross-entropies of one micro-batch, float32 scalar, 0 where nothing is supervised.

    Args:
        model: a transformers model with an LM head, possibly wrapped by PEFT or DistributedDataParallel.
        batch: what the family's collator returns; `labels` (B, T) hold IGNORE_INDEX at unsupervised positions.
        label_smoothing: share of the target probability spread evenly over the vocabulary (Szegedy et al., 2016).
    """
    labels = aligned_labels(batch).reshape(-1)  # (B*T,)
    positions = (
        (labels != IGNORE_INDEX).nonzero().squeeze(1)
    )  # (N,); a host sync on GPUs, paid back by the smaller head
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with _head_sees_only(bare(model).get_output_embeddings(), positions):
        logits = model(**inputs, use_cache=False).logits  # (N, V)
    return F.cross_entropy(logits.float(), labels[positions], reduction="sum", label_smoothing=label_smoothing)
