"""What the processes of one run tell each other.

Two roads. Tensors and the flags of every update go through collectives, which are fast but need every rank to arrive
in the same order and within a timeout. Everything else (texts, decisions, failures) goes as JSON through the key-value
store that the process group was started from. Waiting there has no timeout of its own, so one rank may evaluate for
hours while the others wait; a rank that failed inside a section can still tell the others; and nothing is unpickled.
What a timeout would have noticed, heartbeats notice: while a rank waits it watches whether some rank has reported a
failure, and whether the silent ones are still alive.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.runtime.exits import Shapes, classify

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 20  # bytes of one value in the store, whose server refuses values of 8 MiB and more
_HURRIED = 5.0  # seconds of silence after which a rank counts as lost for one that was asked to stop
_GRACE = 2.0  # seconds that a failing rank waits for the others, to settle which failure is the first one's


class RankGroup:
    """The ranks of one run. With one rank every method answers at once.

    Args:
        rank, world_size: as torch.distributed counts them.
        timeout: seconds without a heartbeat after which a rank counts as lost.
        store: a torch.distributed store; None with one rank.
        control: process group for small CPU tensors; None is the default group.
        stopping: whether this process was asked to stop: it then waits less long for silent ranks.
        on_dead_store: called from a thread, with a reason, when the store has not answered for `timeout` seconds; must
            end the process.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        timeout: float = 1800,
        store: Any = None,
        control: Any = None,
        stopping: Callable[[], bool] = lambda: False,
        on_dead_store: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, float(timeout)
        self.is_main = rank == 0
        self._store, self._control = store, control
        self._stopping, self._on_dead_store = stopping, on_dead_store
        self._turn = 0
        self._said: list[str] = []  # keys this rank wrote in its last exchange
        self._stop_beating = threading.Event()
        self._asked: float | None = None  # when the heartbeat in flight asked the store
        if world_size > 1:
            for task in (self._beat, self._guard_store):
                threading.Thread(target=task, name=task.__name__, daemon=True).start()

    # By store

    def exchange(self, name: str, value: Any = None, error: EngineError | None = None) -> list[Any]:
        """Every rank's JSON value, in rank order. All ranks must call it, in the same order, under the same name.

        Raises:
            EngineError: the failure of the lowest rank that reports one, on every rank; E9 when a rank is lost or is at
                another point of the program.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return [json.loads(json.dumps(value))]
        # 1. Say what this rank has to say: a value, or that it failed. Turns are numbered, so that a fast rank's next
        #    exchange cannot be taken for this one.
        turn, self._turn = self._turn, self._turn + 1
        before, self._said = self._said, self._write(f"say/{turn}/{self.rank}", _entry(name, value, error))
        # 2. Hear the others, however late they come. A rank that failed waits only a moment: it will end either way.
        entries = self._collect(turn, name, wait=error is None)
        # 3. All ranks see the same entries, so all raise the same failure.
        for entry in entries:
            if entry is not None and entry["error"] is not None:
                raise _from_json(entry["error"])
        for rank, entry in enumerate(entries):
            if entry["at"] != name:
                what = f"the ranks are at different points: rank {self.rank} at {name}, rank {rank} at {entry['at']}"
                raise EngineError("E9.2", what, name, "report this as a bug")
        # 4. Clear away the exchange before: everyone has read that one, or would not have spoken in this one.
        for key in before:
            self._store.delete_key(key)
        return [entry["value"] for entry in entries]

    def _write(self, key: str, value: Any) -> list[str]:
        data = json.dumps(value).encode()
        parts = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
        keys = [f"{key}/{index}" for index in range(1, len(parts))]
        for name, part in zip(keys, parts[1:], strict=True):
            self._store.set(name, part)
        self._store.set(key, f"{len(parts)} ".encode() + parts[0])  # last: its presence says that all parts are there
        return [key, *keys]

    def _read(self, key: str) -> Any:
        count, first = self._store.get(key).split(b" ", 1)
        rest = [self._store.get(f"{key}/{index}") for index in range(1, int(count))]
        return json.loads(b"".join([first, *rest]))

    def _collect(self, turn: int, name: str, *, wait: bool) -> list[dict[str, Any] | None]:
        """Entries of all ranks; with `wait` False, None for those who do not speak within a moment."""
        entries: list[dict[str, Any] | None] = [None] * self.world_size
        missing, pause, began = set(range(self.world_size)), 0.0002, time.monotonic()
        pulse = _Pulse(self, missing)
        while missing and (wait or time.monotonic() - began <= _GRACE):
            arrived = {rank for rank in missing if self._store.check([f"say/{turn}/{rank}"])}
            for rank in arrived:
                entries[rank] = self._read(f"say/{turn}/{rank}")
            missing -= arrived
            if not missing:
                break
            if wait:
                if (failure := self._failure()) is not None:
                    raise failure
                pulse.check(missing, name)
            # Polling: quick while ranks arrive together, slow while one of them evaluates.
            pause = 0.0002 if arrived else min(pause * 1.5, 0.05)
            time.sleep(pause)
        return entries

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """The ranks' lists, one after the other in rank order, on every rank. Items must be JSON-safe."""
        return [item for part in self.exchange("gather", list(items)) for item in part]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's JSON value on every rank."""
        return self.exchange("broadcast", value if self.is_main else None)[0]

    def agree(self, error: EngineError | None = None, name: str = "agree") -> None:
        """End of a section that may fail on one rank only: everyone goes on, or everyone raises the same error."""
        self.exchange(name, error=error)

    @contextmanager
    def together(self, name: str) -> Iterator[None]:
        """`with ranks.together("reading data"):` a section after which all ranks agree that none has failed."""
        try:
            yield
        except Exception as error:
            if self.world_size > 1:
                self.agree(as_engine_error(error, self.rank), name)
            raise
        self.agree(None, name)

    def wait_for_all(self, name: str) -> None:
        """A barrier without a collective: as long as every rank is alive, it may take any time."""
        self.exchange(name)

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Refuse to start when ranks disagree, for example about the recipe or the version of the code (E9)."""
        for rank, other in enumerate(self.exchange("compare ranks", facts)):
            key = next((key for key in {**facts, **other} if other.get(key) != facts.get(key)), None)
            if key is not None:
                here, there = (json.dumps(side.get(key), ensure_ascii=False)[:60] for side in (facts, other))
                what = f"the ranks disagree about {key}: {here} on rank {self.rank}, {there} on rank {rank}"
                next_step = "start all ranks with the same recipe, code and data"
                raise EngineError("E9.3", what, key, next_step, safe="nothing was started")

    # By collectives

    def highest(self, value: int) -> int:
        """Greatest of the ranks' integers, by one small collective: cheap enough for every update."""
        if self.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        flag = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        return int(flag)

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return bool(self.highest(int(flag)))

    def sum_across_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place, on the tensor's own device."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    # Life and failure

    def report(self, error: EngineError) -> None:
        """Leave word of a failure for ranks that wait or will be cut off. Never raises: the store may be gone."""
        if self.world_size > 1:
            with suppress(Exception):
                self._store.compare_set("failed", "", json.dumps(_to_json(error)))  # the first one stays

    def reported(self) -> EngineError | None:
        """The failure that some rank has reported, if the store can still be asked."""
        if self.world_size > 1:
            with suppress(Exception):
                return self._failure()
        return None

    def _failure(self) -> EngineError | None:
        return _from_json(json.loads(self._store.get("failed"))) if self._store.check(["failed"]) else None

    def _beat(self) -> None:
        pause = max(0.2, min(1.0, self.timeout / 5))
        while not self._stop_beating.is_set():
            try:
                self._asked = time.monotonic()
                self._store.add(f"beat/{self.rank}", 1)
            except Exception:
                return  # the store is gone; whoever waits for it finds out
            finally:
                self._asked = None
            self._stop_beating.wait(pause)

    def leave(self, patience: float) -> None:
        """Sign off before this process ends. Rank 0 goes last, for up to `patience` seconds: if it hosts the store, the
        others lose it with rank 0."""
        if self.world_size == 1:
            return
        deadline = time.monotonic() + patience
        with suppress(Exception):  # the store went first; there is nobody left to wait for
            self._store.set(f"gone/{self.rank}", "1")
            others = [f"gone/{rank}" for rank in range(1, self.world_size)]
            hosting = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            while hosting and time.monotonic() < deadline and not self._store.check(others):
                time.sleep(0.01)

    def close(self) -> None:
        self._stop_beating.set()

    def _guard_store(self) -> None:
        """End this process when the store has not answered for the whole timeout: its host is frozen or cut off.

        The main thread cannot notice that itself, because requests to the store have no time limit of their own.
        """
        while not self._stop_beating.wait(0.5):
            began = self._asked
            if began is not None and time.monotonic() - began > self.timeout:
                self._on_dead_store(f"the store of the process group has not answered for {self.timeout:.0f} s")

    def heartbeat_of(self, rank: int) -> int:
        """How often that rank has shown that it is alive."""
        return int(self._store.get(f"beat/{rank}")) if self._store.check([f"beat/{rank}"]) else 0

    @property
    def patience(self) -> float:
        """Seconds of silence after which a rank counts as lost."""
        return min(self.timeout, _HURRIED) if self._stopping() else self.timeout


