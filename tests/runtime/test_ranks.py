"""What ranks tell each other. Threads stand in for processes, around an in-process store."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from runtime_toys import in_ranks

from engine.errors import EngineError
from engine.runtime.ranks import RankGroup, as_engine_error


def test_gather_keeps_rank_order_and_types():
    rows = in_ranks(3, lambda ranks: ranks.gather([{"rank": ranks.rank, "text": "요약"}, None, 0.1 + 0.2]))
    assert rows[0] == rows[1] == rows[2]
    assert [row["rank"] for row in rows[0][::3]] == [0, 1, 2] and rows[0][2] == 0.1 + 0.2
    assert in_ranks(2, lambda ranks: ranks.gather(["ab"] * (ranks.rank + 1)))[0] == ["ab"] * 3, "unequal lengths"
    assert RankGroup().gather(["ab"]) == ["ab"], "a string is no list of letters, on one rank either"


def test_broadcast_carries_more_than_a_store_value_may_hold():
    text = "가" * 4_000_000
    assert in_ranks(2, lambda ranks: ranks.broadcast(text if ranks.is_main else None)) == [text, text]


@pytest.mark.slow
def test_one_rank_may_be_much_later_than_the_timeout():
    def task(ranks):
        if ranks.rank == 1:
            time.sleep(3)  # alive and busy: its heartbeat goes on
        ranks.wait_for_all("decoding")
        return "met"

    assert in_ranks(2, task, timeout=1.0) == ["met", "met"]


def test_many_exchanges_leave_nothing_in_the_store():
    def task(ranks):
        for number in range(200):
            assert ranks.broadcast(number) == number
        return ranks._store.num_keys()

    assert max(in_ranks(2, task)) < 12


def test_the_owner_of_a_failure_decides_for_all():
    def task(ranks):
        with ranks.together("reading data"):
            if ranks.rank == 1:
                raise EngineError("E3.4", "row 7 is empty", safe="")
        return "went on"

    results = in_ranks(3, task)
    assert [type(result) for result in results] == [EngineError] * 3
    assert {str(result) for result in results} == {"error E3.4: row 7 is empty"}
    assert {result.owner for result in results} == {1}


def test_of_several_failures_the_lowest_rank_speaks():
    def task(ranks):
        with ranks.together("reading data"):
            raise ValueError(f"rank {ranks.rank}")

    results = in_ranks(2, task)
    assert {str(result) for result in results} == {str(results[0])} and "rank 0" in str(results[0])


def test_a_failure_reaches_ranks_that_wait_elsewhere():
    def task(ranks):
        if ranks.rank == 1:
            ranks.report(as_engine_error(EngineError("E7.1", "loss nan"), 1))
            return "left"
        ranks.wait_for_all("somewhere")
        return "never"

    began = time.monotonic()
    results = in_ranks(2, task, timeout=60)
    assert results[1] == "left" and "loss nan" in str(results[0]) and results[0].owner == 1
    assert time.monotonic() - began < 10


def test_a_silent_rank_is_lost_after_the_timeout():
    def task(ranks):
        if ranks.rank == 1:
            ranks.close()  # as if killed or frozen: no more heartbeats
            return "gone"
        ranks.wait_for_all("update 3")
        return "never"

    began = time.monotonic()
    result = in_ranks(2, task, timeout=1.5)[0]
    assert result.exit_code == 9 and "rank 1" in str(result) and "update 3" in str(result)
    assert time.monotonic() - began < 10


def test_ranks_at_different_points_are_told():
    results = in_ranks(2, lambda ranks: ranks.wait_for_all(f"point {ranks.rank}"))
    assert all(result.exit_code == 9 and "different points" in str(result) for result in results)


def test_ranks_that_disagree_do_not_start():
    results = in_ranks(2, lambda ranks: ranks.require_equal({"recipe": "same", "seed": ranks.rank}))
    assert all(result.exit_code == 9 and "disagree about seed" in str(result) for result in results)


_FROZEN_HOST = """
import os, sys, time
sys.path.insert(0, {root!r})
from datetime import timedelta
from torch.distributed import TCPStore
from engine.runtime.ranks import RankGroup
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=30), wait_for_workers=False)
if rank == 0:
    print(store.port, flush=True)
    store.wait(["there"])  # the other one is still importing, perhaps for longer than the timeout below
else:
    store.set("there", "1")
end = lambda reason: (print(reason, flush=True), os._exit(9))
ranks = RankGroup(rank, 2, timeout=6, store=store, on_dead_store=end)
ranks.wait_for_all("start")
print("met", flush=True)
time.sleep(60) if rank == 0 else ranks.wait_for_all("never")
"""


@pytest.mark.slow
def test_a_frozen_host_of_the_store_is_noticed(root):
    """Requests to a store have no time limit: a thread has to keep the time."""
    command = [sys.executable, "-c", _FROZEN_HOST.format(root=str(root))]
    host = subprocess.Popen([*command, "0", "0"], stdout=subprocess.PIPE, text=True)
    try:
        port = host.stdout.readline().strip()
        other = subprocess.Popen([*command, "1", port], stdout=subprocess.PIPE, text=True)
        assert host.stdout.readline() == "met\n"
        host.send_signal(signal.SIGSTOP)
        output, _ = other.communicate(timeout=30)
        assert other.returncode == 9 and "has not answered for 6 s" in output
    finally:
        host.kill()
        host.wait()
