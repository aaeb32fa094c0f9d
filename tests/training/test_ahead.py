"""Windows made ahead by a thread are the windows that were asked for, in whatever order."""

from __future__ import annotations

import threading

import pytest
import torch
from test_job import job_of

from engine.training.ahead import Ahead


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


def test_a_job_beside_a_gpu_gets_the_same_windows():
    plain, ahead = job_of(), job_of()
    ahead.runtime.device = torch.device("cuda")
    ahead.__post_init__()
    assert isinstance(ahead.windows, Ahead) and not isinstance(plain.windows, Ahead)
    places = [(epoch, index) for epoch in range(2) for index in range(plain.sampler.updates_per_epoch)]
    for place in places:
        ours, theirs = ahead.load_window(*place), plain.load_window(*place)
        assert ours.ids == theirs.ids
        for one, other in zip(ours.batches, theirs.batches, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
