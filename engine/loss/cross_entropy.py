"""Summed cross-entropy over supervised tokens only: the one place that shifts labels.

The sum (not the mean) is what makes accumulation and data parallelism exact: the training step divides it by the number
of supervised tokens of the whole update, counted over all micro-batches and ranks.

Shapes: B examples, S source tokens, T target tokens, V vocabulary, D hidden, N supervised positions of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from engine.data.collate import IGNORE_INDEX
from engine.generation.modelstate import bare
from engine.loss import output_head, tied_lookup


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


def supervised_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Places (N,) of the supervised tokens among the B*T of `aligned_labels`, int64. On a GPU this waits for the device."""
    return (aligned_labels(batch).reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)


def summed_cross_entropy(model: nn.Module, batch: Mapping[str, Tensor], *, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the token cross-entropies of one micro-batch, float32 scalar, 0 where nothing is supervised.

    Args:
        model: a transformers model with an LM head, possibly wrapped by PEFT or DistributedDataParallel.
        batch: what the family's collator returns; `labels` (B, T) hold IGNORE_INDEX at unsupervised positions. Where it also
            holds `supervised`, their `supervised_positions`, a GPU is not waited for.
        label_smoothing: share of the target probability spread evenly over the vocabulary (Szegedy et al., 2016).
    """
    labels = aligned_labels(batch).reshape(-1)  # (B*T,)
    positions = batch["supervised"] if "supervised" in batch else supervised_positions(batch)  # (N,)
    targets = labels[positions]
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "supervised")}
    plain = bare(model)
    head = plain.get_output_embeddings()
    caught: list[Tensor] = []  # the supervised hidden states (N, D), and their loss

    def narrow(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = arguments[0]  # (B, T, D)
        if (
            streams := hidden.dim() == 4
        ):  # (B, G, T, D): ProphetNet's; the first predicts the next token, as in decoding
            hidden = hidden[:, 0]
        hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
        kept = hidden
        if output_head.known(head):
            summed = output_head.cross_entropy(hidden, targets, plain, head, label_smoothing, weight=passed.weight)
            caught.extend((hidden, summed))
            kept = hidden[:1]  # one position, so that the model's own code has something to go on with
        return (kept[:, None] if streams else kept,)  # (N, 1, D), of which that model takes stream 0

    def cut(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return (
            output_head.tied(output.detach(), to=caught[0]) if caught else None
        )  # that position adds nothing to the loss

    with _hooked(head, narrow, cut), tied_lookup.passing_on(plain, head) as passed:
        logits = model(**inputs, use_cache=False).logits  # (1, V), or (N, V) of a head that is not known
    if not caught:
        return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    hidden, loss = caught
    if not output_head.confirm(plain, head, hidden[:1], logits):
        return summed_cross_entropy(model, batch, label_smoothing=label_smoothing)  # once, now on whole logits
    # DistributedDataParallel waits for every weight behind the model's outputs, such as an encoder's whose decoder has
    # dropped all its layers; it hears of them through the outputs.
    return output_head.tied(loss, to=logits)


@contextmanager
def _hooked(
    head: nn.Module, before: Callable[..., tuple[Tensor]], after: Callable[..., Tensor | None]
) -> Iterator[None]:
    """While open, these two stand around the LM head, inside the forward pass of whatever is wrapped around the model.

    There the head's weights are whole and wrappers count them as used: a hook works for every model class, with PEFT,
    DistributedDataParallel, sharding and autocast around it.
    """
    handles = head.register_forward_pre_hook(before), head.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
