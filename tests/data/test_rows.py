"""Columns to examples: a corpus of bad rows that must each be named, and what holds between files."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import pytest
from row_files import EXPECTED, GOOD, HEADER, ROWS, as_csv, as_jsonl, as_parquet, read, write

from engine.data.rows import Example, check_splits, rows_fingerprint
from engine.errors import EngineError


def test_decomposed_hangul_is_composed(tmp_path):
    path = write(tmp_path, "mac.csv", unicodedata.normalize("NFD", as_csv()))
    assert read(path, topic_column="topic") == EXPECTED


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


def test_rows_to_predict_may_lack_topics_and_are_told(tmp_path, caplog):
    path = write(tmp_path, "test.csv", "fname,dialogue\na,대화\n")
    assert [e.topic for e in read(path, require_summary=False, topic_column="topic")] == [None]
    assert "has no column 'topic': its rows are prompted without a topic" in caplog.text
    with pytest.raises(EngineError, match="E3.4.*'topic' is missing"):
        read(write(tmp_path, "train.csv", HEADER + "a,대화,요약\n"), topic_column="topic")


def test_limit_counts_good_rows_and_stops_there(tmp_path):
    path = write(tmp_path, "rows.csv", HEADER + GOOD + "dev_1,대화 둘,요약\ndev_1,,\n")
    assert len(read(path, limit=2)) == 2 and len(read(path, limit=1)) == 1
    with pytest.raises(EngineError, match="row 3"):
        read(path, limit=3)


# Bad rows. (name, content, what the message must say)

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


def test_the_corpus_is_large():
    assert len(BAD_ROWS) >= 57


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
