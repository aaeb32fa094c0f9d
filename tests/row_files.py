"""Small data files for tests: the same rows in every format."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from engine.data.rows import Example, read_examples
from engine.recipe.schema import Data

COLUMNS = {"text_column": "dialogue", "summary_column": "summary", "id_column": "fname", "topic_column": None}
ROWS = [
    {"fname": "dev_0", "dialogue": "#Person1#: 안녕?\n#Person2#: 응, \"안녕\".", "summary": "둘은 인사한다.", "topic": "인사"},
    {"fname": "dev_1", "dialogue": "#Person1#: 몇 시?\n\n#Person2#: 세 시,\t곧 넷.", "summary": "시간.", "topic": "시간"},
    {"fname": "dev_2", "dialogue": "한 줄", "summary": "요약", "topic": "기타"},
]  # fmt: skip
HEADER = "fname,dialogue,summary\n"
GOOD = "dev_0,대화 하나,요약 하나\n"


def read(path: Path, *, require_summary: bool = True, limit: int | None = None, **changes) -> list[Example]:
    return read_examples(path, Data(**COLUMNS | changes), require_summary=require_summary, limit=limit)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def as_csv(rows: list[dict] = ROWS) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def as_jsonl(rows: list[dict] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_parquet(folder: Path, rows: list[dict] = ROWS, name: str = "rows.parquet") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


EXPECTED = [
    Example(row["fname"], row["dialogue"], (row["summary"],), row["topic"], number)
    for number, row in enumerate(ROWS, start=1)
]
