"""Examples to token ids, labels and batches. Batch keys and shapes are defined here.

B examples, S source tokens, T target tokens. An encoder-decoder's batch holds input_ids, attention_mask (B, S) and labels,
decoder_input_ids (B, T); a causal LM's holds input_ids, attention_mask, labels (B, S), prompt and answer in one row. Padding
is on the right, int64, and masked by position: where pad and end token are the same id, the end token is still supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.data.encode import Feature

IGNORE_INDEX = -100  # label of a position that is not supervised; torch's own default


def collate_seq2seq(
    features: Sequence[Feature], *, pad_token_id: int, decoder_start_token_id: int
) -> dict[str, Tensor]:
    """A batch of an encoder-decoder; without labels where the features have none.

    Returns:
        input_ids, attention_mask (B, S); labels (B, T), IGNORE_INDEX beyond each target; decoder_input_ids (B, T), the
        start token and the labels moved one to the right.
    """
    batch = _inputs(features, pad_token_id)
    if (labels := _labels(features)) is not None:
        batch["labels"] = _padded(labels, IGNORE_INDEX)
        batch["decoder_input_ids"] = _padded([[decoder_start_token_id, *row[:-1]] for row in labels], pad_token_id)
    return batch


def collate_causal(features: Sequence[Feature], *, pad_token_id: int) -> dict[str, Tensor]:
    """A batch of a causal LM for training: input_ids, attention_mask, labels (B, S), padded on the right."""
    batch = _inputs(features, pad_token_id)
    if (labels := _labels(features)) is not None:
        batch["labels"] = _padded(labels, IGNORE_INDEX)
    return batch


def _inputs(features: Sequence[Feature], pad_token_id: int) -> dict[str, Tensor]:
    if not features:
        raise ValueError("a batch needs at least one feature")
    ids = [feature.input_ids for feature in features]
    return {"input_ids": _padded(ids, pad_token_id), "attention_mask": _padded([[1] * len(row) for row in ids], 0)}


def _labels(features: Sequence[Feature]) -> list[list[int]] | None:
    labels = [feature.labels for feature in features if feature.labels is not None]
    if labels and len(labels) != len(features):
        raise ValueError("some features of the batch have labels and some have none")
    return labels or None


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, longest row) int64."""
    batch = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
    for position, row in enumerate(rows):
        batch[position, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return batch
