"""Rows that need not fit in memory: checked in one pass over the file, handed out in others.

The checks are those of `rows.py`, with the same messages, and come before the first row is handed out. Only the ids are kept
meanwhile, in a database in the temporary folder: their own length and some ten bytes for each row, on the disk.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.files import DataFile, Record
from engine.data.rows import (
    SHOWN_ROWS,
    BadRow,
    Columns,
    Example,
    UnusableRow,
    check_columns,
    checked,
    example_of,
    report_bad_rows,
    rows_fingerprint,
    shown,
)
from engine.errors import EngineError
from engine.runtime.atomic import storage_error

if TYPE_CHECKING:
    from engine.recipe.schema import Data


class ExampleList:
    """Rows that are in memory anyway, under the names of an `ExampleFile`."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self._rows = rows
        self.count, self.fingerprint = len(rows), rows_fingerprint(rows)
        self.scored = all(row.references for row in rows)

    def examples(self, start: int = 0, stop: int | None = None) -> Iterator[Example]:
        return islice(self._rows, start, stop)


class ExampleFile:
    """The usable rows of a data file, without a need for summaries. Making it reads and checks the whole file.

    Attributes:
        count: of usable rows.
        fingerprint: `rows_fingerprint` of them.
        scored: every one has a reference.

    Raises:
        EngineError: as `read_examples`, but for the limits of what is held in memory; E6.1 where the temporary folder is full.
    """

    def __init__(self, path: str | Path, settings: Data) -> None:
        self._columns = Columns.of(settings, require_summary=False)
        self._shown = shown(path, 200)
        self._file = DataFile(path, encoding=settings.encoding, columns=self._columns.wanted)
        self._state = self._file_state()
        self.count, self.scored = 0, True
        self._dropped: set[int] = set()
        self._scan(settings)

    def examples(self, start: int = 0, stop: int | None = None) -> Iterator[Example]:
        """Rows `start` to `stop` of the usable ones. Raises: EngineError E3.11 where the file is not what was checked."""
        records = (record for record in self._file.records() if record.row not in self._dropped)
        try:
            for record in islice(records, start, stop):
                yield example_of(record, self._columns, self._shown)
        except UnusableRow as problem:
            raise self._changed() from problem
        if self._file_state() != self._state:
            raise self._changed()

    def _scan(self, settings: Data) -> None:
        bad: list[str] = []
        kept = max(SHOWN_ROWS, settings.max_bad_rows)
        bad_count = good_records = 0

        def counted(records: Iterable[Record]) -> Iterator[Record]:
            nonlocal good_records
            for record in records:
                good_records += record.problem is None
                yield record

        def good() -> Iterator[Example]:
            nonlocal bad_count
            for row in checked(counted(self._file.records()), self._columns, self._shown, _RowsOfIds()):
                if not isinstance(row, BadRow):
                    self.count, self.scored = self.count + 1, self.scored and bool(row.references)
                    yield row
                    continue
                bad_count += 1
                if bad_count <= kept:
                    bad.append(row.text)
                    self._dropped.add(row.row)

        self.fingerprint = rows_fingerprint(good())
        if not self.count + bad_count:
            raise EngineError("E3.6", "the file has no data rows", self._shown, "check the file")
        check_columns(self._file.columns, self._columns, self._shown, named=good_records > 0)
        if bad_count:
            report_bad_rows(bad, bad_count, self._shown, settings)
        if not self.count:
            raise EngineError("E3.6", "no usable row is left", self._shown, "check the file")

    def _file_state(self) -> tuple[int, int]:
        status = os.stat(self._file.path)
        return status.st_size, status.st_mtime_ns

    def _changed(self) -> EngineError:
        what = "the file changed while it was read"
        return EngineError("E3.11", what, self._shown, "run again with a file that stays", safe="decoded rows are kept")


class _RowsOfIds:
    """First row of each id, as `dict.setdefault` gives it, in a database that leaves memory once it has 2 MB."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")  # a temporary file, which goes with the connection
        self._execute("PRAGMA journal_mode = OFF")
        self._execute("CREATE TABLE ids (id TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID")

    def setdefault(self, name: str, row: int) -> int:
        if self._execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", name, row).rowcount:
            return row
        return self._execute("SELECT row FROM ids WHERE id = ?", name).fetchone()[0]

    def _execute(self, statement: str, *values: str | int) -> sqlite3.Cursor:
        try:
            return self._base.execute(statement, values)
        except sqlite3.Error as error:
            place = Path(os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
            advice = "free some space, or set SQLITE_TMPDIR to another folder"
            raise storage_error(error, place, "keeping the ids", "nothing was started", advice) from error
