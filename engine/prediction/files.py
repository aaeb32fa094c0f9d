"""The files that prediction reads and writes: dialogues in; a table, JSON lines or a submission out."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.rows import Example, is_missing
from engine.data.stream import ExampleFile, ExampleList
from engine.errors import EngineError
from engine.prediction.postprocess import repairs_text
from engine.prediction.submission import Sample, csv_text, refuse_empty, stand_in, warn_of_empty
from engine.runtime.atomic import storage_error, written_atomically
from engine.scoring import endings, rouge

if TYPE_CHECKING:
    from engine.prediction.summarizer import Summary
    from engine.recipe.schema import Recipe
    from engine.runtime.ranks import RankGroup

log = logging.getLogger("engine.predict")
_ELSEWHERE = "free some space or choose another --output, then run again"
# A CSV under such a name would mislead whoever opens it.
_OTHER_FORMATS = {".parquet", ".pq", ".json", ".xlsx", ".gz", ".zip"}


def open_input(path: str, recipe: Recipe, ranks: RankGroup) -> ExampleFile | ExampleList:
    """Rows of a CSV, JSONL or parquet file, checked in full but not held; or dialogues from standard input (`-`), one per line
    with `\\n` for newlines, which are.

    All ranks call it: they have one standard input, which rank 0 reads for all.

    Raises:
        EngineError: E3 naming file and row.
    """
    if path != "-":
        return ExampleFile(path, recipe.data)
    with ranks.together("reading standard input"):
        lines = _standard_input() if ranks.is_main else None
    return ExampleList(examples_of(ranks.broadcast(lines), file="standard input"))


def _standard_input() -> list[str]:
    lines = [line.rstrip("\n").replace("\\n", "\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise EngineError("E3.32", "standard input holds no dialogue", "-", "write one dialogue per line")
    return lines


def examples_of(dialogues: Sequence[str], topics: Sequence[Any] | None = None, *, file: str = "") -> list[Example]:
    """Rows of dialogues that came without a table; missing topics, as in a file, are None.

    Raises: EngineError E3.31 naming the first that is no text.
    """
    topics = [None if is_missing(topic) else topic for topic in topics or [None] * len(dialogues)]
    for row, (dialogue, topic) in enumerate(zip(dialogues, topics, strict=True), start=1):
        wrong = [] if _is_text(dialogue) and dialogue.strip() else [f"dialogue {row} is empty or no text"]
        wrong += [] if topic is None or _is_text(topic) else [f"topic {row} is no text"]
        if wrong:
            raise EngineError("E3.31", wrong[0], f"{file} row {row}".strip(), "leave it out or fill it")
    return [
        Example(id=str(i), dialogue=text, references=(), topic=topic and topic.strip(), row=i + 1, file=file)
        for i, (text, topic) in enumerate(zip(dialogues, topics, strict=True))
    ]


def _is_text(value: Any) -> bool:
    """Also without half characters (lone surrogates), which no tokenizer takes."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def check_names(options: argparse.Namespace) -> None:
    """Refuse an output before the input is read: E2.37 no CSV or JSONL file, E2.38 the input's or the sample's."""
    output = Path(options.output)
    no_file = options.output == "-" or (output.exists() and not output.is_file())  # devices would be replaced
    if no_file or output.suffix.lower() in _OTHER_FORMATS:
        what = f"predictions are written as CSV, or as JSON lines to a name in .jsonl, not to {options.output}"
        raise EngineError("E2.37", what, "--output", "choose another --output", safe="nothing was decoded")
    for what, other in (("input", options.input), ("sample", options.sample_submission)):
        if other not in (None, "-") and output.exists() and Path(other).exists() and output.samefile(other):
            what = f"the output would replace the {what}"
            raise EngineError("E2.38", what, str(output), "choose another --output", safe="nothing was decoded")


