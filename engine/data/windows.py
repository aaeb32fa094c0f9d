"""Which rows make up which update: arithmetic on (seed, epoch, index), so that resuming is arithmetic too.

A window is the rows of one optimizer update over all ranks: micro_batch_size x accumulation_steps x world_size of them,
and in an epoch's last window whatever remains. Each row occurs once per epoch. Which rows share a window depends on
that product only, not on its factors: 1 x 8, 4 accumulated x 2 and 2 ranks x 2 accumulated x 2 train on the same windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STRATEGIES = ("length", "random", "sequential")

# Windows whose rows are sorted by length together. More: less padding; fewer: closer to a full shuffle.
_WINDOWS_PER_CHUNK = 50


class WindowSampler:
    """Seeded windows, dealt to ranks.

    Args:
        lengths: cost of each row (tokens); its size is the number of rows N.
        micro_batch_size: most rows of one forward pass on one rank.
        accumulation_steps: most micro-batches of one rank in one update.
        rank: whose micro-batches `window` returns.
        strategy: "random" shuffles; "length" shuffles, then gathers rows of like length within chunks of 50 windows, in
            shuffled order; "sequential" keeps the order of the file.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        micro_batch_size: int,
        accumulation_steps: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 42,
        strategy: str = "length",
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
        if min(micro_batch_size, accumulation_steps, world_size) < 1:
            raise ValueError("micro_batch_size, accumulation_steps and world_size must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if seed < 0:
            raise ValueError("seed must not be negative")
        self.lengths = np.asarray(lengths, dtype=np.int64).reshape(-1)  # (N,)
        self.micro_batch_size, self.world_size, self.rank = micro_batch_size, world_size, rank
        self.seed, self.strategy = seed, strategy
        self.window_size = micro_batch_size * accumulation_steps * world_size
        self.updates_per_epoch = -(-len(self.lengths) // self.window_size)
        self._cached: tuple[int, np.ndarray] | None = None  # (epoch, order)

    def global_window(self, epoch: int, index: int) -> list[int]:
        """All ranks' rows of one update. Raises: IndexError where the epoch has no such update."""
        if not 0 <= index < self.updates_per_epoch:
            raise IndexError(f"an epoch has {self.updates_per_epoch} updates; there is no update {index}")
        start = index * self.window_size
        return self._order(epoch)[start : start + self.window_size].tolist()

    def window(self, epoch: int, index: int, *, same_count: bool = False) -> list[list[int]]:
        """This rank's micro-batches of one update: at least one; `[]` where the last window has no row for it.

        Args:
            same_count: as many on every rank, `[]` included.
        """
        rows = self.global_window(epoch, index)
        per_step = self.micro_batch_size * self.world_size
        if self.strategy != "sequential":
            # Longest first: an update that does not fit fails in its first forward pass, and padding stays small.
            rows.sort(key=lambda row: (-int(self.lengths[row]), row))
        micro_batches = [self._deal(rows[start : start + per_step]) for start in range(0, len(rows), per_step)]
        return [micro for micro in micro_batches if micro or same_count] or [[]]

    def _deal(self, rows: list[int]) -> list[int]:
        """This rank's part of the rows that all ranks compute at the same time."""
        if self.strategy == "sequential":
            return rows[self.rank * self.micro_batch_size : (self.rank + 1) * self.micro_batch_size]
        return rows[self.rank :: self.world_size]  # like lengths on every rank: none waits for another

    def _order(self, epoch: int) -> np.ndarray:
        """All rows (N,) in the order of the epoch's windows."""
        if epoch < 0:
            raise ValueError("epochs count from 0")
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._make_order(epoch))
        return self._cached[1]

    def _make_order(self, epoch: int) -> np.ndarray:
        count = len(self.lengths)
        if self.strategy == "sequential":
            return np.arange(count)
        # numpy's compatibility policy fixes raw PCG64 output but not `permutation`, and a checkpoint must find the same
        # order under another version.
        random = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        order = _shuffled(np.arange(count), random)
        if self.strategy == "random":
            return order
        whole = count - count % self.window_size  # the short last window takes random rows and stays last
        chunk_size = _WINDOWS_PER_CHUNK * self.window_size
        chunks = [order[start : min(start + chunk_size, whole)] for start in range(0, whole, chunk_size)]
        chunks = [chunk[np.argsort(self.lengths[chunk], kind="stable")] for chunk in chunks]
        if not chunks:
            return order
        windows = np.concatenate(chunks).reshape(-1, self.window_size)
        windows = windows[_shuffled(np.arange(len(windows)), random)]
        return np.concatenate([windows.reshape(-1), order[whole:]])


def _shuffled(values: np.ndarray, random: np.random.PCG64) -> np.ndarray:
    """A permutation by sorting 64-bit random keys."""
    return values[np.argsort(random.random_raw(len(values)), kind="stable")]
