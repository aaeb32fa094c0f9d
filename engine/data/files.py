"""Read my CSV: files to records (decompress, decode, parse). What the columns mean is `engine/data/rows.py`'s.

Structure that cannot be parsed is an error of the file. What can be pinned on one row (too few fields, a line that is no
JSON, bytes that are not UTF-8) becomes that record's problem, so that all such rows are reported at once.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError

log = logging.getLogger("engine.data")

SAFE = "nothing was started"
FORMATS = (".csv", ".jsonl", ".json", ".parquet")
_MAX_EXPANDED = 2**30  # bytes that a compressed file may expand to
NUL = "\udc00"  # stands for a NUL byte in CSV records: the parser of Python 3.10 refuses the whole file instead
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
class Table:
    """All records of a file. `columns` is empty where the file has none to name."""

    columns: list[str]
    records: list[Record]


def read_table(path: str | Path, *, encoding: str = "auto", columns: Iterable[str]) -> Table:
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
        if path.suffix.lower() != ".gz":
            return path.read_bytes()
        with gzip.open(path) as stream:
            data = stream.read(_MAX_EXPANDED + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"the compressed stream breaks off: {error}"
        raise EngineError("E3.8", what, _shown_path(path), "copy or download the file again") from error
    except OSError as error:
        raise EngineError("E3.1", f"file cannot be read: {error}", _shown_path(path), "check the file") from error
    if len(data) > _MAX_EXPANDED:
        raise EngineError("E3.3", "expands to more than 1 GiB", _shown_path(path), "decompress it and use the file")
    return data


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


def _csv(text: str, path: Path) -> Table:
    former = csv.field_size_limit(2**31 - 1)  # the parser's own limit of 131,072 characters gives no row number
    try:
        return _parse_csv(text.replace("\x00", NUL), path)
    finally:
        csv.field_size_limit(former)


def _parse_csv(text: str, path: Path) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    records: list[Record] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return Table(columns, records)
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
        records.append(record)


# JSON


def _json_lines(text: str, path: Path, kind: str) -> Table:
    records: list[Record] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        record = Record(len(records) + 1, number, {})
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            record.problem = f"not valid JSON ({_reason(error)})"
        else:
            _fill(record, value)
        records.append(record)
    if kind == ".json" and records and all(record.problem for record in records):
        raise EngineError(
            "E3.3",
            "neither an array of objects nor one object per line",
            _shown_path(path),
            'write [{"dialogue": ...}, ...] or one object per line',
        )
    return Table(_keys(records), records)


def _json_array(text: str, path: Path) -> Table:
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise EngineError("E3.3", f"not valid JSON: {_reason(error)}", _shown_path(path), "correct the file") from error
    records = [Record(row, None, {}) for row in range(1, len(values) + 1)]
    for record, value in zip(records, values, strict=True):
        _fill(record, value)
    return Table(_keys(records), records)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
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


def _parquet(path: Path, columns: Iterable[str]) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EngineError(
            "E3.3", "parquet needs pyarrow", _shown_path(path), "pip install pyarrow, or use CSV"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            wanted = [name for name in names if name in set(columns)]
            rows = file.read(columns=wanted).to_pylist() if wanted else []
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise EngineError(
            "E3.3", f"not readable as parquet: {error}", _shown_path(path), "write the file again"
        ) from error
    return Table(names, [Record(row, None, values) for row, values in enumerate(rows, start=1)])
