"""Files to records: every format and encoding, damage, limits, and a corpus of bad files that are refused by name."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import random
import time
from pathlib import Path

import pandas
import pytest
from row_files import EXPECTED, GOOD, HEADER, ROWS, as_csv, as_jsonl, as_parquet, read, write

from engine.data import files
from engine.data.rows import Example, check_splits, read_examples
from engine.errors import EngineError
from engine.recipe.schema import Data

# What can be read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", as_csv()),
        ("rows.CSV", as_csv()),
        ("bom.csv", "\ufeff" + as_csv()),
        ("crlf.csv", as_csv().replace("\n", "\r\n")),
        ("rows.jsonl", as_jsonl()),
        ("bom.jsonl", "\ufeff" + as_jsonl()),
        ("blank_lines.jsonl", as_jsonl().replace("\n", "\n\n")),
        ("escaped.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
        ("lines.json", as_jsonl()),
        ("array.json", json.dumps(ROWS, ensure_ascii=False, indent=1)),
        ("array.jsonl", json.dumps(ROWS)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_formats(tmp_path, name, content, packed):
    path = write(tmp_path, name + ".gz" * packed, gzip.compress(content.encode()) if packed else content)
    assert read(path, topic_column="topic") == EXPECTED
    assert read(path)[0].topic is None
    assert read(path)[2].place == f"{path} row 3 (id dev_2)"


def test_parquet(tmp_path):
    path = as_parquet(tmp_path, [row | {"vector": [1.0, 2.0]} for row in ROWS])
    assert read(path, topic_column="topic") == EXPECTED


@pytest.mark.parametrize("encoding", ["cp949", "euc-kr"])
def test_cp949_is_found_and_said(tmp_path, caplog, encoding):
    path = write(tmp_path, "rows.csv", as_csv().encode(encoding))
    with caplog.at_level(logging.WARNING, logger="engine.data"):
        assert read(path, topic_column="topic") == EXPECTED
    assert "CP949" in caplog.text and "rows.csv" in caplog.text
    caplog.clear()
    assert read(path, encoding="cp949", topic_column="topic") == EXPECTED and not caplog.records


def test_named_encodings(tmp_path):
    for encoding in ("utf-16", "utf-32", "utf-8-sig", "UTF8"):
        path = write(tmp_path, "rows.csv", as_csv().encode(encoding))
        assert read(path, encoding=encoding, topic_column="topic") == EXPECTED


def test_unusual_but_good(tmp_path):
    path = write(
        tmp_path, "a.csv", ",fname,dialogue,summary\n0,a,대화,요약\n\n1,b, 대화 2 ,요약 2\n"
    )  # unnamed index column
    assert [(e.id, e.dialogue, e.row) for e in read(path)] == [("a", "대화", 1), ("b", " 대화 2 ", 2)]
    path = write(tmp_path, "b.csv", HEADER + GOOD.strip())  # no newline at the end
    assert len(read(path)) == 1
    path = write(tmp_path, "c.jsonl", '{"fname": 7, "dialogue": "가\u2028나\\u0085", "summary": "요약"}')
    assert read(path)[0].id == "7" and read(path)[0].dialogue == "가\u2028나\x85"
    path = write(tmp_path, "d.csv", HEADER + f"long,{'긴 말 ' * 40_000},요약\n")
    assert len(read(path)[0].dialogue) == 160_000
    assert [e.id for e in read(path, id_column=None)] == ["1"]


# Files that are refused: (name, content, what the message must say)

BAD_FILES = {
    "empty.csv": ("", "no data rows"),
    "newlines.csv": ("\n\n\n", "no data rows"),
    "header.csv": (HEADER, "no data rows"),
    "empty.jsonl": ("", "no data rows"),
    "empty.json": ("[]", "no data rows"),
    "bom only.csv": ("\ufeff", "no data rows"),
    "columns.csv": ("id,text,summary\na,b,c\n", "'dialogue' is missing; the columns are 'id', 'text', 'summary'"),
    "close name.csv": ("fname,Dialogues,summary\na,b,c\n", "did you mean 'Dialogues'"),
    "space in name.csv": ("fname, dialogue,summary\na,b,c\n", "did you mean ' dialogue'"),
    "no id column.csv": ("dialogue,summary\na,b\n", "'fname' is missing"),
    "semicolons.csv": ("fname;dialogue;summary\na;b;c\n", "separate the columns by commas"),
    "tabs.csv": ("fname\tdialogue\tsummary\na\tb\tc\n", "separate the columns by commas"),
    "column twice.csv": ("fname,dialogue,dialogue,summary\na,b,c,d\n", "'dialogue' occurs 2 times"),
    "columns.jsonl": ('{"text": "가"}\n{"text": "나"}\n', "'dialogue' is missing; the columns are 'text'"),
    "open quote.csv": (HEADER + GOOD + 'b,"대화,요약\n', "row 2 (line 3)"),
    "text after quote.csv": (HEADER + GOOD + 'b,"대화" 더,요약\n', "row 2 (line 3)"),
    "object.json": (json.dumps({"rows": ROWS}, indent=1), "neither an array of objects nor one object per line"),
    "broken.json": (json.dumps(ROWS)[:-5], "not valid JSON"),
    "deep.json": ("[" * 100_000, "nested too deeply"),
    "latin.csv": (HEADER.encode() + b"a,caf\xe9 \xff\xfe\xe9,x\n", "not UTF-8: byte 0xe9 at offset 28, line 2"),
    "utf16.csv": (as_csv().encode("utf-16"), "set data.encoding: utf-16"),
    "utf32.csv": (as_csv().encode("utf-32"), "set data.encoding: utf-32"),
    "zip.csv": (b"PK\x03\x04\x14\x00", "zip archive or spreadsheet"),
    "xls.csv": (b"\xd0\xcf\x11\xe0\xa1\xb1", "old spreadsheet"),
    "gzip.csv": (gzip.compress(b"a"), "end its name in .gz"),
    "parquet.csv": (b"PAR1....", "end its name in .parquet"),
    "not gzip.csv.gz": (HEADER + GOOD, "breaks off"),
    "empty.csv.gz": (b"", "no data rows"),
    "text.parquet": (as_csv(), "not readable as parquet"),
    "empty.parquet": (b"", "not readable as parquet"),
    "cut.parquet": (b"PAR1\x00\x00PAR1", "not readable as parquet"),
    "rows.txt": (as_csv(), "unknown format '.txt'; readable are .csv, .jsonl, .json, .parquet"),
    "rows.xlsx": (b"PK\x03\x04", "unknown format"),
    "rows": (as_csv(), "unknown format"),
    "rows.pkl": (b"\x80\x04N.", "unknown format"),
    "rows.parquet.gz": (gzip.compress(b"PAR1"), "unknown format"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    content, expected = BAD_FILES[name]
    path = write(tmp_path, name, content)
    for changes in ({}, {"on_bad_row": "skip", "max_bad_rows": 100}):
        with pytest.raises(EngineError) as caught:
            read(path, **changes)
        message = str(caught.value)
        assert caught.value.exit_code == 3 and expected in message and str(path) in message
        assert len(message) < 700 and message.isprintable()


def test_the_corpus_is_large():
    assert len(BAD_FILES) >= 36


def test_paths_that_are_no_files(tmp_path):
    write(tmp_path, "train.csv", as_csv())
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    cases = {
        tmp_path: "is a folder",
        tmp_path / "trian.csv": "does not exist.*did you mean train.csv",
        tmp_path / "nowhere" / "a.csv": "does not exist",
        tmp_path / "pipe.csv": "no regular file",
        tmp_path / "loop.csv": "",
        tmp_path / "train.csv" / "a.csv": "",
        tmp_path / ("x" * 300 + ".csv"): "",
        Path("/dev/zero"): "no regular file",
        Path("a\x00b.csv"): "",
    }
    for path, expected in cases.items():
        with pytest.raises(EngineError, match=f"E3.1.*{expected}"):
            read(path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, "rows.csv", as_csv())

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EngineError, match="E3.1.*Permission denied"):
        read(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_compressed_stream_that_breaks_off_is_refused(tmp_path, kind):
    rows = [
        {"fname": f"r{i}", "dialogue": f"대화 {i}\n둘째 줄 {random.random()}", "summary": f"요약 {i}"}
        for i in range(500)
    ]
    packed = gzip.compress((as_csv if kind == "csv" else as_jsonl)(rows).encode())
    for share in (0.01, 0.3, 0.6, 0.999):
        path = write(tmp_path, f"rows.{kind}.gz", packed[: int(share * len(packed))])
        with pytest.raises(EngineError, match=r"E3\.8.*breaks off"):
            read(path)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    with pytest.raises(EngineError) as caught:
        read(write(tmp_path, f"rows.{kind}.gz", bytes(damaged)))
    assert caught.value.exit_code == 3
    with pytest.raises(EngineError, match=r"E3\.8"):
        read(write(tmp_path, "rows.json.gz", gzip.compress(json.dumps(rows).encode())[:-9]))


def test_encodings_that_do_not_fit(tmp_path):
    path = write(tmp_path, "rows.csv", as_csv().encode("cp949"))
    for encoding, expected in {
        "utf-8": "not UTF-8: byte 0x",
        "ascii": "not ASCII",
        "klingon": "unknown encoding 'klingon'",
        "hex": "'hex' does not decode",
        "": "unknown encoding",
        "utf-16": "",
        "a\x00b": "unknown encoding",
    }.items():
        with pytest.raises(EngineError) as caught:
            read(path, encoding=encoding)
        assert caught.value.exit_code == 3 and expected in str(caught.value)


def test_the_csv_modules_own_limit_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    read(write(tmp_path, "rows.csv", as_csv()))
    assert csv.field_size_limit() == before


def test_many_overlaps_are_counted_and_a_few_shown():
    train = [Example(f"t{i}", f"대화 {i}", ("x",), None, i, "data/train.csv") for i in range(50)]
    dev = [Example(f"d{i}", f"대화 {i}", ("x",), None, i + 1, "data/dev.csv") for i in range(50)]
    with pytest.raises(EngineError) as error:
        check_splits(train, dev, allow_overlap=False)
    line = str(error.value)
    assert "50 of 50" in line and "and 47 more" in line and "set data.allow_overlap=true" in line
    assert line.count("data/train.csv") == 1 and len(line) < 300, line


@pytest.mark.parametrize("key", ["train_file", "validation_file", "test_file"])
def test_a_missing_file_names_its_key(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    settings = Data(**{key: "data/x.csv"})
    with pytest.raises(EngineError) as error:
        read_examples("data/x.csv", settings, require_summary=True)
    assert error.value.code == "E3.1"
    assert f"paths are relative to the current folder ({tmp_path}); set data.{key}=..." in str(error.value)
    with pytest.raises(EngineError) as other:  # such as --input, which is no key of the recipe
        read_examples("y.csv", settings, require_summary=False)
    assert "set data." not in str(other.value)


# Fuzzing


@pytest.mark.parametrize(
    "name",
    [
        "rows.csv",
        pytest.param("rows.jsonl", marks=pytest.mark.slow),
        pytest.param("rows.json", marks=pytest.mark.slow),
        pytest.param("rows.csv.gz", marks=pytest.mark.slow),
        "rows.parquet",
    ],
)
def test_damaged_files_never_end_in_another_exception(tmp_path, name):
    """Random damage: either the rows are read, or an EngineError with exit code 3 in one line."""
    source = _source_of(tmp_path, name)
    stream = random.Random(name)
    until, trials, refused = time.perf_counter() + 1.5, 0, 0
    while time.perf_counter() < until and trials < 1500:
        trials += 1
        path = write(tmp_path, "x" + name, _damaged(source, stream))
        try:
            rows = read(path, encoding=stream.choice(["auto", "utf-8", "cp949"]))
            assert rows and all(row.dialogue.strip() and row.references for row in rows)
        except EngineError as error:
            refused += 1
            assert error.exit_code == 3 and "\n" not in str(error)
    assert trials > 20 and refused > 5


def _source_of(folder: Path, name: str) -> bytes:
    if name.endswith("parquet"):
        return as_parquet(folder).read_bytes()
    content = {"csv": as_csv, "jsonl": as_jsonl, "json": lambda: json.dumps(ROWS, ensure_ascii=False)}
    text = content[name.removesuffix(".gz").split(".")[1]]().encode()
    return gzip.compress(text) if name.endswith(".gz") else text


def _damaged(source: bytes, stream: random.Random) -> bytes:
    content = bytearray(source)
    for _ in range(stream.randint(1, 4)):
        place = stream.randrange(len(content) + 1)
        piece = stream.choice(
            [b'"', b"\n", b",", b"\x00", b"\xff", b"{", b"\\u", b"\\ud800", stream.randbytes(3), b"NaN"]
        )
        kind = stream.randrange(4)
        if kind == 0:
            content[place:place] = piece
        elif kind == 1:
            content[place : place + len(piece)] = piece
        elif kind == 2:
            del content[place : place + stream.randint(1, 30)]
        else:
            content[place:place] = content[: stream.randint(1, 50)]
    return bytes(content)


# Real files


def test_real_files(shared_data):
    folder = shared_data / "dialogsum_ko"
    train, dev = (read(folder / f"{name}.csv", topic_column="topic") for name in ("train", "dev"))
    test = read(folder / "test.csv", require_summary=False)
    assert (len(train), len(dev), len(test)) == (320, 80, 499)
    assert all("\n" in example.dialogue for example in train) and all(not example.references for example in test)
    check_splits(train, dev, allow_overlap=False)
    with pytest.raises(EngineError, match="'dialogue' is missing; the columns are '', 'fname', 'summary'"):
        read(folder / "sample_submission.csv")


# Files meant to fill the memory, or made so by accident


def test_a_repeated_key_among_very_many_is_found_at_once(tmp_path):
    keys = ",".join(f'"k{i}": 1' for i in range(200_000))
    with pytest.raises(EngineError, match=r"E3\.5.*'k7' is given twice"):
        read(write(tmp_path, "rows.jsonl", "{" + keys + ', "k7": 2}'))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.csv.gz", "rows.parquet"])
def test_more_rows_than_a_run_can_hold(tmp_path, monkeypatch, name):
    rows = [ROWS[0] | {"fname": f"r{i}"} for i in range(60)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pandas.DataFrame(rows).to_parquet(path)
    else:
        text = json.dumps(rows) if name.endswith(".json") else (as_csv if "csv" in name else as_jsonl)(rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    monkeypatch.setattr(files, "MAX_ROWS", 60)
    assert len(read(path)) == 60
    monkeypatch.setattr(files, "MAX_ROWS", 59)
    with pytest.raises(EngineError, match=r"E3\.10: the file holds more than 59 rows"):
        read(path)


@pytest.mark.parametrize("kind", ["plain", "gzip", "sparse", "one cell", "dictionary"])
def test_more_bytes_than_a_run_can_hold(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    path = tmp_path / {"plain": "r.csv", "gzip": "r.csv.gz", "sparse": "r.csv"}.get(kind, "r.parquet")
    if kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif path.suffix == ".parquet":
        cell = "가" * (400_000 if kind == "one cell" else 5_000)  # 15 kB, stored once, in 5,000 rows
        pandas.DataFrame(
            {"dialogue": [cell] * (1 if kind == "one cell" else 5_000), "summary": "x", "fname": "y"}
        ).to_parquet(path)
        assert kind == "one cell" or path.stat().st_size < 1 << 20
    else:
        data = (HEADER + GOOD * 100_000).encode()
        path.write_bytes(gzip.compress(data) if kind == "gzip" else data)
    with pytest.raises(EngineError, match=r"E3\.10: the file holds more than 1 MiB"):
        read(path)


def test_more_values_than_a_run_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_VALUES", 1000)
    with pytest.raises(EngineError, match=r"E3\.10: the file holds more than 1,000 lists and objects"):
        read(write(tmp_path, "rows.jsonl", '{"fname": ' + "[" * 600 + "]" * 600 + "}\n" + "[]" * 500))


def test_the_same_text_as_a_dictionary_and_written_out(tmp_path):
    """Texts are read as dictionaries to count them; rows must not notice."""
    rows = [ROWS[i % 3] | {"fname": f"r{i}"} for i in range(3000)]
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "a.parquet", use_dictionary=True)
    frame.to_parquet(tmp_path / "b.parquet", use_dictionary=False)
    texts = [
        [(row.id, row.dialogue, row.references) for row in read(tmp_path / name)] for name in ("a.parquet", "b.parquet")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 3000
