"""What ranks send each other: counted in a run, and estimated on paper for more of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "reduce_scatter": "reduce_scatter"}
_KINDS["broadcast"] = "broadcast"
_SHARES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "broadcast": 1.0}
NODE = 8  # GPUs that share a machine
LINKS = {
    "within": 200e9,
    "between": 25e9,
}  # bytes a second each way and GPU: NVLink 4 at work, and a 200 Gb/s card each
LATENCY = 10e-6  # seconds of one hop of a ring


class Traffic(TorchDispatchMode):
    """While open, counts the collectives that torch really issues, C++ reducers included: calls and bytes by kind.

    Bytes are those of the whole tensor: what is reduced, or what has been gathered afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.lstrip("_").replace("_base", "")
            kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
            if kind is not None:
                self.counts[f"{kind}_calls"] += 1
                self.counts[f"{kind}_bytes"] += max(_bytes(value) for value in args[:2])
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def per_rank(volume: dict[str, float], ranks: int) -> dict[str, float]:
    """Bytes that one of `ranks` sends in an update, and the hops it waits for, all collectives as rings.

    A ring of n sends (n - 1) / n of a gathered or scattered tensor, and twice that of a reduced one.
    """
    kinds = [kind for kind in _SHARES if f"{kind}_bytes" in volume]
    share = (ranks - 1) / ranks
    return {
        "bytes": sum(_SHARES[kind] * share * volume[f"{kind}_bytes"] for kind in kinds),
        "hops": sum(_SHARES[kind] * (ranks - 1) * volume[f"{kind}_calls"] for kind in kinds),
    }


def estimate(volume: dict[str, float], ranks: int) -> dict[str, float]:
    """Seconds of communication an update of that volume on `ranks` GPUs, if nothing overlaps.

    The slowest link of the ring sets the pace. `update_seconds_for_90_percent` is how long an update's own work must take
    for nine tenths of the time to be work.
    """
    own = per_rank(volume, ranks)
    link = LINKS["within" if ranks <= NODE else "between"]
    seconds = own["bytes"] / link + own["hops"] * LATENCY
    return {"gib_sent": own["bytes"] / 2**30, "seconds": seconds, "update_seconds_for_90_percent": 9 * seconds}
