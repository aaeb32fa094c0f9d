"""Rows that a tool writes for training: CSV or JSON lines, under the column names of the recipe that will read them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.runtime.atomic import refuse_existing, storage_error, written_atomically

if TYPE_CHECKING:
    from engine.data.rows import Example
    from engine.recipe.schema import Data, Recipe


def spaced(dialogue: str) -> str:
    """The dialogue with single spaces: by this the engine tells whether two rows have the same one."""
    return " ".join(dialogue.split())


def as_row(example: Example, settings: Data, **provenance: Any) -> dict[str, Any]:
    """A row under the recipe's column names, and what else is to be known of it. Ids get a column `id` if it names none.

    Every row has all columns: a summary that it lacks is an empty cell, which the reader takes for a missing one.
    """
    summaries = [settings.summary_column] if isinstance(settings.summary_column, str) else settings.summary_column
    row = {settings.id_column or "id": example.id, settings.text_column: example.dialogue}
    row |= dict.fromkeys(summaries, "") | dict(zip(summaries, example.references, strict=False))
    if settings.topic_column is not None:
        row[settings.topic_column] = example.topic or ""
    return row | provenance


def json_lines(rows: Iterable[dict[str, Any]], *, ascii_only: bool = False) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


def check_output(path: Path) -> None:
    """Raises: EngineError E2.37 for a name that is no CSV's or JSONL's, E2.63 where something is there already."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        what = f"rows are written as CSV or JSON lines, to a name in .csv or .jsonl, not to {path}"
        raise EngineError("E2.37", what, "--output", "choose another --output", safe="nothing was written")
    refuse_existing(path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write the file, whole or not at all; how many rows. The first row names the columns of a CSV.

    Raises: EngineError E6.1 where the disk refuses.
    """
    rows, count = iter(rows), 0
    first = next(rows, None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as handle:
            table = csv.DictWriter(handle, first or (), lineterminator="\n", restval="")
            is_csv = path.suffix.lower() == ".csv"
            if is_csv:
                table.writeheader()
            for row in chain([first] if first else [], rows):
                table.writerow(row) if is_csv else handle.write(json_lines([row]))
                count += 1
    except OSError as error:
        raise storage_error(error, path, "writing the rows", "the input is untouched", "free some space") from error
    return count


def files_named(recipe: Recipe, keys: Sequence[str]) -> dict[str, str]:
    """Those of the recipe's data files that it names, by key."""
    return {key: file for key in keys if (file := getattr(recipe.data, key)) is not None}


def same_file(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()
