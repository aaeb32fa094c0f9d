"""Bootstrap intervals cover as often as they say; pairs see what intervals side by side hide."""

from __future__ import annotations

import math
import random

import pytest

from engine.scoring import intervals


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = random.Random(3)
    covered = 0
    for trial in range(100):
        scores = [rng.gauss(50, 10) for _ in range(60)]
        mean, low, high = intervals.bootstrap_interval(scores, seed=trial, resamples=300)
        assert low < mean < high and mean == pytest.approx(sum(scores) / 60)
        covered += low <= 50 <= high
    assert 86 <= covered <= 100
    # the normal approximation is close for 400 rows
    scores = [rng.gauss(0, 1) for _ in range(400)]
    interval = intervals.bootstrap_interval(scores, seed=1)
    assert (interval.high - interval.low) == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)
    assert intervals.bootstrap_interval(scores, seed=1) == interval


def test_paired_difference_sees_what_separate_intervals_hide():
    rng = random.Random(5)
    base = [rng.uniform(0, 100) for _ in range(200)]
    ahead = [x + 1 + rng.gauss(0, 0.5) for x in base]
    difference = intervals.paired_difference(ahead, base, seed=0)
    assert difference.low > 0.8 and difference.high < 1.2 and difference.better_share == 1.0
    assert intervals.paired_difference(base, base, seed=0) == (0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="cannot be paired"):
        intervals.paired_difference([1.0], [1.0, 2.0], seed=0)
