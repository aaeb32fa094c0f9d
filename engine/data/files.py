"""Read a data file: decompress, decode, parse to records, one at a time or all. What columns mean is `engine/data/rows.py`'s.

Structure that cannot be parsed is an error of the file. What can be pinned on one row (too few fields, a line that is no
JSON, bytes that are not UTF-8) becomes that record's problem, so that all such rows are reported at once.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engine.data.encodings import find_encoding
from engine.errors import EngineError

FORMATS = (".csv", ".jsonl", ".json", ".parquet")
# What a file may hold that is read whole. A run keeps every row in memory, at up to ten times its bytes; more than this is an
# accident, or meant to fill the memory.
MAX_BYTES = 512 << 20  # of text, after decompression
MAX_ROWS = 2_000_000
MAX_VALUES = 20_000_000  # brackets of JSON; each becomes an object of at least 56 bytes
# What any file may hold, also one that is read row by row.
MAX_LINE = 64 << 20  # characters of a line, or of a CSV cell
_MAX_NAMES = 10_000  # columns that are remembered of JSON objects
_BLOCK = 1 << 20
NUL = "\udc00"  # stands for a NUL byte in CSV records: the parser of Python 3.10 refuses the whole file instead
_FOREIGN = {
    b"\x1f\x8b": "gzip data; end its name in .gz",
    b"PAR1": "parquet; end its name in .parquet",
    b"PK\x03\x04": "a zip archive or spreadsheet; save it as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet; save it as CSV in UTF-8",
}


@dataclass(slots=True)
class Record:
    """One data row. `problem` says why it cannot be used; `values` is then empty."""

    row: int  # 1-based, without the header
    line: int | None  # first physical line in the file, 1-based
    values: dict[str, Any]
    problem: str | None = None


@dataclass(slots=True)
class RawTable:
    """All records of a file, not yet checked. `columns` is empty where the file has none to name."""

    columns: list[str]
    records: list[Record]


class DataFile:
    """CSV, JSONL, a JSON array or parquet, the text formats also with `.gz`, whose records can be read more than once.

    Args:
        encoding: "auto" tries UTF-8 (with or without BOM), then CP949.
        columns: the wanted ones; others are left out of parquet records.
        whole: the records will be held in memory, so the whole file must fit there.

    Attributes:
        columns: known once the first record is read; those of JSON objects grow with the records. Empty where the file has
            none to name.

    Raises:
        EngineError: E3.1 no readable file, E3.2 encoding, E3.3 format, E3.8 a compressed stream that breaks off, E3.10 size.
    """

    def __init__(
        self, path: str | Path, *, encoding: str = "auto", columns: Iterable[str], whole: bool = False
    ) -> None:
        self.path, self.wanted, self.whole = Path(path), frozenset(columns), whole
        self.columns: list[str] = []
        _check_file(self.path)
        self.kind = _kind(self.path)
        if self.kind != ".parquet":
            _check_content(next(self._blocks(), b""), self.path)
            self._encoding, self._errors = find_encoding(self._blocks, encoding, _shown_path(self.path))

    def records(self) -> Iterator[Record]:
        """The rows in order. JSON arrays are read whole all the same."""
        self.columns = []
        if self.kind == ".parquet":
            yield from self._parquet()
        elif self.kind == ".csv":
            with self._text("") as stream:
                yield from self._csv(_lines(stream, self.path))
        else:
            yield from self._json()

    def _open(self) -> IO[bytes]:
        return gzip.open(self.path) if self.path.suffix.lower() == ".gz" else self.path.open("rb")

    def _blocks(self) -> Iterator[bytes]:
        size = 0
        with _readable(self.path), self._open() as stream:
            while block := stream.read(_BLOCK):
                size += len(block)  # by contents: what a file says of its size need not be so
                if self.whole and size > MAX_BYTES:
                    raise _too_large(self.path, f"{MAX_BYTES >> 20} MiB of text")
                yield block

    @contextmanager
    def _text(self, newline: str) -> Iterator[io.TextIOWrapper]:
        with _readable(self.path), self._open() as raw:
            yield io.TextIOWrapper(raw, encoding=self._encoding, errors=self._errors, newline=newline)

    # CSV

    def _csv(self, lines: Iterable[str]) -> Iterator[Record]:
        former = csv.field_size_limit(MAX_LINE)  # the parser's own limit is 131,072 characters
        try:
            yield from self._csv_records(line.replace("\x00", NUL) for line in lines)
        finally:
            csv.field_size_limit(former)

    def _csv_records(self, lines: Iterable[str]) -> Iterator[Record]:
        reader = csv.reader(lines, strict=True)
        row = 0
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise EngineError(
                    "E3.3",
                    f"not valid CSV: {error}; the record begins at line {line}",
                    f"{_shown_path(self.path)} row {row + 1} (line {line})",
                    'quote cells with newlines or quotes in them, and write " as ""',
                ) from error
            if not fields:
                continue  # a blank line
            if not self.columns:
                self.columns = fields
                continue
            row += 1
            if len(fields) == len(self.columns):
                yield Record(row, line, dict(zip(self.columns, fields, strict=True)))
            else:
                yield Record(row, line, {}, f"{len(fields)} fields instead of {len(self.columns)}")

    # JSON

    def _json(self) -> Iterator[Record]:
        names: dict[str, None] = {}
        with self._text("\n") as stream:  # U+2028 and a lone CR may stand inside a string
            array = _first_character(stream) == "["
            stream.seek(0)
            records = self._json_array(stream) if array else self._json_lines(_lines(stream, self.path))
            for record in records:
                if not names.keys() >= record.values.keys():
                    few = len(names) < _MAX_NAMES
                    names |= dict.fromkeys(name for name in record.values if few or name in self.wanted)
                    self.columns = list(names)
                yield record

    def _json_lines(self, lines: Iterable[str]) -> Iterator[Record]:
        row = values = 0
        good = False
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row, values = row + 1, line.count("[") + line.count("{") + (values if self.whole else 0)
            if values > MAX_VALUES:
                raise _too_large(self.path, f"{MAX_VALUES:,} lists and objects")
            record = Record(row, number, {})
            try:
                value = json.loads(line.removesuffix("\n"), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                record.problem = f"not valid JSON ({_reason(error)})"
            else:
                _fill(record, value)
            good = good or record.problem is None
            yield record
        if self.kind == ".json" and row and not good:
            raise EngineError(
                "E3.3",
                "neither an array of objects nor one object per line",
                _shown_path(self.path),
                'write [{"dialogue": ...}, ...] or one object per line',
            )

    def _json_array(self, stream: IO[str]) -> Iterator[Record]:
        text = stream.read(MAX_BYTES + 1).removeprefix("\ufeff")
        if len(text) > MAX_BYTES:
            raise _too_large(self.path, f"{MAX_BYTES >> 20} MiB in one JSON array")
        if text.count("[") + text.count("{") > MAX_VALUES:
            raise _too_large(self.path, f"{MAX_VALUES:,} lists and objects")
        try:
            values = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            what = f"not valid JSON: {_reason(error)}"
            raise EngineError("E3.3", what, _shown_path(self.path), "correct the file") from error
        for row, value in enumerate(values, start=1):
            record = Record(row, None, {})
            _fill(record, value)
            yield record

    # Parquet

    def _parquet(self) -> Iterator[Record]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise EngineError(
                "E3.3", "parquet needs pyarrow", _shown_path(self.path), "pip install pyarrow, or use CSV"
            ) from error
        try:
            schema = pyarrow.parquet.read_schema(self.path)
            self.columns = list(schema.names)
            wanted = [name for name in self.columns if name in self.wanted]
            texts = [name for name in wanted if pyarrow.types.is_string(schema.field(name).type)]
            # As a dictionary, a text that stands in a million rows is in memory once; one of texts that differ grows with them.
            dictionary = texts if self.whole else None
            with pyarrow.parquet.ParquetFile(self.path, read_dictionary=dictionary, buffer_size=_BLOCK) as file:
                rows = self._parquet_rows(file, wanted) if wanted else ()
                yield from (Record(row, None, values) for row, values in enumerate(rows, start=1))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise EngineError(
                "E3.3", f"not readable as parquet: {error}", _shown_path(self.path), "write the file again"
            ) from error

    def _parquet_rows(self, file: Any, wanted: list[str]) -> Iterator[dict[str, Any]]:
        """Rows of the wanted columns, counted and weighed before they become Python's."""
        if self.whole and file.metadata.num_rows > MAX_ROWS:
            raise _too_large(self.path, f"{MAX_ROWS:,} rows")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        sizes = [group.column(at).total_uncompressed_size for group in groups for at in range(group.num_columns)]
        if self.whole and sum(sizes) > MAX_BYTES:
            raise _too_large(self.path, f"{MAX_BYTES >> 20} MiB")
        weight = 0
        for batch in file.iter_batches(batch_size=1024 if self.whole else 128, columns=wanted):
            weight = sum(_weight(column) for column in batch.columns) + (weight if self.whole else 0)
            if weight > MAX_BYTES:
                raise _too_large(self.path, f"{MAX_BYTES >> 20} MiB of text")
            yield from batch.to_pylist()


