"""Scores on strings: Korean-aware ROUGE, bootstrap intervals, the lead baseline, and why summaries ended as they did.

Pure: no files, no recipe, no framework. ROUGE comes from the `korouge-score` package (the reference implementation's
n-gram and sentence-level LCS scores, with a tokenizer of our choice). Its default tokenizer keeps only a-z and 0-9, so
Hangul would score zero and shared speaker tags one; therefore every score here carries the name and version of the
tokenizer that made it:

- `mecab`: surface morphemes of python-mecab-ko on the raw text. This is what the Korean dialogue-summarisation
  competition counted, so placeholders get no special treatment: `#Person1#는` is the five tokens `# Person 1 # 는`.
- `char`: every character that is not white space.
- `whitespace`: words between white space; `#Person1#는` is one token.

Texts are brought to Unicode NFC first: decomposed Hangul (files from macOS) would otherwise match nothing.
ROUGE-2 of texts with one token is 0 (they hold no bigram), as in the reference implementation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

TOKENIZERS = ("mecab", "char", "whitespace")
METRICS = ("rouge1", "rouge2", "rougeL")
# Most references, as a share, that may give no token before the tokenizer is called unfit for the texts.
EMPTY_REFERENCES_LIMIT = 0.05

PLACEHOLDER = re.compile(r"#[A-Za-z]+\d*#")
_SPEAKER = re.compile(r"^\s*(?:#[A-Za-z]+\d*#\s*[:：]?|[^\s:：\d]{1,20}\s?[:：](?=\s))\s*")

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
    from korouge_score.rouge_scorer import RougeScorer  # half a second: it imports nltk

    return RougeScorer(list(METRICS), tokenizer=_Tokens(tokenizer))


# --- ROUGE ----------------------------------------------------------------------------------------


def rouge_rows(predictions: Sequence[str], references: References, tokenizer: str = "mecab") -> list[dict[str, float]]:
    """F1 x 100 of each row: rouge1, rouge2, rougeL (sentence-level LCS), their rouge_sum and rouge_mean.

    Of several references the best counts for each metric on its own, as in the competition. An empty prediction
    scores 0. Raises ValueError when lengths differ, a row has no reference, or the tokenizer finds nothing in the
    references of over 5 % of the rows.
    """
    rows = _as_lists(predictions, references)
    _refuse_empty_references(rows, tokenizer)
    scorer = _scorer(tokenizer)
    scores = []
    for prediction, targets in zip(predictions, rows, strict=True):
        best = scorer.score_multi(targets, prediction)
        scores.append(_row({metric: score.fmeasure for metric, score in best.items()}))
    return scores


def rouge(predictions: Sequence[str], references: References, tokenizer: str = "mecab") -> dict[str, float | str]:
    """Means of `rouge_rows` over the rows, with the name and the version of the tokenizer that counted."""
    return mean_scores(rouge_rows(predictions, references, tokenizer), tokenizer)


def similarity(a: str, b: str, metric: str = "rouge_mean", tokenizer: str = "mecab") -> float:
    """One ROUGE F1 x 100 of two texts; F1 does not depend on which of them is called the reference."""
    return _pair(*sorted((a, b)), tokenizer)[metric]


@lru_cache(maxsize=1 << 17)
def _pair(a: str, b: str, tokenizer: str) -> dict[str, float]:
    return _row({name: score.fmeasure for name, score in _scorer(tokenizer).score(a, b).items()})


def _row(fmeasures: dict[str, float]) -> dict[str, float]:
    row = {metric: 100.0 * float(fmeasures[metric]) for metric in METRICS}
    row["rouge_sum"] = sum(row.values())
    row["rouge_mean"] = row["rouge_sum"] / len(METRICS)
    return row


def mean_scores(rows: Sequence[dict[str, float]], tokenizer: str = "mecab") -> dict[str, float | str]:
    """The dictionary of `rouge` from scores per row that are already there."""
    if not rows:
        raise ValueError("no rows to score")
    means: dict[str, float | str] = {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS}
    means["rouge_sum"] = sum(float(means[metric]) for metric in METRICS)
    means["rouge_mean"] = float(means["rouge_sum"]) / len(METRICS)
    means["rouge_tokenizer"], means["rouge_tokenizer_version"] = tokenizer, tokenizer_id(tokenizer)
    return means


def _as_lists(predictions: Sequence[str], references: References) -> list[list[str]]:
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


# --- baselines and facts --------------------------------------------------------------------------


def lead_baseline(dialogue: str, turns: int = 2) -> str:
    """Text of the first turns without the speakers' names, joined by spaces: the summary that costs nothing.

    A turn is a line that starts with a speaker (`#Person1#:`) and the lines up to the next one; where no line starts
    with a speaker, each line is a turn.
    """
    lines = [line.strip() for line in dialogue.splitlines() if line.strip()]
    spoken = [_SPEAKER.match(line) is not None for line in lines]
    texts: list[str] = []
    for line, starts in zip(lines, spoken, strict=True):
        text = _SPEAKER.sub("", line, count=1)
        if starts or not any(spoken) or not texts:
            texts.append(text)
        else:
            texts[-1] = f"{texts[-1]} {text}"
    return " ".join(text for text in texts[:turns] if text)


def fact_share(predictions: Sequence[str], facts: Sequence[Sequence[str]]) -> float:
    """Share (0..1) of all facts that stand in their row's prediction word for word, white space aside.

    `facts` lists for each row what a right summary must hold (times, places, things, amounts). A fact that begins or
    ends with a digit is not found inside a longer number (`2시` in `12시`). Raises ValueError where there is no fact.
    """
    if len(predictions) != len(facts):
        raise ValueError(f"{len(predictions)} predictions but {len(facts)} rows of facts")
    total = sum(len(row) for row in facts)
    if not total:
        raise ValueError("no facts to look for")
    found = 0
    for prediction, row in zip(predictions, facts, strict=True):
        text = unicodedata.normalize("NFC", prediction)
        found += sum(_fact_pattern(fact).search(text) is not None for fact in row)
    return found / total


@lru_cache(maxsize=65536)
def _fact_pattern(fact: str) -> re.Pattern[str]:
    characters = _squeeze(fact)
    start = r"(?<!\d)" if characters[:1].isdigit() else ""
    end = r"(?!\d)" if characters[-1:].isdigit() else ""
    return re.compile(start + r"\s*".join(map(re.escape, characters)) + end)


def _squeeze(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


# --- bootstrap ------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean over rows with the percentile bootstrap interval of that mean."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of a - b over the same rows, its interval, and the share of resamples in which a is ahead."""

    mean: float
    low: float
    high: float
    better_share: float


