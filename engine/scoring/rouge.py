"""Korean-aware ROUGE, and where it cuts words.

ROUGE comes from the `korouge-score` package (the reference implementation's n-gram and sentence-level LCS scores, with
a tokenizer of our choice). Its default tokenizer keeps only a-z and 0-9, so Hangul would score zero and shared speaker
tags one. Korean has no one way to cut words, so every score carries the name and version of the tokenizer that made it:

- `mecab`: surface morphemes of python-mecab-ko on the raw text. This is what the Korean dialogue-summarisation
  competition counted, so placeholders get no special treatment: `#Person1#는` is the five tokens `# Person 1 # 는`.
- `char`: every character that is not white space.
- `whitespace`: words between white space; `#Person1#는` is one token.

Texts are brought to Unicode NFC first: decomposed Hangul (files from macOS) would otherwise match nothing.
ROUGE-2 of texts with one token is 0 (they hold no bigram), as in the reference implementation.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from korouge_score.scoring import Score

TOKENIZERS = ("mecab", "char", "whitespace")
METRICS = ("rouge1", "rouge2", "rougeL")
# Most references, as a share, that may give no token before the tokenizer is called unfit for the texts.
EMPTY_REFERENCES_LIMIT = 0.05

PLACEHOLDER = re.compile(r"#[A-Za-z]+\d*#")

References = Sequence[str | Sequence[str]]  # one text, or several of which the best counts, per row


# --- tokens ---------------------------------------------------------------------------------------


@cache
def _mecab():
    """One analyser per process, made on first use (loading the dictionary takes some 50 ms)."""
    from mecab import MeCab

    return MeCab()


@lru_cache(maxsize=65536)
def tokenize(text: str, tokenizer: str = "mecab") -> tuple[str, ...]:
    """Tokens of `text`; kept by text, because the same references are scored at every evaluation."""
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"unknown ROUGE tokenizer {tokenizer!r}; there are {', '.join(TOKENIZERS)}")
    text = unicodedata.normalize("NFC", text)
    if tokenizer == "whitespace":
        return tuple(text.split())
    if tokenizer == "char":
        return tuple(c for c in text if not c.isspace())
    # MeCab reads C strings: a NUL would end the text, and a lone surrogate has no UTF-8 form.
    text = text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
    return tuple(_mecab().morphs(text)) if text.strip() else ()


@cache
def tokenizer_id(tokenizer: str = "mecab") -> str:
    """The tokenizer's name with what decides its tokens; scores compare only where these strings are equal."""
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"unknown ROUGE tokenizer {tokenizer!r}; there are {', '.join(TOKENIZERS)}")
    if tokenizer != "mecab":
        return tokenizer
    from importlib.metadata import version

    return f"mecab (python-mecab-ko {version('python-mecab-ko')}, python-mecab-ko-dic {version('python-mecab-ko-dic')})"


class _Tokens:
    """The interface that korouge-score expects of a tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        self.name = tokenizer

    def tokenize(self, text: str) -> tuple[str, ...]:
        return tokenize(text, self.name)


@cache
def _scorer(tokenizer: str):
    home = os.environ.get("HOME")
    if os.path.expanduser("~") == "~":  # no HOME and no such user, as in containers: nltk gives up while it is imported
        os.environ["HOME"] = os.curdir
    try:
        from korouge_score.rouge_scorer import RougeScorer  # half a second: it imports nltk
    finally:
        if home is None:
            os.environ.pop("HOME", None)

    return RougeScorer(list(METRICS), tokenizer=_Tokens(tokenizer))


# --- ROUGE ----------------------------------------------------------------------------------------


def rouge_rows(predictions: Sequence[str], references: References, tokenizer: str = "mecab") -> list[dict[str, float]]:
    """F1 x 100 of each row: rouge1, rouge2, rougeL (sentence-level LCS), their rouge_sum and rouge_mean.

    Of several references the best counts for each metric on its own, as in the competition. An empty prediction
    scores 0. Raises ValueError when lengths differ, a row has no reference, or the tokenizer finds nothing in the
    references of over 5 % of the rows.
    """
    rows = as_lists(predictions, references)
    _refuse_empty_references(rows, tokenizer)
    scorer = _scorer(tokenizer)
    return [
        _row(scorer.score_multi(targets, prediction)) for prediction, targets in zip(predictions, rows, strict=True)
    ]


def rouge(predictions: Sequence[str], references: References, tokenizer: str = "mecab") -> dict[str, float | str]:
    """Means of `rouge_rows` over the rows, with the name and the version of the tokenizer that counted."""
    return mean_scores(rouge_rows(predictions, references, tokenizer), tokenizer)


def similarity(a: str, b: str, metric: str = "rouge_mean", tokenizer: str = "mecab") -> float:
    """One ROUGE F1 x 100 of two texts; F1 does not depend on which of them is called the reference."""
    return _pair(*sorted((a, b)), tokenizer)[metric]


@lru_cache(maxsize=1 << 17)
def _pair(a: str, b: str, tokenizer: str) -> dict[str, float]:
    return _row(_scorer(tokenizer).score(a, b))


def _row(scores: Mapping[str, Score]) -> dict[str, float]:
    return _with_totals({metric: 100.0 * float(scores[metric].fmeasure) for metric in METRICS})


def _with_totals(row: dict[str, float]) -> dict[str, float]:
    total = sum(row.values())
    return row | {"rouge_sum": total, "rouge_mean": total / len(METRICS)}


def mean_scores(rows: Sequence[dict[str, float]], tokenizer: str = "mecab") -> dict[str, float | str]:
    """The dictionary of `rouge` from scores per row that are already there."""
    if not rows:
        raise ValueError("no rows to score")
    means = _with_totals({metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS})
    return means | {"rouge_tokenizer": tokenizer, "rouge_tokenizer_version": tokenizer_id(tokenizer)}


def as_lists(predictions: Sequence[str], references: References) -> list[list[str]]:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} rows of references")
    rows = [[row] if isinstance(row, str) else list(row) for row in references]
    for number, (prediction, row) in enumerate(zip(predictions, rows, strict=True), start=1):
        if not row:
            raise ValueError(f"row {number} has no reference")
        if not all(isinstance(text, str) for text in (prediction, *row)):
            raise ValueError(f"row {number} holds something that is not text")
    return rows


def _refuse_empty_references(rows: Sequence[Sequence[str]], tokenizer: str) -> None:
    empty = sum(not any(tokenize(text, tokenizer) for text in row) for row in rows)
    if empty > EMPTY_REFERENCES_LIMIT * len(rows):
        raise ValueError(f"tokenizer {tokenizer} finds no token in the references of {empty} of {len(rows)} rows")


def squeeze(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())
