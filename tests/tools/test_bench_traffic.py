"""The bytes that ranks exchange: what is counted, and what a ring makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "bench"))
import traffic


def test_every_collective_is_counted_once(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with traffic.Traffic() as counted:
            dist.all_reduce(torch.ones(10))
            dist.all_gather_into_tensor(torch.empty(6), torch.ones(6))
            dist.reduce_scatter_tensor(torch.empty(8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16))
            torch.ones(3) + 1
    finally:
        dist.destroy_process_group()
    calls = {f"{kind}_calls": 1 for kind in ("all_reduce", "all_gather", "reduce_scatter")}
    assert counted.counts == calls | {"all_reduce_bytes": 40, "all_gather_bytes": 24, "reduce_scatter_bytes": 16}


def test_a_ring_sends_a_reduced_tensor_twice():
    reduced = {"all_reduce_calls": 2, "all_reduce_bytes": 800}
    in_turn = {"reduce_scatter_calls": 2, "reduce_scatter_bytes": 800, "all_gather_calls": 2, "all_gather_bytes": 800}
    for ranks, sent in ((2, 800), (8, 1400)):
        assert traffic.per_rank(reduced, ranks) == traffic.per_rank(in_turn, ranks)
        assert traffic.per_rank(reduced, ranks) == {"bytes": sent, "hops": 4 * (ranks - 1)}


def test_more_machines_are_as_slow_as_the_link_between_them():
    volume = {"all_reduce_calls": 0, "all_reduce_bytes": 8e9}
    within, between = (traffic.estimate(volume, ranks)["seconds"] for ranks in (8, 16))
    assert within == pytest.approx(2 * 7 / 8 * 8e9 / traffic.LINKS["within"])
    assert between == pytest.approx(2 * 15 / 16 * 8e9 / traffic.LINKS["between"])
