"""Rows that are not held: the same rows, checks and messages as of files that are, and little memory."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import sqlite3
import tracemalloc

import pytest
from row_files import COLUMNS, ROWS, as_csv, as_jsonl, as_parquet, read, write

from engine.data import files, stream
from engine.data.rows import read_examples, rows_fingerprint
from engine.data.stream import ExampleFile
from engine.errors import EngineError
from engine.recipe.schema import Data

MANY = [{"fname": f"r{i}", "dialogue": f"대화 {i}\n" * (i % 7 + 1), "summary": "요약"} for i in range(3000)]


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.json", "rows.parquet"])
def test_the_rows_are_those_of_a_file_that_is_read_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "_BLOCK", 1000)
    if name.endswith("parquet"):
        path = as_parquet(tmp_path, MANY)
    else:
        text = {"csv": as_csv, "jsonl": as_jsonl, "json": json.dumps}[name.split(".")[1]](MANY).encode()
        path = write(tmp_path, name, gzip.compress(text) if name.endswith("gz") else text)
    whole = read(path)
    rows = ExampleFile(path, Data(**COLUMNS))
    assert list(rows.examples()) == whole and rows.count == 3000 and rows.scored
    assert list(rows.examples(2047, 2050)) == whole[2047:2050] and list(rows.examples(3000)) == []
    assert rows.fingerprint == rows_fingerprint(whole)


BAD = {
    "two ids": [*ROWS, ROWS[0], ROWS[1]],
    "no id": [*ROWS, {"dialogue": "말", "summary": "요약"}],
    "empty": [*ROWS, ROWS[0] | {"fname": "x", "dialogue": " "}],
    "no text": [*ROWS, ROWS[0] | {"fname": "x", "dialogue": 7}],
    "other columns": [{"id": 1, "text": "말"}],
    "many": [ROWS[0]] * 50,
}


@pytest.mark.parametrize("settings", [{}, {"on_bad_row": "skip", "max_bad_rows": 3}, {"id_column": None}])
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_in_the_same_words(tmp_path, caplog, name, settings):
    path = write(tmp_path, "rows.jsonl", as_jsonl(BAD[name]))
    settings = Data(**COLUMNS | settings)
    outcomes = []
    for reader in (lambda: read_examples(path, settings, require_summary=False), lambda: ExampleFile(path, settings)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="engine.data"):
            try:
                rows = reader()
                outcomes.append(rows if isinstance(rows, list) else list(rows.examples()))
            except EngineError as error:
                outcomes.append(str(error))
        outcomes[-1] = (outcomes[-1], caplog.messages)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_what_a_run_cannot_hold_can_be_streamed(tmp_path, monkeypatch, kind):
    for name, limit in (("MAX_ROWS", 100), ("MAX_BYTES", 20_000), ("MAX_VALUES", 100)):
        monkeypatch.setattr(files, name, limit)
    path = as_parquet(tmp_path, MANY) if kind == "parquet" else tmp_path / f"rows.{kind}"
    if kind != "parquet":
        path.write_text({"csv": as_csv, "jsonl": as_jsonl}[kind](MANY), encoding="utf-8")
    with pytest.raises(EngineError, match=r"E3\.10"):
        read(path)
    assert sum(1 for _ in ExampleFile(path, Data(**COLUMNS)).examples()) == 3000


def test_a_line_that_fills_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    long = as_jsonl([*ROWS, ROWS[0] | {"fname": "x", "more": "가" * 1000}])
    with pytest.raises(EngineError, match=r"E3\.10.*in one line"):
        ExampleFile(write(tmp_path, "rows.jsonl", long), Data(**COLUMNS))
    with pytest.raises(EngineError, match=r"E3\.3.*field larger than field limit.*row 4"):
        open_quote = as_csv() + 'x,"' + "대화\n" * 1000
        ExampleFile(write(tmp_path, "rows.csv", open_quote), Data(**COLUMNS))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    path = write(tmp_path, "rows.jsonl", as_jsonl(MANY))
    rows = ExampleFile(path, Data(**COLUMNS))
    path.write_text(as_jsonl(MANY[1:]), encoding="utf-8")
    with pytest.raises(EngineError, match=r"E3\.11.*changed while it was read"):
        list(rows.examples())
    path.write_text(as_jsonl([ROWS[0] | {"dialogue": ""}]), encoding="utf-8")
    with pytest.raises(EngineError, match=r"E3\.11"):
        next(rows.examples())


def test_a_full_temporary_folder(tmp_path, monkeypatch):
    class Full:
        def execute(self, *_):
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(stream.sqlite3, "connect", lambda _: Full())
    with pytest.raises(EngineError, match=r"E6\.1: keeping the ids failed.*disk is full.*SQLITE_TMPDIR"):
        ExampleFile(write(tmp_path, "rows.jsonl", as_jsonl()), Data(**COLUMNS))


def test_ids_leave_the_memory(tmp_path, monkeypatch):
    """Python holds none of them: 3,000 rows take as much as 300, with ids in a random order."""
    monkeypatch.setattr(files, "_BLOCK", 1000)
    peaks = []
    for count in (300, 3000):
        rows = [row | {"fname": os.urandom(16).hex()} for row in random.sample(MANY, count)]
        path = write(tmp_path, "rows.jsonl", as_jsonl(rows))
        del rows
        tracemalloc.start()
        ExampleFile(path, Data(**COLUMNS))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks
