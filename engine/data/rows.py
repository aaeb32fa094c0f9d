"""Read the rows of a data file: columns to examples, and what makes a row unusable. All bad rows are reported at once."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.files import NUL, Record, read_table
from engine.data.prompts import normalise
from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.recipe.schema import Data

log = logging.getLogger("engine.data")

# Far beyond any dialogue: a longer cell is a file that was parsed wrongly, or hostile. Characters.
MAX_DIALOGUE, MAX_SUMMARY, MAX_LABEL = 200_000, 20_000, 1_000
SHOWN_ROWS = 20
_SHOWN_PAIRS = 3
_MISSING_WORDS = {"nan", "null", "none", "n/a", "<na>", "nat"}


@dataclass(frozen=True, slots=True)
class Example:
    """One checked row. Texts are composed Unicode (NFC) with `\\n` line ends."""

    id: str
    dialogue: str
    references: tuple[str, ...]  # empty where the row has none; the first one trains
    topic: str | None
    row: int  # 1-based data row of the file
    file: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """File, row and id, for messages."""
        return f"{self.file} row {self.row} (id {shown(self.id)})".strip()


class UnusableRow(Exception):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and the line about it."""

    row: int
    text: str


@dataclass(frozen=True)
class Columns:
    """What the columns of a file mean, as a recipe's `data` section says it."""

    text: str
    summaries: tuple[str, ...]
    id: str | None
    topic: str | None
    require_summary: bool

    @classmethod
    def of(cls, settings: Data, *, require_summary: bool) -> Columns:
        names = settings.summary_column
        summaries = (names,) if isinstance(names, str) else tuple(names)
        return cls(settings.text_column, summaries, settings.id_column, settings.topic_column, require_summary)

    @property
    def wanted(self) -> list[str]:
        return [name for name in (self.text, *self.summaries, self.id, self.topic) if name is not None]

    @property
    def required(self) -> list[str]:
        """Files to be predicted may lack summaries, and topics, which a competition's test rows do not have."""
        return [name for name in self.wanted if self.require_summary or name not in (*self.summaries, self.topic)]


def shown(text: Any, width: int = 40) -> str:
    """A value from a file as it may stand in a message: printable and short."""
    text = "".join(c if c.isprintable() else "?" for c in str(text))
    return text if len(text) <= width else text[: width - 1] + "…"


def read_examples(
    path: str | Path, settings: Data, *, require_summary: bool, limit: int | None = None
) -> list[Example]:
    """Read and check the rows of a file, with the columns and the rules of a recipe's `data` section.

    Args:
        require_summary: rows and files without summaries are errors; otherwise their `references` are empty. Of several
            summary columns the first must be there in each row that trains.
        limit: stop after this many good rows.

    Raises:
        EngineError: E3.1 to E3.3 and E3.8 for the file, E3.4 columns, E3.5 bad rows, E3.6 no rows.
    """
    columns = Columns.of(settings, require_summary=require_summary)
    try:
        table = read_table(path, encoding=settings.encoding, columns=columns.wanted)
    except EngineError as error:
        error.next += _key_of_file(error, path, settings)
        raise
    file = shown(path, 200)
    if not table.records:
        raise EngineError("E3.6", "the file has no data rows", file, "check the file")
    check_columns(table.columns, columns, file, named=any(record.problem is None for record in table.records))
    examples: list[Example] = []
    bad: list[str] = []
    rows = checked(table.records, columns, file, {})
    while limit is None or len(examples) < limit:
        row = next(rows, None)
        if row is None:
            break
        bad.append(row.text) if isinstance(row, BadRow) else examples.append(row)
    if bad:
        report_bad_rows(bad, len(bad), file, settings)
    if not examples:
        raise EngineError("E3.6", "no usable row is left", file, "check the file")
    return examples


def _key_of_file(error: EngineError, path: str | Path, settings: Data) -> str:
    """Advice on a file that is not there: which key of the recipe names it."""
    keys = [key for key in ("train_file", "validation_file", "test_file") if getattr(settings, key) == path]
    if error.code != "E3.1" or not keys:
        return ""
    return f"; paths are relative to the current folder ({Path.cwd()}); set data.{keys[0]}=..."


def check_columns(names: Sequence[str], columns: Columns, file: str, *, named: bool) -> None:
    """Refuse a file without a required column, or with two of that name: E3.4.

    Args:
        names: what the file calls its columns.
        named: some row has columns; without names and without such a row, the rows' own problems say more.
    """
    if columns.topic not in (None, *names, *columns.required) and names:
        log.warning("%s has no column %r: its rows are prompted without a topic", file, columns.topic)
    for name in columns.required:
        count = names.count(name)
        if count == 1 or not (names or named):
            continue
        there = ", ".join(repr(shown(column)) for column in names[:30])
        near = difflib.get_close_matches(name.lower(), [c.lower() for c in names], n=1, cutoff=0.6)
        close = next((c for c in names if near and c.lower() == near[0]), None)
        advice = f"did you mean {shown(close)!r}? " if close and count == 0 else ""
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            advice = "separate the columns by commas; "
        what = f"column {name!r} is missing" if count == 0 else f"column {name!r} occurs {count} times"
        raise EngineError(
            "E3.4",
            f"{what}; the columns are {there or 'none'}",
            file,
            f"{advice}the names are set by data.text_column, summary_column, id_column (null: number the rows), topic_column",
        )


