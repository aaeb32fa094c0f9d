"""The best constant: the one sentence that scores best when it is given as the summary of every row.

A model that writes it has learnt nothing of its dialogues, and a score must be held against it. The search is exact over
its candidates: ROUGE-1 of all of them bounds the two others from above (what matches consists of tokens that match), so
they are taken by falling bound until the best mean found reaches it.

Shapes: R references of all rows, laid flat; N rows.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from engine.scoring.rouge import References, as_lists, tokenize

if TYPE_CHECKING:
    import numpy as np

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# What is searched at most: more candidates or rows are sampled, evenly from a seeded order.
MOST_CANDIDATES, MOST_ROWS = 3_000, 500


class Constant(NamedTuple):
    """The sentence, the candidates it was the best of, and the rows (of those given) that chose it."""

    text: str
    candidates: int
    rows: int


def best_constant(
    summaries: Sequence[str], references: References, tokenizer: str = "mecab", seed: int = 0
) -> Constant:
    """The sentence with the highest mean `rouge_mean` against all rows; of equals the one met first.

    Candidates are the summaries and the sentences they consist of: at most MOST_CANDIDATES different ones, against at most
    MOST_ROWS rows. Raises ValueError where there is nothing to choose or to score.
    """
    texts = _candidates(summaries, seed)
    rows = _sample(as_lists([""] * len(references), references), MOST_ROWS, seed)
    if not texts or not rows:
        raise ValueError("a best constant needs candidates and references")
    against = _References([[tokenize(text, tokenizer) for text in row] for row in rows])
    tokens = [tokenize(text, tokenizer) for text in texts]
    rouge1 = [against.unigrams.f1(line) for line in tokens]
    bounds = [one * against.most_over_rouge1(len(line)) for one, line in zip(rouge1, tokens, strict=True)]
    best, place = -1.0, 0
    for i in sorted(range(len(texts)), key=lambda i: -bounds[i]):
        if bounds[i] <= best:
            break
        rouge2 = against.bigrams.f1(list(pairwise(tokens[i])))
        if (2.0 * rouge1[i] + rouge2) / 3.0 > best:
            score = (rouge1[i] + rouge2 + against.lcs_f1(tokens[i])) / 3.0
            best, place = max((best, place), (score, i), key=lambda found: found[0])
    return Constant(texts[place], len(texts), len(rows))


def _candidates(summaries: Sequence[str], seed: int) -> list[str]:
    some = _sample(list(dict.fromkeys(summaries)), MOST_CANDIDATES, seed)
    sentences = [sentence for text in some for sentence in _SENTENCE_END.split(text)]
    return _sample([text for text in dict.fromkeys([*some, *sentences]) if text.strip()], MOST_CANDIDATES, seed)


def _sample(items: list, most: int, seed: int) -> list:
    if len(items) <= most:
        return items
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), most))]


class _Grams:
    """n-grams of all references. The k-th of equal ones is an item of its own, so that clipped counts are plain sums."""

    def __init__(self, lines: Sequence[Sequence[Hashable]], starts: np.ndarray) -> None:
        import numpy as np

        counted = [Counter(line) for line in lines]
        items = dict.fromkeys((gram, k) for counts in counted for gram, count in counts.items() for k in range(count))
        self.starts, self.lengths = starts, np.array([len(line) for line in lines])  # `[N]`, `[R]`
        self.numbers = {item: number for number, item in enumerate(items)}
        self.held = np.zeros((len(items), len(lines)), dtype=np.int16)  # which reference holds which item
        for place, counts in enumerate(counted):
            self.held[self._known(counts), place] = 1

    def _known(self, counts: Counter) -> list[int]:
        keys = ((gram, k) for gram, count in counts.items() for k in range(count))
        return [self.numbers[key] for key in keys if key in self.numbers]

    def f1(self, line: Sequence[Hashable]) -> float:
        """ROUGE-n (0..1) of one candidate, mean over rows; 0 where candidate or reference is too short for an n-gram."""
        import numpy as np

        overlap = np.add.reduce(self.held[self._known(Counter(line))], axis=0)
        return _mean_f1(overlap, len(line), self.lengths, self.starts)


class _References:
    """All references, to score one candidate against every row at once."""

    def __init__(self, rows: Sequence[Sequence[Sequence[str]]]) -> None:
        import numpy as np

        flat = [tokens for row in rows for tokens in row]
        self.starts = np.cumsum([0, *(len(row) for row in rows[:-1])])  # of each row among the references, `[N]`
        self.unigrams = _Grams(flat, self.starts)
        self.bigrams = _Grams([list(pairwise(tokens)) for tokens in flat], self.starts)
        self.numbers: dict[str, int] = {}
        longest = max(1, max(map(len, flat)))
        self.padded = np.zeros((longest, len(flat)), dtype=np.int32)  # `[T, R]`, 0: padding
        for place, tokens in enumerate(flat):
            numbers = [self.numbers.setdefault(token, len(self.numbers) + 1) for token in tokens]
            self.padded[: len(tokens), place] = numbers

    def most_over_rouge1(self, length: int) -> float:
        """What `rouge_mean` of a candidate of that length is at most, as a multiple of its ROUGE-1.

        The clipped overlap of bigrams, and the longest common subsequence, are at most that of tokens; a bigram F1 divides
        by two tokens less.
        """
        tokens = length + min((count for count in self.unigrams.lengths.tolist() if count), default=0)
        return (2.0 + tokens / (tokens - 2)) / 3.0 if tokens > 2 else 2.0

    def lcs_f1(self, tokens: Sequence[str]) -> float:
        """ROUGE-L (0..1): the table of longest common subsequences, one token a step for all references at once."""
        import numpy as np

        longest = np.zeros((self.padded.shape[0] + 1, self.padded.shape[1]), dtype=np.int16)  # `[T + 1, R]`
        for token in tokens:
            longest[1:] = np.maximum(longest[1:], longest[:-1] + (self.padded == self.numbers.get(token, -1)))
            np.maximum.accumulate(longest, axis=0, out=longest)
        return _mean_f1(longest[-1], len(tokens), self.unigrams.lengths, self.starts)


def _mean_f1(overlap: np.ndarray, own: int, theirs: np.ndarray, starts: np.ndarray) -> float:
    """Mean over rows of 2 * overlap / (own + theirs); of several references of a row the best counts."""
    import numpy as np

    return float(np.maximum.reduceat(2.0 * overlap / np.maximum(own + theirs, 1), starts).mean())