class _Pulse:
    """Heartbeats of the ranks that somebody waits for."""

    def __init__(self, ranks: RankGroup, watched: set[int]) -> None:
        self.ranks = ranks
        self.seen = {rank: (-1, time.monotonic()) for rank in watched}  # last count, and when it last grew
        self.next_look = time.monotonic() + 0.2

    def check(self, missing: set[int], name: str) -> None:
        """Raises: EngineError E9.1 for a rank whose count has not grown for too long."""
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look, patience = now + 0.2, self.ranks.patience
        for rank in missing:
            beat, since = self.ranks.heartbeat_of(rank), self.seen[rank]
            if beat != since[0]:
                self.seen[rank] = (beat, now)
            elif now - since[1] > patience:
                what = f"rank {rank} has shown no life for {patience:.0f} s"
                raise EngineError("E9.1", what, f"waiting at {name}", "look at that rank's output, then --resume auto")


def as_engine_error(error: BaseException, rank: int | None = None, shapes: Shapes | None = None) -> EngineError:
    """Any exception in the form that ranks exchange; `owner` remembers who had it."""
    known = classify(error, shapes)
    if known.owner is None:
        known.owner = rank
    return known


def _entry(name: str, value: Any, error: EngineError | None) -> dict[str, Any]:
    return {"at": name, "value": value, "error": None if error is None else _to_json(error)}


def _to_json(error: EngineError) -> dict[str, Any]:
    parts = {name: getattr(error, name) for name in ("code", "what", "where", "next", "safe")}
    return {"parts": parts, "owner": error.owner}


def _from_json(record: dict[str, Any]) -> EngineError:
    error = EngineError(**record["parts"])
    error.owner = record["owner"]
    return error
