"""Predictions that are nearly all alike: what a model writes that has learnt one sentence and nothing of its dialogues."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from engine.scoring.rouge import PLACEHOLDER, squeeze

ALIKE_LIMIT = 0.5  # share of all rows from which predictions count as nearly all alike
_NEAR = 0.8  # F1 of letter pairs from which two texts are nearly the same
_CENTRES = 16  # texts that others are held against; a share of a third is missed once in 600 times
_NUMBER = re.compile(r"\d+")


class Alike(NamedTuple):
    """The largest share (0..1) of texts that are nearly the same, and one of them."""

    share: float
    text: str


def alike(texts: Sequence[str]) -> Alike:
    """How much of `texts` is one text: equal, or with other numbers or speakers, or a few letters apart.

    Raises ValueError where there is no text.
    """
    if not texts:
        raise ValueError("no texts to compare")
    bare = [_NUMBER.sub("0", PLACEHOLDER.sub("#", squeeze(text))) for text in texts]
    counts = Counter(bare)
    pairs = {text: Counter(pairwise(f"^{text}$")) for text in counts}
    shares = {
        centre: sum(count for text, count in counts.items() if _f1(pairs[centre], pairs[text]) >= _NEAR) / len(texts)
        for centre, _ in counts.most_common(_CENTRES)
    }
    centre = max(shares, key=shares.__getitem__)
    return Alike(shares[centre], texts[bare.index(centre)])


def _f1(a: Counter, b: Counter) -> float:
    return 2.0 * (a & b).total() / (a.total() + b.total())
