"""Submissions: the sample's format to the letter, and a refusal for everything that would not fit it."""

from __future__ import annotations

import csv

import pytest

from engine.errors import EngineError
from engine.prediction.submission import submission_table, write_submission

SAMPLE = ",fname,summary\n0,test_0,요약문입니다.\n1,test_1,요약문입니다.\n2,test_2,요약문입니다.\n"


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "sample.csv"
    path.write_text(SAMPLE, encoding="utf-8")
    return path


IDS = ["test_0", "test_1", "test_2"]


def test_written_like_the_sample(sample, tmp_path):
    out = tmp_path / "deep" / "out.csv"
    write_submission(submission_table(IDS, ["가", '나, "둘"', "다\n라"], sample), out)
    assert out.read_text(encoding="utf-8") == ',fname,summary\n0,test_0,가\n1,test_1,"나, ""둘"""\n2,test_2,"다\n라"\n'
    with out.open(encoding="utf-8", newline="") as handle:
        assert [row["summary"] for row in csv.DictReader(handle)] == ["가", '나, "둘"', "다\n라"]


def test_the_only_column_beside_the_ids_gets_the_summaries(tmp_path):
    path = tmp_path / "sample.csv"
    path.write_text("번호,요약\na,x\nb,y\n", encoding="utf-8")
    assert submission_table(["a", "b"], ["가", "나"], path) == [["번호", "요약"], ["a", "가"], ["b", "나"]]


def test_without_a_sample():
    assert submission_table(["a", "b"], ["가", "나"]) == [["fname", "summary"], ["a", "가"], ["b", "나"]]


@pytest.mark.parametrize(
    ("ids", "summaries", "message"),
    [
        (["test_0", "test_2", "test_1"], ["가", "나", "다"], "order differs from row 2"),
        (["test_0", "test_1"], ["가", "나"], "1 ids missing, first test_2"),
        ([*IDS, "test_3"], ["가", "나", "다", "라"], "1 ids not in the sample"),
        (["test_0", "test_0", "test_1"], ["가", "나", "다"], "occurs twice"),
        (IDS, ["가", "  ", "다"], "empty summaries, first test_1"),
    ],
)
def test_refusals(sample, ids, summaries, message):
    with pytest.raises(EngineError, match=message) as caught:
        submission_table(ids, summaries, sample)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("fname,summary\n", "no rows"),
        ("fname,answer,note\ntest_0,x,y\n", "no column 'summary'"),
        ("number,summary\n7,x\n", "no column of the sample holds"),
        ("fname,summary\ntest_0\n", "differ in their number"),
    ],
)
def test_bad_samples(tmp_path, content, message):
    path = tmp_path / "sample.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EngineError, match=message):
        submission_table(IDS, ["가", "나", "다"], path)
    with pytest.raises(EngineError, match="cannot be read"):
        submission_table(IDS, ["가", "나", "다"], tmp_path / "absent.csv")
