"""Why summaries ended as they did: limits, sentence endings, scripts, lengths, in numbers and in words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from engine.scoring.rouge import PLACEHOLDER, References, as_lists, squeeze

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
    own = count_endings(predictions, capped)
    if references is None:
        return report_of(own)
    return report_of(own, count_endings([text for row in as_lists(predictions, references) for text in row]))


def count_endings(texts: Sequence[str], capped: Sequence[bool] | None = None) -> Counter[str]:
    """What `report_of` needs to know of the texts. Counts of parts add up to those of the whole (`Counter.update`)."""
    if capped is not None and len(capped) != len(texts):
        raise ValueError(f"{len(texts)} predictions but {len(capped)} ends")
    bare = [PLACEHOLDER.sub("", unicodedata.normalize("NFC", text)) for text in texts]
    found = {name: [bool(pattern.search(text)) for text in bare] for name, pattern in _SCRIPTS.items()}
    lengths = [len(squeeze(text)) for text in texts]
    counts = Counter(f"{min(length // _BIN_WIDTH, _BINS - 1)}. bin" for length in lengths)
    counts.update({name: sum(hits) for name, hits in found.items()})
    return counts + Counter(
        rows=len(texts),
        ends=0 if capped is None else len(capped),
        capped=sum(map(bool, capped or ())),
        proper=sum(map(ends_properly, texts)),
        empty=lengths.count(0),
        letters=sum(c.isalpha() for text in bare for c in text),
        hangul=sum(len(_HANGUL.findall(text)) for text in bare),
        foreign=sum(map(any, zip(*found.values(), strict=True))),
        length=sum(lengths),
    )


def report_of(own: Counter[str], references: Counter[str] | None = None) -> dict:
    """`ending_report` from counts of the predictions, and of the references where there are any."""
    if not own["rows"]:
        raise ValueError("no predictions to report on")
    report: dict = {"rows": own["rows"]}
    if own["ends"]:
        report["capped_rate"] = own["capped"] / own["ends"]
        report["eos_rate"] = 1.0 - report["capped_rate"]
    report |= _describe(own)
    if references is not None:
        theirs = _describe(references)
        report["mean_length_ratio"] = report["mean_length"] / theirs["mean_length"] if theirs["mean_length"] else 0.0
        report |= {"reference_length": theirs["mean_length"], "reference_histogram": theirs["length_histogram"]}
        report |= {f"reference_{name}": theirs[name] for name in ("foreign_rate", "proper_ending_rate")}
    return report


def ending_metrics(
    predictions: Sequence[str], ended: Sequence[bool], references: References | None = None
) -> dict[str, float]:
    """The numbers of `ending_report` that belong in an evaluation row; `ended`: by the end token, not by the limit."""
    report = ending_report(predictions, references, capped=[not end for end in ended])
    return {key: report[key] for key in ENDING_KEYS if key in report}


def _describe(counts: Counter[str]) -> dict:
    rates = {f"{name}_rate": counts[name] / counts["rows"] for name in ("foreign", *_SCRIPTS)}
    return {
        "proper_ending_rate": counts["proper"] / counts["rows"],
        "empty_rate": counts["empty"] / counts["rows"],
        "hangul_ratio": counts["hangul"] / counts["letters"] if counts["letters"] else 0.0,
        **rates,
        "mean_length": counts["length"] / counts["rows"],
        "length_histogram": [counts[f"{number}. bin"] for number in range(_BINS)],
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
