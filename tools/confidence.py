"""How sure a model is of a summary, from the n-best list of its beam search, and what such a measure is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from engine.scoring import rouge

if TYPE_CHECKING:
    from engine.prediction.summarizer import Summary

MEASURES = ("confidence", "score", "agreement", "margin")
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the rows, the surest ones


class Confidence(NamedTuple):
    """Measures of one row, each greater where the model is surer.

    `score`: geometric mean of the probabilities (0..1) of the best summary's tokens. `margin`: the best's score in the search
    less the second's (log-probability over length to the power of the length penalty). `agreement`: mean ROUGE (0..1) of the
    best with each other hypothesis.
    """

    score: float
    margin: float
    agreement: float

    @property
    def confidence(self) -> float:
        """Geometric mean of score and agreement, 0..1."""
        return math.sqrt(self.score * self.agreement)

    @classmethod
    def of(cls, summary: Summary, length_penalty: float, tokenizer: str) -> Confidence | None:
        """None for a summary that is empty or was cut by the length limit. It needs two hypotheses, with scores."""
        if not (summary.ended and summary.text.strip()):
            return None
        best, second = summary.scores[:2]
        per_token = best * summary.tokens ** (length_penalty - 1)  # the search divides by length ** penalty
        others = summary.texts[1:]
        agreement = sum(rouge.similarity(summary.text, text, tokenizer=tokenizer) for text in others) / len(others)
        return cls(min(1.0, math.exp(per_token)), best - second, agreement / 100)


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Rank correlation, ties by their mean rank; NaN where one of them is constant."""
    import pandas as pd

    return float(pd.Series(one).rank().corr(pd.Series(two).rank()))


def limit_of(values: Sequence[float], share: float) -> float:
    """The value that a share of them, one at least, reaches."""
    return sorted(values, reverse=True)[max(1, round(share * len(values))) - 1]


def worth(measured: Sequence[Confidence], scores: Sequence[float]) -> list[list[str]]:
    """A table: for each measure its rank correlation with the rows' scores, and the mean score of the surest rows."""
    rows = [["by", "Spearman", *(f"surest {share:.0%}" for share in SHARES)]]
    for name in MEASURES:
        values = [getattr(one, name) for one in measured]
        rank = spearman(values, scores)
        row = [name, "-" if math.isnan(rank) else f"{rank:+.2f}"]  # of rows that are all alike there is no order
        for share in SHARES:
            least = limit_of(values, share)
            kept = [score for value, score in zip(values, scores, strict=True) if value >= least]
            row.append(f"{sum(kept) / len(kept):.2f} (from {least:.3f})")
        rows.append(row)
    return rows
