"""Predictions that are nearly all alike are found, and different ones are not."""

from __future__ import annotations

import csv

import pytest

from engine.scoring.alike import ALIKE_LIMIT, alike

COLLAPSED = "#Person1#은 #Person2#에게 회의 시간을 묻고, #Person2#는 오후 {}시라고 말합니다."


def test_equal_texts_are_counted():
    assert alike(["가나다라"] * 3 + ["전혀 다른 문장입니다."]) == (0.75, "가나다라")
    assert alike([""] * 4) == (1.0, "") and alike(["하나"]).share == 1.0
    with pytest.raises(ValueError, match="no texts"):
        alike([])


def test_other_numbers_speakers_and_a_few_letters_make_no_difference():
    texts = [COLLAPSED.format(hour) for hour in range(6)]
    texts += [
        COLLAPSED.format(2).replace("#Person1#", "#Person3#"),
        COLLAPSED.format(2).replace("말합니다", "말했습니다"),
    ]
    assert alike([*texts, "산에 가기로 합니다.", "둘은 점심을 함께 먹습니다."]).share == 0.8


def test_real_summaries_are_not_alike(root):
    with (root / "recipes" / "quickstart" / "dev.csv").open(encoding="utf-8", newline="") as file:
        summaries = [row["summary"] for row in csv.DictReader(file)]
    assert alike(summaries).share < ALIKE_LIMIT / 5