def read_table(path: str | Path, *, encoding: str = "auto", columns: Iterable[str]) -> RawTable:
    """All records of a file, which is refused where they would not fit in memory. Arguments and errors as of `DataFile`."""
    file = DataFile(path, encoding=encoding, columns=columns, whole=True)
    records: list[Record] = []
    for record in file.records():
        if len(records) == MAX_ROWS:
            raise _too_large(file.path, f"{MAX_ROWS:,} rows")
        records.append(record)
    return RawTable(file.columns, records)


def _check_file(path: Path) -> None:
    try:
        if path.is_file():
            return
        reason = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, ValueError) as error:
        raise EngineError("E3.1", f"file cannot be read: {error}", _shown_path(path), "check the path") from error
    near = difflib.get_close_matches(path.name, siblings, n=1) if reason == "does not exist" else []
    advice = f"did you mean {near[0]}?" if near else "check the path"
    raise EngineError("E3.1", f"data file {reason}", _shown_path(path), advice)


def _shown_path(path: Path) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(path))


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    kind = Path(name).suffix
    if kind not in FORMATS or (kind == ".parquet" and path.name.lower().endswith(".gz")):
        raise EngineError(
            "E3.3",
            f"unknown format {kind or path.name!r}; readable are {', '.join(FORMATS)}, the text formats also with .gz",
            _shown_path(path),
            "convert the file or correct its name",
        )
    return kind


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Failures to read the file's bytes as errors of that file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"the compressed stream breaks off: {error}"
        raise EngineError("E3.8", what, _shown_path(path), "copy or download the file again") from error
    except OSError as error:
        raise EngineError("E3.1", f"file cannot be read: {error}", _shown_path(path), "check the file") from error


