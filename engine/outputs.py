"""The files that prediction reads and writes: dialogues in; a table, JSON lines or a submission out."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import scoring
from engine.data import Example, read_split
from engine.errors import EngineError
from engine.postprocessing import PostprocessReport
from engine.submission import Table, submission_table, write_submission

if TYPE_CHECKING:
    from engine.decoding import Summary
    from engine.recipe import Recipe

log = logging.getLogger("engine.predict")


def read_input(path: str, recipe: Recipe) -> list[Example]:
    """Rows of a CSV, JSONL or parquet file, or dialogues from standard input (`-`), one per line with `\\n` for newlines.

    Raises:
        EngineError: E3 naming file and row.
    """
    if path == "-":
        lines = [line.rstrip("\n").replace("\\n", "\n") for line in sys.stdin if line.strip()]
        if not lines:
            raise EngineError("E3.32", "standard input holds no dialogue", "-", next="write one dialogue per line")
        return [Example(id=str(i), dialogue=text, references=(), topic=None, row=i + 1) for i, text in enumerate(lines)]
    return read_split(recipe.data, path, require_summary=False)


def check_target(examples: Sequence[Example], options: argparse.Namespace) -> None:
    """Refuse before decoding what could not be written afterwards: a sample that does not fit, a folder that is none."""
    folder = Path(options.output).parent
    if folder.exists() and not folder.is_dir():
        raise EngineError(
            "E6.10", "the output's folder is a file", str(folder), "nothing was decoded", "choose another --output"
        )
    if options.sample_submission is not None:
        ids = [example.id for example in examples]
        submission_table(ids, ["?"] * len(ids), options.sample_submission)


def write(
    examples: Sequence[Example], summaries: Sequence[Summary], options: argparse.Namespace, recipe: Recipe
) -> None:
    """Write the output file and tell scores and how the texts ended."""
    texts = _without_empty(examples, summaries)
    output = Path(options.output)
    ids = [example.id for example in examples]
    if options.sample_submission is not None:
        write_submission(submission_table(ids, texts, options.sample_submission), output)
    elif output.suffix == ".jsonl":
        _write_jsonl(output, _n_best(examples, summaries, texts))
    elif len(summaries[0].texts) > 1:
        write_submission(_n_best_table(examples, summaries, texts), output)
    else:
        write_submission(submission_table(ids, texts), output)
    log.info("%d summaries in %s", len(texts), output)
    _tell(examples, summaries, texts, recipe)


def _without_empty(examples: Sequence[Example], summaries: Sequence[Summary]) -> list[str]:
    """Texts with no empty cell: where the model wrote nothing, the dialogue's first two turns stand in, and are told."""
    empty = [example.id for example, summary in zip(examples, summaries, strict=True) if not summary.text.strip()]
    if empty:
        log.warning(
            "%d empty summaries replaced by the dialogue's first two turns: %s", len(empty), ", ".join(empty[:10])
        )
    return [
        summary.text if summary.text.strip() else scoring.lead_baseline(example.dialogue)
        for example, summary in zip(examples, summaries, strict=True)
    ]


def _n_best(examples: Sequence[Example], summaries: Sequence[Summary], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "fname": example.id,
            "rank": rank,
            "summary": texts[row] if rank == 1 else text,
            "score": score,
        }
        for row, (example, summary) in enumerate(zip(examples, summaries, strict=True))
        for rank, (text, score) in enumerate(zip(summary.texts, summary.scores, strict=True), start=1)
    ]


def _n_best_table(examples: Sequence[Example], summaries: Sequence[Summary], texts: Sequence[str]) -> Table:
    rows = _n_best(examples, summaries, texts)
    cells = [
        [str(row["fname"]), str(row["rank"]), row["summary"], "" if row["score"] is None else repr(row["score"])]
        for row in rows
    ]
    return [["fname", "rank", "summary", "score"], *cells]


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def _tell(examples: Sequence[Example], summaries: Sequence[Summary], texts: list[str], recipe: Recipe) -> None:
    references = [example.references for example in examples]
    scored = all(references)
    if scored:
        scores = scoring.rouge(texts, references, tokenizer=recipe.evaluation.rouge_tokenizer)
        values = "  ".join(f"{key} {scores[key]:.2f}" for key in ("rouge1", "rouge2", "rougeL", "rouge_mean"))
        print(f"{values}  ({scores['rouge_tokenizer_version']})")
    report = scoring.ending_report(texts, references if scored else None, [not summary.ended for summary in summaries])
    print(scoring.ending_text(report))
    fixes = PostprocessReport()
    for summary in summaries:
        fixes.add(summary.fired)
    if fixes.fired:
        print(fixes)
