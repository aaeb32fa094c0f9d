"""Metrics of a user's own: what is asked of them, and their answers made into scores.

A metric is a function of `predictions` (a text a row) and `references` (a list of texts a row), and of `dialogues` (a text a
row) where it has an argument of that name. It returns one number for all rows, or one for each row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from engine.scoring.endings import ENDING_KEYS
from engine.scoring.rouge import METRICS

Metric = Callable[..., Any]
# Keys of an evaluation's row, and columns of a prediction file, that no metric may take.
TAKEN = {
    *("split", "step", "epoch", "non_finite", "id", "dialogue", "reference", "prediction", "loss", *METRICS),
    *("rouge_sum", "rouge_mean", "rouge_tokenizer", "rouge_tokenizer_version", "seconds", "samples_per_second"),
    *(*ENDING_KEYS, "alike_share", "generated_tokens", "lead_rouge_mean", "constant_rouge_mean", "samples"),
}


def key_of(metric: str) -> str:
    """The score that `evaluation.metric` names: `min:length_error` is `length_error`."""
    return metric.rpartition(":")[2]


def less_is_better(metric: str) -> bool:
    """Of `evaluation.metric`: of the loss, and of what is written as `min:NAME`."""
    return metric == "loss" or metric.startswith("min:")


def measure(
    metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]], dialogues: Sequence[str]
) -> tuple[float, list[float] | None]:
    """The metric's mean, and its scores by row where it gives them.

    Raises:
        ValueError: for an answer that is neither a number nor a list of one number a row. Whatever the metric raises.
    """
    asked = {"dialogues": list(dialogues)} if _takes_dialogues(metric) else {}
    found = metric(list(predictions), [list(row) for row in references], **asked)
    found = found.tolist() if hasattr(found, "tolist") else found  # arrays, tensors and their scalars
    if isinstance(found, int | float):
        return float(found), None
    if not isinstance(found, list | tuple) or not all(isinstance(value, int | float) for value in found):
        raise ValueError(f"it returned a {type(found).__name__}, not a number or a list of numbers")
    if len(found) != len(predictions):
        raise ValueError(f"it returned {len(found)} numbers for {len(predictions)} rows")
    return math.fsum(found) / len(found), [float(value) for value in found]


def _takes_dialogues(metric: Metric) -> bool:
    try:
        return "dialogues" in inspect.signature(metric).parameters
    except (TypeError, ValueError):  # written in C
        return False
