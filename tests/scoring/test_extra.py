"""Metrics of one's own: what they are asked, and which answers are scores."""

from __future__ import annotations

import numpy
import pytest
import torch

from engine.scoring import extra

PREDICTIONS, REFERENCES, DIALOGUES = ["가", "나"], [("가", "다"), ("라",)], ["대화 1", "대화 2"]


def measure(metric):
    return extra.measure(metric, PREDICTIONS, REFERENCES, DIALOGUES)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (3, (3.0, None)),
        (numpy.float32(0.5), (0.5, None)),
        (torch.tensor(2.0), (2.0, None)),
        ([1, 2.0], (1.5, [1.0, 2.0])),
        ((True, False), (0.5, [1.0, 0.0])),
        (numpy.array([1.0, 4.0]), (2.5, [1.0, 4.0])),
    ],
)
def test_numbers_and_lists_of_a_number_a_row_are_scores(answer, expected):
    assert measure(lambda predictions, references: answer) == expected


@pytest.mark.parametrize("answer", ["0.5", None, {"f1": 1.0}, [1.0], [1.0, "2"], [[1.0], [2.0]], numpy.ones((2, 2))])
def test_other_answers_are_refused(answer):
    with pytest.raises(ValueError, match="it returned"):
        measure(lambda predictions, references: answer)


def test_it_is_asked_in_lists_and_about_dialogues_where_it_wants_them():
    asked = []
    measure(lambda predictions, references: asked.append((predictions, references)) or 0)
    measure(lambda predictions, references, dialogues: asked.append(dialogues) or 0)
    assert asked == [(["가", "나"], [["가", "다"], ["라"]]), ["대화 1", "대화 2"]]


def test_the_choosing_metric_says_its_direction():
    names = ("loss", "rouge_sum", "max:fluency", "min:length_error")
    assert [extra.key_of(name) for name in names] == ["loss", "rouge_sum", "fluency", "length_error"]
    assert [extra.less_is_better(name) for name in names] == [True, False, False, True]
