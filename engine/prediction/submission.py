"""Competition submissions: written like the given sample, and refused where they would not fit it."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.files import MAX_BYTES
from engine.errors import EngineError
from engine.runtime.atomic import write_text_atomically
from engine.scoring import baselines

log = logging.getLogger("engine.predict")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how cells begin that spreadsheets take for formulas (OWASP's list)
Table = list[list[Any]]  # the header, then one row per dialogue


def submission_table(ids: Sequence[str], summaries: Sequence[str], sample: str | Path | None = None) -> Table:
    """Header and rows in the sample's format: its columns (an unnamed index too), its ids, its order.

    Without a sample: `fname,summary`. In a sample, summaries stand in its column of that name, or the only one beside the ids.

    Raises:
        EngineError: E3 where an id is missing, unknown, repeated or out of order, a cell would be empty, or the sample has no
            columns for ids and summaries.
    """
    refuse_empty(ids, summaries, sample)
    if len(set(ids)) != len(ids):
        repeated = next(name for name in ids if list(ids).count(name) > 1)
        raise _refused(f"the id {repeated} occurs twice", _where(sample))
    if sample is None:
        return [["fname", "summary"], *([name, text] for name, text in zip(ids, summaries, strict=True))]
    fitting = Sample(sample, ids)
    return [fitting.header, *fitting.filled(summaries)]


class Sample:
    """A sample that fits the ids of the input: its header, and its rows with summaries in their place.

    Raises:
        EngineError: E3.35 where the sample cannot be read, has other ids or another order.
    """

    def __init__(self, path: str | Path, ids: Sequence[str]) -> None:
        self.header, self._rows = _read_sample(Path(path))
        id_at, self._summary_at = _columns(self.header, self._rows, set(ids), str(path))
        _check_ids([row[id_at] for row in self._rows], list(ids), str(path))

    def filled(self, summaries: Sequence[str], start: int = 0) -> Table:
        """Rows from `start` on, one for each summary."""
        at, rows = self._summary_at, self._rows[start : start + len(summaries)]
        return [[*row[:at], text, *row[at + 1 :]] for row, text in zip(rows, summaries, strict=True)]


def refuse_empty(ids: Sequence[str], summaries: Sequence[str], sample: str | Path | None = None) -> None:
    """Raises: EngineError E3.35 where a cell would be empty."""
    empty = [name for name, text in zip(ids, summaries, strict=True) if not str(text).strip()]
    if empty:
        raise _refused(f"{len(empty)} empty summaries, first {empty[0]}", _where(sample))


def without_empty(ids: Sequence[str], dialogues: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Texts with no empty cell: where the model wrote nothing, the dialogue's first two turns stand in, with a warning."""
    empty = [name for name, text in zip(ids, texts, strict=True) if not text.strip()]
    warn_of_empty(len(empty), empty)
    return [stand_in(dialogue, text) for dialogue, text in zip(dialogues, texts, strict=True)]


def stand_in(dialogue: str, text: str) -> str:
    return text if text.strip() else baselines.lead_baseline(dialogue)


def warn_of_empty(count: int, ids: Sequence[str]) -> None:
    if count:
        log.warning("%d empty summaries replaced by the dialogue's first two turns: %s", count, ", ".join(ids[:10]))


def csv_text(table: Table, *, escape_formulas: bool = False) -> str:
    """Rows of CSV; newlines and commas inside quoted cells.

    Args:
        escape_formulas: put a quote before cells that a spreadsheet would compute. Competition files must stay exact.
    """
    if escape_formulas:
        table = [[f"'{cell}" if str(cell).startswith(_FORMULA) else cell for cell in row] for row in table]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def write_submission(table: Table, path: Path) -> None:
    """UTF-8 CSV. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, csv_text(table))


def _where(sample: str | Path | None) -> str:
    return str(sample) if sample is not None else "submission"


def _read_sample(path: Path) -> tuple[list[str], Table]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")  # a pipe would be waited for, a device read for ever
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(f"it holds more than {MAX_BYTES >> 20} MiB")
        table = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _refused(f"the sample cannot be read: {error}", str(path)) from error
    if not table or not table[1:]:
        raise _refused("the sample has no rows", str(path))
    widths = {len(row) for row in table}
    if len(widths) != 1:
        raise _refused("the sample's rows differ in their number of columns", str(path))
    return table[0], table[1:]


def _columns(header: list[str], rows: Table, ids: set[str], where: str) -> tuple[int, int]:
    """Positions of the id and the summary column: the one called summary, or the only one beside the ids."""
    matching = [i for i, name in enumerate(header) if name and name != "summary" and rows[0][i] in ids]
    named = [i for i, name in enumerate(header) if name == "fname"]
    candidates = matching or named
    if not candidates:
        raise _refused(f"no column of the sample holds the input's ids (columns {', '.join(header)})", where)
    others = [i for i, name in enumerate(header) if name and i != candidates[0]]
    texts = [i for i in others if header[i] == "summary"] or others
    if len(texts) != 1:
        raise _refused(
            f"the sample has no column 'summary', and not one other than the ids: {', '.join(header)}", where
        )
    return candidates[0], texts[0]


def _check_ids(wanted: list[str], ids: list[str], where: str) -> None:
    if wanted == ids:
        return
    missing, unknown = set(wanted) - set(ids), set(ids) - set(wanted)
    if missing or unknown:
        parts = [
            f"{len(part)} ids {kind}, first {sorted(part)[0]}"
            for part, kind in ((missing, "missing"), (unknown, "not in the sample"))
            if part
        ]
        raise _refused("; ".join(parts), where)
    row = next(i for i, (a, b) in enumerate(zip(wanted, ids, strict=False)) if a != b)
    raise _refused(f"the order differs from row {row + 1} on: sample {wanted[row]}, input {ids[row]}", where)


def _refused(what: str, where: str) -> EngineError:
    return EngineError(
        "E3.35", what, where, "predict the file that the sample belongs to", safe="no submission was written"
    )