def bootstrap_interval(
    row_scores: Sequence[float], seed: int = 0, *, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap over rows (Efron, 1979); the same seed gives the same interval."""
    means = _bootstrap_means(row_scores, seed, resamples)
    low, high = _percentiles(means, level)
    return Interval(float(sum(row_scores) / len(row_scores)), low, high)


def paired_difference(
    a: Sequence[float], b: Sequence[float], seed: int = 0, *, resamples: int = 2000, level: float = 0.95
) -> Difference:
    """Paired bootstrap of a - b (Koehn, 2004): both systems are resampled by the same rows."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows cannot be paired")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    means = _bootstrap_means(differences, seed, resamples)
    low, high = _percentiles(means, level)
    return Difference(float(sum(differences) / len(differences)), low, high, float((means > 0).mean()))


def selection_gain(
    candidates: Sequence[Sequence[float]], baseline: Sequence[float], seed: int = 0, *, resamples: int = 500
) -> float:
    """Gain over the baseline to expect on new rows when the best of many candidates is picked on these rows.

    The best of many looks better on the rows that chose it than it is. So each resample picks the best candidate on the
    drawn rows and measures its gain on the rows that were not drawn (out-of-bag bootstrap). Units of the scores.
    """
    import numpy as np

    gains = np.asarray(candidates, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    rows = gains.shape[1]
    rng = np.random.default_rng(seed)
    measured = []
    for _ in range(resamples):
        counts = np.bincount(rng.integers(0, rows, rows), minlength=rows)
        left_out = counts == 0
        if left_out.any():
            measured.append(gains[int(np.argmax(gains @ counts)), left_out].mean())
    return float(np.mean(measured)) if measured else 0.0


def _bootstrap_means(values: Sequence[float], seed: int, resamples: int):
    import numpy as np

    if not len(values):
        raise ValueError("no rows to resample")
    scores = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # One resample at a time: 2,000 x 500 rows take 20 ms, and memory stays at one row of indices.
    return np.array([scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(resamples)])


def _percentiles(means, level: float) -> tuple[float, float]:
    import numpy as np

    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)


# --- why did it end -------------------------------------------------------------------------------

ENDING_KEYS = ("capped_rate", "eos_rate", "hangul_ratio", "foreign_rate", "proper_ending_rate", "mean_length_ratio")
_PROPER_ENDING = re.compile(r"(?:다|요|죠|까)[.!?][\"'”’)\]]*$")
_SCRIPTS = {
    "latin": re.compile(r"[A-Za-zÀ-ÖØ-öø-ɏＡ-Ｚａ-ｚ]"),
    "kana": re.compile(r"[\u3041-\u3096\u3099-\u30ff\u31f0-\u31ff\uff66-\uff9f]"),
    "han": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"),
}
_HANGUL = re.compile(r"[\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb]")
_BIN_WIDTH, _BINS = 20, 10  # characters; the last bin is open


