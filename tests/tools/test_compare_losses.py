"""Two runs are equal to the bit, or the tool names the step and the number."""

from __future__ import annotations

import json

import compare_losses
import pytest


def write(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


ROWS = [
    {"split": "train", "step": 1, "loss": 0.1, "seconds": 1.0, "tokens_per_second": 3.0},
    {"split": "dev", "step": 1, "loss": 0.2, "rouge_mean": 50.0},
]


def test_times_do_not_count(tmp_path):
    slower = [ROWS[0] | {"seconds": 9.0, "tokens_per_second": 1.0}, ROWS[1]]
    assert compare_losses.differences(write(tmp_path / "a", ROWS), write(tmp_path / "b", slower)) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0] | {"loss": 0.1 + 2**-56}, ROWS[1]], "train 1: loss"),
        ([ROWS[0], ROWS[1] | {"rouge_mean": 50.1}], "dev 1: rouge_mean 50.0 -> 50.1"),
        (ROWS[:1], "dev 1: only in one"),
    ],
)
def test_a_difference_is_named(tmp_path, rows, said):
    (line,) = compare_losses.differences(write(tmp_path / "a", ROWS), write(tmp_path / "b", rows))
    assert said in line
