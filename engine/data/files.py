"""Read a data file: decompress, decode, parse to records. What the columns mean is `engine/data/rows.py`'s.

Structure that cannot be parsed is an error of the file. What can be pinned on one row (too few fields, a line that is no
JSON, bytes that are not UTF-8) becomes that record's problem, so that all such rows are reported at once.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError

log = logging.getLogger("engine.data")

SAFE = "nothing was started"
FORMATS = (".csv", ".jsonl", ".json", ".parquet")
# What one file may hold. A run keeps every row in memory, at up to ten times its bytes; more than this is an accident, or meant
# to fill the memory.
MAX_BYTES = 512 << 20  # of text, after decompression
MAX_ROWS = 2_000_000
MAX_VALUES = 20_000_000  # brackets of JSON; each becomes an object of at least 56 bytes
NUL = "\udc00"  # stands for a NUL byte in CSV records: the parser of Python 3.10 refuses the whole file instead
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")  # as io.StringIO(newline="") cuts them
_FOREIGN = {
    b"\x1f\x8b": "gzip data; end its name in .gz",
    b"PAR1": "parquet; end its name in .parquet",
    b"PK\x03\x04": "a zip archive or spreadsheet; save it as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet; save it as CSV in UTF-8",
}
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
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


def read_table(path: str | Path, *, encoding: str = "auto", columns: Iterable[str]) -> RawTable:
    """Read CSV, JSONL, a JSON array or parquet; the text formats also with `.gz`.

    Args:
        encoding: "auto" tries UTF-8 (with or without BOM), then CP949.
        columns: the wanted ones; others are left out of parquet records.

    Raises:
        EngineError: E3.1 no readable file, E3.2 encoding, E3.3 format, E3.8 a compressed stream that breaks off.
    """
    path = Path(path)
    _check_file(path)
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet(path, columns)
    data = _load(path)
    _check_content(data, path)
    text = _decode(data, encoding, path)
    if kind == ".csv":
        return _csv(text, path)
    if text.count("[") + text.count("{") > MAX_VALUES:
        raise _too_large(path, f"{MAX_VALUES:,} lists and objects")
    return _json_array(text, path) if text.lstrip()[:1] == "[" else _json_lines(text, path, kind)


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


def _load(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)  # by contents: what a file says of its size need not be so
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"the compressed stream breaks off: {error}"
        raise EngineError("E3.8", what, _shown_path(path), "copy or download the file again") from error
    except OSError as error:
        raise EngineError("E3.1", f"file cannot be read: {error}", _shown_path(path), "check the file") from error
    if len(data) > MAX_BYTES:
        raise _too_large(path, f"{MAX_BYTES >> 20} MiB of text")
    return data


def _too_large(path: Path, limit: str) -> EngineError:
    return EngineError("E3.10", f"the file holds more than {limit}", _shown_path(path), "split it into several files")


def _add(records: list[Record], record: Record, path: Path) -> None:
    if len(records) == MAX_ROWS:
        raise _too_large(path, f"{MAX_ROWS:,} rows")
    records.append(record)


def _check_content(data: bytes, path: Path) -> None:
    for magic, what in _FOREIGN.items():
        if data.startswith(magic):
            raise EngineError("E3.3", f"the file is {what}", _shown_path(path))


# Encodings


def _decode(data: bytes, encoding: str, path: Path) -> str:
    wide = next((name for bom, name in _WIDE.items() if data.startswith(bom)), None)
    if encoding == "auto" and wide:
        raise EngineError("E3.2", f"the file is {wide.upper()}", _shown_path(path), f"set data.encoding: {wide}")
    try:
        codec = codecs.lookup("utf-8" if encoding == "auto" else encoding)
    except (LookupError, ValueError) as error:
        raise EngineError(
            "E3.2", f"unknown encoding {encoding!r}", "data.encoding", "auto, utf-8, cp949 or utf-16"
        ) from error
    try:
        text = codec.decode(data, "strict")[0]
        return text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if codec.name.startswith("utf-8"):
            return _decode_damaged_or_cp949(data, error, path, guess=encoding == "auto")
        raise _undecodable(data, error, path) from error
    except Exception as error:  # codecs that are not of text (`hex`, `zip`) fail in their own ways
        raise EngineError(
            "E3.2", f"{encoding!r} does not decode this file: {error}", _shown_path(path), "set data.encoding"
        ) from error


def _decode_damaged_or_cp949(data: bytes, failure: UnicodeDecodeError, path: Path, *, guess: bool) -> str:
    """Not UTF-8: CP949, or UTF-8 with damaged bytes (then left as surrogates, and the rows that hold them are named)."""
    lenient = data.decode("utf-8", "replace")
    mostly_utf8 = len(re.findall("[가-힣]", lenient)) > lenient.count("\ufffd")
    if mostly_utf8:
        return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if not guess:
        raise _undecodable(data, failure, path) from failure
    try:
        text = data.decode("cp949")
    except UnicodeDecodeError:
        raise _undecodable(data, failure, path) from failure
    log.warning("%s is not UTF-8; it was read as CP949", _shown_path(path))
    return text


def _undecodable(data: bytes, error: UnicodeDecodeError, path: Path) -> EngineError:
    line = data.count(b"\n", 0, error.start) + 1
    return EngineError(
        "E3.2",
        f"not {error.encoding.upper()}: byte 0x{data[error.start]:02x} at offset {error.start}, line {line}",
        _shown_path(path),
        "set data.encoding to the file's encoding, or save it as UTF-8",
    )


# CSV


def _csv(text: str, path: Path) -> RawTable:
    former = csv.field_size_limit(2**31 - 1)  # the parser's own limit of 131,072 characters gives no row number
    try:
        return _parse_csv(text.replace("\x00", NUL), path)
    finally:
        csv.field_size_limit(former)


def _parse_csv(text: str, path: Path) -> RawTable:
    lines = (line[0] for line in _LINE.finditer(text))  # io.StringIO would hold a second copy, of four bytes a letter
    reader = csv.reader(lines, strict=True)
    columns: list[str] = []
    records: list[Record] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return RawTable(columns, records)
        except csv.Error as error:
            raise EngineError(
                "E3.3",
                f"not valid CSV: {error}; the record begins at line {line}",
                f"{_shown_path(path)} row {len(records) + 1} (line {line})",
                'quote cells with newlines or quotes in them, and write " as ""',
            ) from error
        if not fields:
            continue  # a blank line
        if not columns:
            columns = fields
            continue
        record = Record(len(records) + 1, line, {})
        if len(fields) == len(columns):
            record.values = dict(zip(columns, fields, strict=True))
        else:
            record.problem = f"{len(fields)} fields instead of {len(columns)}"
        _add(records, record, path)


# JSON


def _json_lines(text: str, path: Path, kind: str) -> RawTable:
    records: list[Record] = []
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        record = Record(len(records) + 1, number, {})
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            record.problem = f"not valid JSON ({_reason(error)})"
        else:
            _fill(record, value)
        _add(records, record, path)
    if kind == ".json" and records and all(record.problem for record in records):
        raise EngineError(
            "E3.3",
            "neither an array of objects nor one object per line",
            _shown_path(path),
            'write [{"dialogue": ...}, ...] or one object per line',
        )
    return RawTable(_keys(records), records)


def _lines(text: str) -> Iterator[str]:
    """Lines one by one; not splitlines, since U+2028 may stand inside a string."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def _json_array(text: str, path: Path) -> RawTable:
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise EngineError("E3.3", f"not valid JSON: {_reason(error)}", _shown_path(path), "correct the file") from error
    if len(values) > MAX_ROWS:
        raise _too_large(path, f"{MAX_ROWS:,} rows")
    records = [Record(row, None, {}) for row in range(1, len(values) + 1)]
    for record, value in zip(records, values, strict=True):
        _fill(record, value)
    return RawTable(_keys(records), records)


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