def checked(
    records: Iterable[Record], columns: Columns, file: str, rows_of_ids: MutableMapping[str, int]
) -> Iterator[Example | BadRow]:
    """What each record is, in order.

    Args:
        rows_of_ids: ids met so far; only its `setdefault` is used.
    """
    for record in records:
        try:
            example = example_of(record, columns, file)
            if columns.id is not None and (first := rows_of_ids.setdefault(example.id, example.row)) != example.row:
                raise UnusableRow(f"its id is also that of row {first}")
        except UnusableRow as problem:
            yield BadRow(record.row, f"{_place(record, columns.id)}: {problem}")
        else:
            yield example


def _place(record: Record, id_column: str | None) -> str:
    marks = [] if record.line is None else [f"line {record.line}"]
    name = record.values.get(id_column) if id_column else None
    marks += [f"id {shown(name)}"] if isinstance(name, str | int) and str(name).strip() else []
    return f"row {record.row}" + (f" ({', '.join(marks)})" if marks else "")


def report_bad_rows(bad: Sequence[str], count: int, file: str, settings: Data) -> None:
    """Say which rows are dropped, or refuse the file: E3.5.

    Args:
        bad: the first lines about them, at least SHOWN_ROWS and `max_bad_rows` of them where there are so many.
    """
    said, skip = "1 bad row" if count == 1 else f"{count} bad rows", settings.on_bad_row == "skip"
    if skip and count <= settings.max_bad_rows:
        log.warning("%s: dropped %s: %s", file, said, "; ".join(bad))
        return
    more = f"; and {count - SHOWN_ROWS} more" if count > SHOWN_ROWS else ""
    allowed = f", and data.max_bad_rows is {settings.max_bad_rows}" if skip else ""
    raise EngineError(
        "E3.5",
        f"{said}{allowed}: {'; '.join(bad[:SHOWN_ROWS])}{more}",
        file,
        "correct them, or drop them with data.on_bad_row=skip and data.max_bad_rows",
    )


# One row


def example_of(record: Record, columns: Columns, file: str) -> Example:
    """Raises: UnusableRow."""
    if record.problem:
        raise UnusableRow(record.problem)
    values = record.values
    dialogue = _text(values, columns.text, MAX_DIALOGUE)
    references = []
    for position, name in enumerate(columns.summaries):
        if (columns.require_summary and position == 0) or not is_missing(values.get(name)):
            references.append(_text(values, name, MAX_SUMMARY).strip())
    topic = values.get(columns.topic) if columns.topic else None
    return Example(
        id=str(record.row) if columns.id is None else _id(values, columns.id),
        dialogue=dialogue,
        references=tuple(references),
        topic=None if is_missing(topic) else _text(values, columns.topic, MAX_LABEL).strip(),
        row=record.row,
        file=file,
    )


def is_missing(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT, nothing visible, or a word that other tools write for a missing cell."""
    text = str(value)
    return _is_blank(text) or text.strip().lower() in _MISSING_WORDS


def _is_blank(text: str) -> bool:
    """Nothing visible: only white space, control and format characters (zero-width space, byte order mark)."""
    return not text.strip() or all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def _text(values: dict[str, Any], name: str, limit: int) -> str:
    value = values.get(name)
    if value is None or (isinstance(value, float) and value != value):
        raise UnusableRow(f"{name!r} is missing")
    if not isinstance(value, str):
        raise UnusableRow(f"{name!r} is not text but {type(value).__name__}")
    if len(value) > limit:
        raise UnusableRow(f"{name!r} has {len(value):,} characters, more than {limit:,}")
    if "\x00" in value or NUL in value:
        raise UnusableRow(f"{name!r} holds a NUL character")
    _check_encodable(value, name)
    if _is_blank(value):
        raise UnusableRow(f"{name!r} is empty")
    if is_missing(value):
        raise UnusableRow(f"{name!r} holds only {value.strip()!r}")
    return normalise(value)


def _check_encodable(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # a byte that the decoder let through
            raise UnusableRow(f"{name!r} holds byte 0x{code - 0xDC00:02x}, which is not UTF-8") from None
        raise UnusableRow(f"{name!r} holds half of a character (surrogate U+{code:04X})") from None


def _id(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(values, name, MAX_LABEL)


# Between files


def check_splits(train: Sequence[Example], validation: Sequence[Example], *, allow_overlap: bool) -> None:
    """Refuse validation dialogues that are also training dialogues: scores on them say nothing about new dialogues.

    Raises:
        EngineError: E3.7 naming the first of them.
    """
    known = {_dialogue_key(example): example for example in train}
    twice = [(example, known[key]) for example in validation if (key := _dialogue_key(example)) in known]
    if not twice:
        return
    if allow_overlap:
        log.warning("%d validation dialogues are also training dialogues; their scores are too good", len(twice))
        return
    pairs = [f"row {new.row} (id {shown(new.id)}) = row {old.row} (id {shown(old.id)})" for new, old in twice]
    pairs[0] += f" of {twice[0][1].file}"
    more = f" and {len(pairs) - _SHOWN_PAIRS} more" if len(pairs) > _SHOWN_PAIRS else ""
    raise EngineError(
        "E3.7",
        f"{len(twice)} of {len(validation)} validation dialogues are also training dialogues: "
        f"{', '.join(pairs[:_SHOWN_PAIRS])}{more}",
        validation[0].file,
        "take them out of one file, or set data.allow_overlap=true",
    )


def _dialogue_key(example: Example) -> str:
    return " ".join(example.dialogue.split())


def rows_fingerprint(examples: Iterable[Example]) -> str:
    """sha256 of ids, texts and topics in order; names of files and positions in them do not count."""
    digest = hashlib.sha256()
    for example in examples:
        values = [example.id, example.dialogue, example.references, example.topic]
        digest.update(json.dumps(values, ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()
