"""What a thread makes ahead is what was asked for, in whatever order."""

from __future__ import annotations

import threading

import pytest

from engine.runtime.ahead import Ahead


def test_the_next_value_is_made_before_it_is_asked_for():
    made, second = [], threading.Event()

    def make(place):
        made.append(place)
        if place == 1:
            second.set()
        return 10 * place

    ahead = Ahead(make, lambda place: (place + 1,))
    assert ahead(0) == 0 and second.wait(10)
    assert ahead(1) == 10 and ahead(7) == 70 and ahead(8) == 80  # a jump, as after a resume
    assert sorted(made)[:4] == [0, 1, 2, 7] and len(made) == len(set(made))


def test_an_error_comes_out_where_the_value_would():
    def make(place):
        if place == 1:
            raise ValueError("window 1")
        return place

    ahead = Ahead(make, lambda place: (place + 1,))
    assert ahead(0) == 0
    with pytest.raises(ValueError, match="window 1"):
        ahead(1)