def _lines(stream: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """Lines with their ends, as `newline` of the stream cuts them; without a byte order mark."""
    line = stream.readline(MAX_LINE + 1).removeprefix("\ufeff")
    while line:
        if len(line) > MAX_LINE:
            raise _too_large(path, f"{MAX_LINE >> 20} MiB in one line")
        yield line
        line = stream.readline(MAX_LINE + 1)


def _first_character(stream: io.TextIOWrapper) -> str:
    """The first that is not white space, "" in an empty file."""
    while text := stream.read(4096):
        if text := text.removeprefix("\ufeff").lstrip():
            return text[0]
    return ""


def _too_large(path: Path, limit: str) -> EngineError:
    return EngineError("E3.10", f"the file holds more than {limit}", _shown_path(path), "split it into several files")


def _check_content(data: bytes, path: Path) -> None:
    for magic, what in _FOREIGN.items():
        if data.startswith(magic):
            raise EngineError("E3.3", f"the file is {what}", _shown_path(path))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice!r} is given twice")
    return values


def _reason(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _fill(record: Record, value: Any) -> None:
    if isinstance(value, dict):
        record.values = value
    else:
        record.problem = f"a JSON {type(value).__name__}, not an object"


def _weight(column: Any) -> int:
    """Bytes of a column once each row holds its own value."""
    import pyarrow
    import pyarrow.compute

    if not pyarrow.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pyarrow.compute.binary_length(column.dictionary)
    return pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0