def check_target(source: ExampleFile | ExampleList, options: argparse.Namespace) -> Sample | None:
    """Make the output's folder, and read the sample if there is one.

    Raises:
        EngineError: E3.35 for a sample that does not fit, E6.1 for a place that cannot be written.
    """
    output = Path(options.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise storage_error(error, output, "preparing the output", "nothing was decoded", _ELSEWHERE) from error
    if options.sample_submission is None:
        return None
    return Sample(options.sample_submission, [example.id for example in source.examples()])


Decoded = Callable[
    [], Iterable[Sequence["Summary"]]
]  # the summaries in order, some at a time; from the first at each call


def write(
    source: ExampleFile | ExampleList,
    decoded: Decoded,
    options: argparse.Namespace,
    recipe: Recipe,
    sample: Sample | None = None,
) -> None:
    """Write the output file; print scores and how the texts ended. Raises: EngineError E6 where it cannot be written."""
    output, report = Path(options.output), _Report()
    try:
        with written_atomically(output) as handle:
            for part in _parts(source, decoded):
                handle.write(_text_of(part, output, options, sample))
                report.add(part)
    except OSError as error:
        kept = "decoded rows are kept beside it"
        raise storage_error(error, output, "writing the output", kept, _ELSEWHERE) from error
    warn_of_empty(report.empty, report.empty_ids)
    log.info("%d summaries in %s", report.rows, output)
    if source.scored:
        print(_scores(_parts(source, decoded), recipe.evaluation.rouge_tokenizer))
    report.print(source.scored)


@dataclass
class _Part:
    """Rows that follow each other, the first of them number `start` (from 0); `texts`: as they are submitted, never empty."""

    start: int
    examples: list[Example]
    summaries: Sequence[Summary]

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    @cached_property
    def texts(self) -> list[str]:
        return [stand_in(row.dialogue, done.text) for row, done in zip(self.examples, self.summaries, strict=True)]


def _parts(source: ExampleFile | ExampleList, decoded: Decoded) -> Iterator[_Part]:
    """Each row of the input with its summaries. Raises: EngineError E1.3 unless every row is there once, in order."""
    examples = source.examples()
    start = 0
    for summaries in decoded():
        part = _Part(start, list(islice(examples, len(summaries))), summaries)
        if [summary.index for summary in summaries] != list(range(start, start + len(part.examples))):
            break
        yield part
        start += len(summaries)
    if start != source.count or next(examples, None) is not None:
        what = f"{start} of {source.count} rows are in order; each must be there once"
        raise EngineError("E1.3", what, "writing the output", "please report this")


def _text_of(part: _Part, output: Path, options: argparse.Namespace, sample: Sample | None) -> str:
    """A part of the output file, with the header if it is the first."""
    if sample is not None:
        refuse_empty(part.ids, part.texts, options.sample_submission)
        header, table = sample.header, sample.filled(part.texts, part.start)
    elif output.suffix.lower() == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _n_best(part))
    elif len(part.summaries[0].texts) > 1:
        rows = _n_best(part)
        header, table = list(rows[0]), [list(row.values()) for row in rows]
    else:
        refuse_empty(part.ids, part.texts)
        header, table = ["fname", "summary"], [list(row) for row in zip(part.ids, part.texts, strict=True)]
    return csv_text([header] * (part.start == 0) + table, escape_formulas=options.escape_formulas)


def _n_best(part: _Part) -> list[dict[str, Any]]:
    """Every hypothesis of every row, best first; the best one as it is submitted."""
    return [
        {"fname": name, "rank": rank, "summary": best if rank == 1 else text, "score": score}
        for name, best, summary in zip(part.ids, part.texts, part.summaries, strict=True)
        for rank, (text, score) in enumerate(zip(summary.texts, summary.scores, strict=True), start=1)
    ]


class _Report:
    """How the texts ended, counted part by part."""

    def __init__(self) -> None:
        self.rows = self.empty = 0
        self.empty_ids: list[str] = []
        self._own: Counter[str] = Counter()
        self._references: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()

    def add(self, part: _Part) -> None:
        empty = [name for name, summary in zip(part.ids, part.summaries, strict=True) if not summary.text.strip()]
        self.rows, self.empty = self.rows + len(part.examples), self.empty + len(empty)
        self.empty_ids += empty[: 10 - len(self.empty_ids)]
        self._own.update(endings.count_endings(part.texts, [not summary.ended for summary in part.summaries]))
        self._references.update(endings.count_endings([text for row in part.examples for text in row.references]))
        self._repairs.update(rule for summary in part.summaries for rule in summary.fired)

    def print(self, scored: bool) -> None:
        print(endings.ending_text(endings.report_of(self._own, self._references if scored else None)))
        if repairs := repairs_text(self._repairs, self.rows):
            print(repairs)


def _scores(parts: Iterable[_Part], tokenizer: str) -> str:
    """One line with the means over all rows."""
    sums: Counter[str] = Counter()
    rows = 0
    for part in parts:
        for row in rouge.rouge_rows(part.texts, [example.references for example in part.examples], tokenizer):
            sums.update(row)
            rows += 1
    scores = rouge.mean_scores([{name: total / rows for name, total in sums.items()}], tokenizer)
    values = "  ".join(f"{key} {scores[key]:.2f}" for key in ("rouge1", "rouge2", "rougeL", "rouge_mean"))
    return f"{values}  ({scores['rouge_tokenizer_version']})"
