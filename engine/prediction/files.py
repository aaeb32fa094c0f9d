"""The files that prediction reads and writes: dialogues in; a table, JSON lines or a submission out."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.rows import Example, read_examples
from engine.errors import EngineError
from engine.prediction.postprocess import repairs_text
from engine.prediction.submission import submission_table, without_empty, write_submission
from engine.runtime.atomic import storage_error, write_text_atomically
from engine.scoring import endings, rouge

if TYPE_CHECKING:
    from engine.prediction.summarizer import Summary
    from engine.recipe.schema import Recipe

log = logging.getLogger("engine.predict")
_ELSEWHERE = "free some space or choose another --output, then run again"
# A CSV under such a name would mislead whoever opens it.
_OTHER_FORMATS = {".parquet", ".pq", ".json", ".xlsx", ".gz", ".zip"}


def read_input(path: str, recipe: Recipe) -> list[Example]:
    """Rows of a CSV, JSONL or parquet file, or dialogues from standard input (`-`), one per line with `\\n` for newlines.

    Raises:
        EngineError: E3 naming file and row.
    """
    if path == "-":
        lines = [line.rstrip("\n").replace("\\n", "\n") for line in sys.stdin if line.strip()]
        if not lines:
            raise EngineError("E3.32", "standard input holds no dialogue", "-", "write one dialogue per line")
        return examples_of(lines, file="standard input")
    return read_examples(path, recipe.data, require_summary=False)


def examples_of(dialogues: Sequence[str], topics: Sequence[str] | None = None, *, file: str = "") -> list[Example]:
    """Rows of dialogues that came without a table. Raises: EngineError E3.31 naming the first that is no text."""
    for row, dialogue in enumerate(dialogues, start=1):
        if not isinstance(dialogue, str) or not dialogue.strip() or not _is_unicode(dialogue):
            what = f"dialogue {row} is empty or no text"
            raise EngineError("E3.31", what, f"{file} row {row}".strip(), "leave it out or fill it")
    return [
        Example(id=str(i), dialogue=text, references=(), topic=topic, row=i + 1, file=file)
        for i, (text, topic) in enumerate(zip(dialogues, topics or [None] * len(dialogues), strict=True))
    ]


def _is_unicode(text: str) -> bool:
    """No half characters (lone surrogates), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_target(examples: Sequence[Example], options: argparse.Namespace) -> None:
    """Refuse before decoding what could not be written afterwards, and make the output's folder.

    Raises:
        EngineError: E2 for a name that is no CSV or JSONL file or is the input's, E3 for a sample that does not fit, E6 for a
            place that cannot be written.
    """
    output = Path(options.output)
    no_file = options.output == "-" or (output.exists() and not output.is_file())  # devices would be replaced
    if no_file or output.suffix.lower() in _OTHER_FORMATS:
        what = f"predictions are written as CSV, or as JSON lines to a name in .jsonl, not to {options.output}"
        raise EngineError("E2.37", what, "--output", "choose another --output", safe="nothing was decoded")
    if options.input != "-" and output.exists() and output.samefile(options.input):
        what = "the output would replace the input"
        raise EngineError("E2.38", what, str(output), "choose another --output", safe="nothing was decoded")
    sample = options.sample_submission
    if sample is not None and output.exists() and Path(sample).exists() and output.samefile(sample):
        what = "the output would replace the sample"
        raise EngineError("E2.38", what, str(output), "choose another --output", safe="nothing was decoded")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise storage_error(error, output, "preparing the output", "nothing was decoded", _ELSEWHERE) from error
    if options.sample_submission is not None:
        ids = [example.id for example in examples]
        submission_table(ids, ["?"] * len(ids), options.sample_submission)


def write(
    examples: Sequence[Example], summaries: Sequence[Summary], options: argparse.Namespace, recipe: Recipe
) -> None:
    """Write the output file; print scores and how the texts ended. Raises: EngineError E6 where it cannot be written."""
    ids, output = [example.id for example in examples], Path(options.output)
    texts = without_empty(ids, [example.dialogue for example in examples], [summary.text for summary in summaries])
    try:
        _write_file(ids, summaries, texts, output, options)
    except OSError as error:
        kept = "decoded rows are kept beside it"
        raise storage_error(error, output, "writing the output", kept, _ELSEWHERE) from error
    log.info("%d summaries in %s", len(texts), output)
    _print_scores(examples, summaries, texts, recipe)


def _write_file(
    ids: list[str], summaries: Sequence[Summary], texts: list[str], output: Path, options: argparse.Namespace
) -> None:
    escape = options.escape_formulas
    if options.sample_submission is not None:
        write_submission(submission_table(ids, texts, options.sample_submission), output, escape_formulas=escape)
    elif output.suffix.lower() == ".jsonl":
        rows = _n_best(ids, summaries, texts)
        write_text_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif len(summaries[0].texts) > 1:
        rows = _n_best(ids, summaries, texts)
        write_submission([list(rows[0]), *(list(row.values()) for row in rows)], output, escape_formulas=escape)
    else:
        write_submission(submission_table(ids, texts), output, escape_formulas=escape)


def _n_best(ids: Sequence[str], summaries: Sequence[Summary], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Every hypothesis of every row, best first; the best one as it is submitted, never empty."""
    return [
        {"fname": name, "rank": rank, "summary": best if rank == 1 else text, "score": score}
        for name, best, summary in zip(ids, texts, summaries, strict=True)
        for rank, (text, score) in enumerate(zip(summary.texts, summary.scores, strict=True), start=1)
    ]


def _print_scores(examples: Sequence[Example], summaries: Sequence[Summary], texts: list[str], recipe: Recipe) -> None:
    references = [example.references for example in examples]
    scored = all(references)
    if scored:
        scores = rouge.rouge(texts, references, tokenizer=recipe.evaluation.rouge_tokenizer)
        values = "  ".join(f"{key} {scores[key]:.2f}" for key in ("rouge1", "rouge2", "rougeL", "rouge_mean"))
        print(f"{values}  ({scores['rouge_tokenizer_version']})")
    report = endings.ending_report(texts, references if scored else None, [not summary.ended for summary in summaries])
    print(endings.ending_text(report))
    if repairs := repairs_text([summary.fired for summary in summaries]):
        print(repairs)