def _keys(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record.values))


# Parquet


def _parquet(path: Path, columns: Iterable[str]) -> RawTable:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EngineError(
            "E3.3", "parquet needs pyarrow", _shown_path(path), "pip install pyarrow, or use CSV"
        ) from error
    try:
        schema = pyarrow.parquet.read_schema(path)
        names = list(schema.names)
        wanted = [name for name in names if name in set(columns)]
        texts = [name for name in wanted if pyarrow.types.is_string(schema.field(name).type)]
        # As a dictionary, a text that stands in a million rows is in memory once.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            rows = _parquet_rows(file, wanted, path) if wanted else []
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise EngineError(
            "E3.3", f"not readable as parquet: {error}", _shown_path(path), "write the file again"
        ) from error
    return RawTable(names, [Record(row, None, values) for row, values in enumerate(rows, start=1)])


def _parquet_rows(file: Any, wanted: list[str], path: Path) -> list[dict[str, Any]]:
    """Rows of the wanted columns, counted and weighed before they become Python's."""
    if file.metadata.num_rows > MAX_ROWS:
        raise _too_large(path, f"{MAX_ROWS:,} rows")
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    sizes = [group.column(at).total_uncompressed_size for group in groups for at in range(group.num_columns)]
    if sum(sizes) > MAX_BYTES:
        raise _too_large(path, f"{MAX_BYTES >> 20} MiB")
    rows: list[dict[str, Any]] = []
    weight = 0
    for batch in file.iter_batches(batch_size=1024, columns=wanted):
        weight += sum(_weight(column) for column in batch.columns)
        if weight > MAX_BYTES:
            raise _too_large(path, f"{MAX_BYTES >> 20} MiB of text")
        rows += batch.to_pylist()
    return rows


def _weight(column: Any) -> int:
    """Bytes of a column once each row holds its own value."""
    import pyarrow
    import pyarrow.compute

    if not pyarrow.types.is_dictionary(column.type):
        return column.nbytes
    lengths = pyarrow.compute.binary_length(column.dictionary)
    return pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0
