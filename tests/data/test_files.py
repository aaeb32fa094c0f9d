"""Files to examples: every format and encoding, and a corpus of bad files that must each name their row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import random
import time
import unicodedata
from pathlib import Path

import pandas
import pytest

from engine.data import files
from engine.data.rows import Example, check_splits, read_examples, rows_fingerprint
from engine.errors import EngineError
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


def test_decomposed_hangul_is_composed(tmp_path):
    path = write(tmp_path, "mac.csv", unicodedata.normalize("NFD", as_csv()))
    assert read(path, topic_column="topic") == EXPECTED


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


def test_several_references(tmp_path):
    rows = [
        {"fname": str(i), "dialogue": f"대화 {i}", "s1": "하나", "s2": "둘" * (i % 2), "s3": "셋"} for i in range(2)
    ]
    path = write(tmp_path, "rows.csv", as_csv(rows))
    assert [e.references for e in read(path, summary_column=["s1", "s2", "s3"])] == [
        ("하나", "셋"),
        ("하나", "둘", "셋"),
    ]
    with pytest.raises(EngineError, match="E3.5.*'s2' is empty"):
        read(path, summary_column=["s2", "s1"])
    with pytest.raises(EngineError, match="E3.4.*'s4' is missing"):
        read(path, summary_column=["s1", "s4"])


def test_summaries_are_optional_for_prediction(tmp_path):
    path = write(tmp_path, "test.csv", "fname,dialogue\na,대화\nb,대화 2\n")
    assert [e.references for e in read(path, require_summary=False)] == [(), ()]
    with pytest.raises(EngineError, match="E3.4.*'summary' is missing; the columns are 'fname', 'dialogue'"):
        read(path)
    path = write(tmp_path, "half.csv", HEADER + "a,대화,요약\nb,대화 2,\n")
    assert [e.references for e in read(path, require_summary=False)] == [("요약",), ()]


def test_limit_counts_good_rows_and_stops_there(tmp_path):
    path = write(tmp_path, "rows.csv", HEADER + GOOD + "dev_1,대화 둘,요약\ndev_1,,\n")
    assert len(read(path, limit=2)) == 2 and len(read(path, limit=1)) == 1
    with pytest.raises(EngineError, match="row 3"):
        read(path, limit=3)


# Bad files. (name, content, what the message must say)

TOO_LONG = "아" * 1_000_001
BAD_ROWS = {
    "empty dialogue.csv": ("dev_1,,요약\n", "row 2 (line 3, id dev_1): 'dialogue' is empty"),
    "blank dialogue.csv": ('dev_1," \n\t ",요약\n', "'dialogue' is empty"),
    "invisible dialogue.csv": ("dev_1,\u200b\ufeff\u2060,요약\n", "'dialogue' is empty"),
    "nan dialogue.csv": ("dev_1,NaN,요약\n", "'dialogue' holds only 'NaN'"),
    "null dialogue.csv": ("dev_1,NULL,요약\n", "'dialogue' holds only 'NULL'"),
    "na dialogue.csv": ("dev_1,N/A,요약\n", "'dialogue' holds only 'N/A'"),
    "empty summary.csv": ("dev_1,대화,\n", "row 2 (line 3, id dev_1): 'summary' is empty"),
    "blank summary.csv": ("dev_1,대화,   \n", "'summary' is empty"),
    "nan summary.csv": ("dev_1,대화,nan\n", "'summary' holds only 'nan'"),
    "none summary.csv": ("dev_1,대화,None\n", "'summary' holds only 'None'"),
    "empty id.csv": (",대화,요약\n", "row 2 (line 3): 'fname' is empty"),
    "nan id.csv": ("nan,대화,요약\n", "'fname' holds only 'nan'"),
    "huge id.csv": (f"{'i' * 2000},대화,요약\n", "'fname' has 2,000 characters"),
    "duplicate id.csv": ("dev_0,대화,요약\n", "row 2 (line 3, id dev_0): its id is also that of row 1"),
    "duplicate id later.csv": ("b,대화,요약\nc,대화,요약\nb,대화,요약\n", "row 4 (line 5, id b): its id is also that of row 2"),
    "too few fields.csv": ("dev_1,대화\n", "row 2 (line 3): 2 fields instead of 3"),
    "one field.csv": ("dev_1\n", "1 fields instead of 3"),
    "too many fields.csv": ("dev_1,대화,요약,더\n", "4 fields instead of 3"),
    "unquoted comma.csv": ("dev_1,아니, 대화,요약\n", "4 fields instead of 3"),
    "unquoted newline.csv": ("dev_1,대화\n둘째 줄,요약\n", "row 3 (line 4)"),
    "commas only.csv": (",,\n", "row 2 (line 3)"),
    "nul.csv": ("dev_1,대\x00화,요약\n", "NUL"),
    "absurd dialogue.csv": (f"dev_1,{TOO_LONG},요약\n", "'dialogue' has 1,000,001 characters, more than 200,000"),
    "absurd summary.csv": (f"dev_1,대화,{TOO_LONG}\n", "'summary' has 1,000,001 characters, more than 20,000"),
    "damaged utf-8.csv": ("dev_1,대화 여러 글자".encode() + b"\xff,\xec\x9a\x94\n", "byte 0xff, which is not UTF-8"),
    "damaged summary.csv": ("dev_1,여러 글자,요약 ".encode() + b"\xea\xb0\n", "(line 3, id dev_1): 'summary' holds byte 0xea"),
    "after a long cell.csv": ('dev_1,"가\n나\n다",요약\ndev_2,,요약\n', "row 3 (line 6, id dev_2)"),
    "after blank lines.csv": ("\n\ndev_1,,요약\n", "row 2 (line 5, id dev_1)"),
    "control characters.csv": ("\x1b[31mdev,,요약\n", "id ?[31mdev"),
    "no dialogue.jsonl": ({"fname": "x", "summary": "요약"}, "row 2 (line 2, id x): 'dialogue' is missing"),
    "null dialogue.jsonl": ({"fname": "x", "dialogue": None, "summary": "요약"}, "'dialogue' is missing"),
    "number.jsonl": ({"fname": "x", "dialogue": 7, "summary": "요약"}, "'dialogue' is not text but int"),
    "list.jsonl": ({"fname": "x", "dialogue": ["가", "나"], "summary": "요약"}, "'dialogue' is not text but list"),
    "object.jsonl": ({"fname": "x", "dialogue": {"a": 1}, "summary": "요약"}, "'dialogue' is not text but dict"),
    "boolean.jsonl": ({"fname": "x", "dialogue": "대화", "summary": True}, "'summary' is not text but bool"),
    "summary list.jsonl": ({"fname": "x", "dialogue": "대화", "summary": []}, "'summary' is not text but list"),
    "no summary.jsonl": ({"fname": "x", "dialogue": "대화"}, "'summary' is missing"),
    "boolean id.jsonl": ({"fname": True, "dialogue": "대화", "summary": "요약"}, "'fname' is not text but bool"),
    "float id.jsonl": ({"fname": 1.5, "dialogue": "대화", "summary": "요약"}, "'fname' is not text but float"),
    "no id.jsonl": ({"dialogue": "대화", "summary": "요약"}, "'fname' is missing"),
    "nan.jsonl": ('{"fname": "x", "dialogue": NaN, "summary": "요약"}', "'dialogue' is missing"),
    "infinity.jsonl": ('{"fname": "x", "dialogue": Infinity, "summary": "요약"}', "'dialogue' is not text but float"),
    "surrogate.jsonl": ('{"fname": "x", "dialogue": "\\ud800 대화", "summary": "요약"}', "surrogate U+D800"),
    "nul.jsonl": ('{"fname": "x", "dialogue": "대화\\u0000", "summary": "요약"}', "'dialogue' holds a NUL"),
    "broken.jsonl": ('{"fname": "x", "dialogue": "대화', "row 2 (line 2): not valid JSON"),
    "two objects.jsonl": ('{"fname": "x"} {"fname": "y"}', "not valid JSON"),
    "single quotes.jsonl": ("{'fname': 'x'}", "not valid JSON"),
    "raw newline.jsonl": ('{"fname": "x", "dialogue": "가\n나"}', "row 2 (line 2): not valid JSON"),
    "list line.jsonl": ("[1, 2]", "a JSON list, not an object"),
    "text line.jsonl": ('"대화"', "a JSON str, not an object"),
    "null line.jsonl": ("null", "a JSON NoneType, not an object"),
    "twice the key.jsonl": ('{"fname": "x", "dialogue": "가", "dialogue": "나"}', "'dialogue' is given twice"),
    "deep.jsonl": ("[" * 100_000, "nested too deeply"),
    "huge number.jsonl": ('{"fname": ' + "9" * 5000 + ', "dialogue": "가", "summary": "나"}', "row 2 (line 2"),
    "python.jsonl": ("import os; os.system('true')", "not valid JSON"),
    "duplicate id.jsonl": ({"fname": "dev_0", "dialogue": "대화", "summary": "요약"}, "its id is also that of row 1"),
    "one megabyte.jsonl": ({"fname": "x", "dialogue": TOO_LONG, "summary": "요약"}, "1,000,001 characters"),
}  # fmt: skip


def bad_row_file(folder: Path, name: str) -> Path:
    """A good first row, then the bad one."""
    content, _ = BAD_ROWS[name]
    if name.endswith(".csv"):
        content = content if isinstance(content, bytes) else content.encode()
        return write(folder, name, (HEADER + GOOD).encode() + content)
    first = json.dumps({"fname": "dev_0", "dialogue": "대화 하나", "summary": "요약 하나"}, ensure_ascii=False)
    return write(folder, name, f"{first}\n{content if isinstance(content, str) else json.dumps(content)}\n")


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, name):
    path = bad_row_file(tmp_path, name)
    with pytest.raises(EngineError) as caught:
        read(path)
    message = str(caught.value)
    assert caught.value.exit_code == 3 and BAD_ROWS[name][1] in message
    assert str(path) in message and " row " in message
    assert len(message) < 700 and message.isprintable()


@pytest.mark.parametrize("name", [name for name in BAD_ROWS if "newline" not in name])
def test_bad_rows_can_be_skipped(tmp_path, name, caplog):
    path = bad_row_file(tmp_path, name)
    with caplog.at_level(logging.WARNING, logger="engine.data"):
        kept = read(path, on_bad_row="skip", max_bad_rows=1)
    assert kept[0].id == "dev_0"
    assert "dropped 1 bad row" in caplog.text and BAD_ROWS[name][1].split(": ")[-1] in caplog.text


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
    assert len(BAD_ROWS) + len(BAD_FILES) >= 90


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


def test_parquet_rows(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[1]["dialogue"], rows[2]["summary"] = None, ""
    with pytest.raises(
        EngineError, match="2 bad rows: row 2 .id dev_1.: 'dialogue' is missing; row 3 .*'summary' is empty"
    ):
        read(as_parquet(tmp_path, rows))
    with pytest.raises(EngineError, match="'dialogue' is not text but float"):
        read(as_parquet(tmp_path, [{"fname": "a", "dialogue": 1.5, "summary": "x"}]))
    with pytest.raises(EngineError, match="'dialogue' is missing; the columns are 'fname', 'text'"):
        read(as_parquet(tmp_path, [{"fname": "a", "text": "x"}]))
    with pytest.raises(EngineError, match="'dialogue' is missing"):
        read(as_parquet(tmp_path, [{"fname": "a", "dialogue": float("nan"), "summary": "x"}]))


def test_all_bad_rows_in_one_line_up_to_twenty(tmp_path):
    path = write(tmp_path, "rows.csv", HEADER + GOOD + "".join(f"x{i},,요약\n" for i in range(35)))
    with pytest.raises(EngineError, match="35 bad rows: row 2 .*and 15 more") as caught:
        read(path)
    assert str(caught.value).count("'dialogue' is empty") == 20 and "\n" not in str(caught.value)


def test_skip_has_a_cap(tmp_path, caplog):
    path = write(tmp_path, "rows.csv", HEADER + GOOD + "b,,요약\nc,대화,\nd,대화,요약\n")
    with pytest.raises(EngineError, match="2 bad rows, and data.max_bad_rows is 1"):
        read(path, on_bad_row="skip", max_bad_rows=1)
    with pytest.raises(EngineError, match="data.max_bad_rows is 0"):
        read(path, on_bad_row="skip")
    with caplog.at_level(logging.WARNING, logger="engine.data"):
        assert [e.row for e in read(path, on_bad_row="skip", max_bad_rows=2)] == [1, 4]
    assert "id b" in caplog.text and "id c" in caplog.text
    with pytest.raises(EngineError, match="E3.6.*no usable row"):
        read(write(tmp_path, "all.csv", HEADER + "b,,\n"), on_bad_row="skip", max_bad_rows=5)


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


# Between files


def test_overlap_of_splits(caplog):
    train = [Example("a", "대화  하나\n둘", ("x",), None, 4, "train.csv")]
    dev = [
        Example("b", "다른 대화", ("x",), None, 1, "dev.csv"),
        Example("c", "대화 하나\n둘 ", ("y",), None, 9, "dev.csv"),
    ]
    with pytest.raises(EngineError, match=r"E3\.7.*1 of 2 .*row 9 \(id c\) = row 4 \(id a\) of train.csv.*dev.csv"):
        check_splits(train, dev, allow_overlap=False)
    with caplog.at_level(logging.WARNING, logger="engine.data"):
        check_splits(train, dev, allow_overlap=True)
    assert "1 validation dialogue" in caplog.text
    check_splits(train, dev[:1], allow_overlap=False)
    check_splits([Example("b", "x", ("x",), None, 1)], dev[:1], allow_overlap=False)  # ids may repeat between files


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


def test_fingerprint_is_of_the_contents(tmp_path):
    first = read(write(tmp_path, "a.csv", as_csv()))
    same = read(write(tmp_path, "b.jsonl", as_jsonl()))
    assert rows_fingerprint(first) == rows_fingerprint(same) and len(rows_fingerprint([])) == 64
    others = [
        first[1:],
        first[::-1],
        [Example("x", *_rest(first[0])), *first[1:]],
        read(tmp_path / "a.csv", topic_column="topic"),
    ]
    assert len({rows_fingerprint(rows) for rows in [first, *others]}) == 5


def _rest(example: Example) -> tuple:
    return example.dialogue, example.references, example.topic, example.row


# Fuzzing


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.csv.gz", "rows.parquet"])
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