def ends_properly(text: str) -> bool:
    """Whether the text ends like a Korean sentence: 다, 요, 죠 or 까 and a full stop, exclamation or question mark."""
    return _PROPER_ENDING.search(text.rstrip()) is not None


def ending_report(
    predictions: Sequence[str], references: References | None = None, capped: Sequence[bool] | None = None
) -> dict:
    """Why summaries ended as they did, as plain numbers: shares are 0..1, lengths are characters without white space.

    `capped` says for each row whether the length limit, and not the end token, stopped it. Keys:
    capped_rate, eos_rate (only with `capped`); proper_ending_rate; empty_rate; hangul_ratio (Hangul among all letters);
    foreign_rate (rows with a Latin, kana or Han letter) and latin_rate, kana_rate, han_rate, all outside placeholders;
    mean_length, length_histogram; with `references` also mean_length_ratio (mean prediction over mean reference) and
    the references' own reference_length, reference_foreign_rate, reference_proper_ending_rate, reference_histogram.
    """
    if not predictions:
        raise ValueError("no predictions to report on")
    report: dict = {"rows": len(predictions)}
    if capped is not None:
        if len(capped) != len(predictions):
            raise ValueError(f"{len(predictions)} predictions but {len(capped)} ends")
        report["capped_rate"] = sum(map(bool, capped)) / len(capped)
        report["eos_rate"] = 1.0 - report["capped_rate"]
    report.update(_describe(predictions))
    if references is not None:
        own = _describe([text for row in _as_lists(predictions, references) for text in row])
        report["mean_length_ratio"] = report["mean_length"] / own["mean_length"] if own["mean_length"] else 0.0
        report["reference_length"] = own["mean_length"]
        report["reference_histogram"] = own["length_histogram"]
        report["reference_foreign_rate"] = own["foreign_rate"]
        report["reference_proper_ending_rate"] = own["proper_ending_rate"]
    return report


def ending_metrics(
    predictions: Sequence[str], ended: Sequence[bool], references: References | None = None
) -> dict[str, float]:
    """The numbers of `ending_report` that belong in an evaluation row; `ended`: by the end token, not by the limit."""
    report = ending_report(predictions, references, capped=[not end for end in ended])
    return {key: report[key] for key in ENDING_KEYS if key in report}


def _describe(texts: Sequence[str]) -> dict:
    bare = [PLACEHOLDER.sub("", unicodedata.normalize("NFC", text)) for text in texts]
    letters = sum(c.isalpha() for text in bare for c in text)
    hangul = sum(len(_HANGUL.findall(text)) for text in bare)
    found = {name: [bool(pattern.search(text)) for text in bare] for name, pattern in _SCRIPTS.items()}
    lengths = [len(_squeeze(text)) for text in texts]
    histogram = [0] * _BINS
    for length in lengths:
        histogram[min(length // _BIN_WIDTH, _BINS - 1)] += 1
    rows = len(texts)
    return {
        "proper_ending_rate": sum(map(ends_properly, texts)) / rows,
        "empty_rate": lengths.count(0) / rows,
        "hangul_ratio": hangul / letters if letters else 0.0,
        "foreign_rate": sum(map(any, zip(*found.values(), strict=True))) / rows,
        **{f"{name}_rate": sum(hits) / rows for name, hits in found.items()},
        "mean_length": sum(lengths) / rows,
        "length_histogram": histogram,
    }


def ending_text(report: dict) -> str:
    """The report in at most 12 lines for people."""
    lines = [f"{report['rows']} summaries, mean length {report['mean_length']:.1f} characters"]
    if "mean_length_ratio" in report:
        lines[0] += f" ({report['mean_length_ratio']:.2f} of the references' {report['reference_length']:.1f})"
    if "capped_rate" in report:
        ended, cut = report["eos_rate"], report["capped_rate"]
        lines.append(f"ended by the end token {ended:.1%}, cut by the length limit {cut:.1%}")
    versus = "reference_length" in report
    endings = f" (references {report['reference_proper_ending_rate']:.1%})" if versus else ""
    lines.append(f"end like a sentence {report['proper_ending_rate']:.1%}{endings}, empty {report['empty_rate']:.1%}")
    foreign = f" (references {report['reference_foreign_rate']:.1%})" if versus else ""
    scripts = ", ".join(f"{name} {report[f'{name}_rate']:.1%}" for name in _SCRIPTS)
    lines.append(f"Hangul {report['hangul_ratio']:.1%} of letters")
    lines.append(f"rows with foreign letters {report['foreign_rate']:.1%}{foreign}: {scripts}")
    bins = [f"{i * _BIN_WIDTH}+" for i in range(_BINS)]
    table = [("characters", bins), ("summaries", report["length_histogram"])]
    if versus:
        table.append(("references", report["reference_histogram"]))
    lines += [f"{name:<11}" + "".join(f"{cell:>6}" for cell in cells) for name, cells in table]
    return "\n".join(lines)
