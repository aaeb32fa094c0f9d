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
    assert intervals.paired_difference(base, base, seed=0) == (0.0, 0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="cannot be paired"):
        intervals.paired_difference([1.0], [1.0, 2.0], seed=0)


def test_the_p_value_is_as_often_small_as_it_says():
    """Of two systems that are equally good, one in twenty comparisons comes out under 0.05; a real gain nearly always."""
    rng = random.Random(11)
    false = found = 0
    for trial in range(100):
        base = [rng.gauss(50, 10) for _ in range(60)]
        other = [x + rng.gauss(0, 3) for x in base]
        false += intervals.paired_difference(other, base, trial, resamples=300).p < 0.05
        found += intervals.paired_difference([x + 2 for x in other], base, trial, resamples=300).p < 0.05
    assert 0 < false <= 14 and found >= 95
    assert intervals.paired_difference([2.0] * 9, [1.0] * 9, resamples=300).p == pytest.approx(2 / 301)


def test_the_paired_interval_is_that_of_an_independent_bootstrap():
    """Resampled with another generator and another way of counting; equal within the error of 2,000 resamples."""
    numpy = pytest.importorskip("numpy")
    rng = random.Random(13)
    base = [rng.uniform(0, 60) for _ in range(150)]
    other = [x + rng.gauss(1, 8) for x in base]
    found = intervals.paired_difference(other, base, seed=1)
    counts = numpy.random.Generator(numpy.random.MT19937(99)).multinomial(150, [1 / 150] * 150, size=20_000)
    means = counts @ (numpy.array(other) - numpy.array(base)) / 150
    low, high = numpy.quantile(means, [0.025, 0.975])
    error = 4 * means.std() / math.sqrt(2000) / 0.058 * 0.156  # of a 2.5 % quantile: sqrt(p (1 - p)) over its density
    assert found.low == pytest.approx(low, abs=error) and found.high == pytest.approx(high, abs=error)
    assert found.p == pytest.approx(2 * min((means <= 0).mean(), (means >= 0).mean()), abs=0.03)
