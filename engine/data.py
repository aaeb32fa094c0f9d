"""Examples to token ids, labels and batches. Batch keys and shapes are defined here.

B examples, S source tokens, T target tokens. An encoder-decoder's batch holds input_ids, attention_mask (B, S) and labels,
decoder_input_ids (B, T); a causal LM's holds input_ids, attention_mask, labels (B, S), prompt and answer in one row. Padding
is on the right, int64, and masked by position: where pad and end token are the same id, the end token is still supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.encoding import Feature, TextEncoder
from engine.errors import EngineError
from engine.examples import Example, check_splits, fingerprint, read_examples, read_split
from engine.losses import IGNORE_INDEX
from engine.prompts import instruction_variants

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Example",
    "Feature",
    "TextEncoder",
    "check_splits",
    "collate_causal",
    "collate_seq2seq",
    "encode_all",
    "fingerprint",
    "length_report",
    "read_examples",
    "read_split",
]
_ROWS_PER_CALL = 512  # rows given to the tokenizer at once


# Many rows


def encode_all(encoder: TextEncoder, examples: Sequence[Example], *, augment: bool = False) -> list[Feature]:
    """Training features of all examples, in order; with `augment` five of each, one per instruction.

    Raises:
        EngineError: E2.73 where the prompt has no instruction to vary, and as `training_feature`.
    """
    if augment and encoder.settings.style == "plain":
        raise EngineError(
            "E2.73",
            "plain prompts have no instruction to vary",
            "data.instruction_augmentation",
            "nothing was trained",
            "set prompt.style to instruction or chat",
        )
    instructions = instruction_variants(encoder.settings) if augment else (None,)
    rows = [(example, index, wording) for index, example in enumerate(examples) for wording in instructions]
    parts = (rows[start : start + _ROWS_PER_CALL] for start in range(0, len(rows), _ROWS_PER_CALL))
    return [feature for part in parts for feature in encoder.training_features(part)]


def length_report(features: Sequence[Feature], encoder: TextEncoder) -> dict[str, Any]:
    """Token lengths before truncation, and the shares that were truncated.

    Returns:
        `source` and `target` (None without labels), each with median, p90, p99, max, limit, truncated (a share);
        `unknown`, the share of tokens that stand for text outside the vocabulary; and `text`, a line for each of them.
    """
    source = _lengths([feature.source_tokens for feature in features], encoder.max_source_length)
    targets = [feature.target_tokens for feature in features if feature.labels is not None]
    target = _lengths(targets, encoder.max_target_length) if targets else None
    plain = encoder.family == "seq2seq" and encoder.settings.style == "plain"
    lines = [_line("source", source, "data.max_source_length", "their end" if plain else "their oldest turns")]
    if target:
        lines.append(_line("target", target, "data.max_target_length", "their last words"))
    unknown = _unknown_share(features, encoder.tokenizer)
    if unknown:
        lines.append(
            f"{100 * unknown:.2g} % of all tokens are unknown to the tokenizer: the model cannot see that text"
        )
    text = "\n".join(lines)
    return {"rows": len(features), "source": source, "target": target, "unknown": unknown, "text": text}


def _unknown_share(features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase) -> float:
    """0 also where another special token stands in for the unknown one, as in byte-level vocabularies."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return 0.0
    rows = [row for feature in features for row in (feature.input_ids, feature.labels or [])]
    return sum(row.count(unknown) for row in rows) / max(1, sum(map(len, rows)))


def _lengths(lengths: list[int], limit: int) -> dict[str, Any]:
    ordered = sorted(lengths) or [0]

    def at(share: float) -> int:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    truncated = sum(length > limit for length in lengths) / max(1, len(lengths))
    return {
        "median": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "max": ordered[-1],
        "limit": limit,
        "truncated": truncated,
    }


def _line(name: str, lengths: dict[str, Any], key: str, lost: str) -> str:
    text = "{name} tokens: median {median}, 90 % up to {p90}, 99 % up to {p99}, longest {max}".format(
        name=name, **lengths
    )
    if not lengths["truncated"]:
        return f"{text}; none is cut"
    return f"{text}; {100 * lengths['truncated']:.1f} % are longer than {key}={lengths['limit']} and lose {lost}"


# Batches


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
