"""Which rows make up which update: arithmetic on (seed, epoch, index), so that resuming is arithmetic too.

A window is the rows of one optimizer update over all ranks: micro_batch_size x accumulation_steps x world_size of them,
and in an epoch's last window whatever remains. Each row occurs once per epoch. Which rows share a window depends on
that product only, not on its factors: 1 x 8, 4 accumulated x 2 and 2 ranks x 2 accumulated x 2 train on the same windows.

A budget of tokens changes how a window is cut into micro-batches, never which rows are in it: an update has as many rows as
without. P parts of a row are padded apart: source and target of an encoder-decoder, prompt and answer of a causal LM as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# How "length" gathers rows: 1, until November 2026, exactly by the sum of their parts; 2 nearly so, by the first part.
ORDERS = (1, 2)
STRATEGIES = ("length", "random", "sequential", "tokens")

# Windows whose rows are sorted by length together. More: less padding; fewer: closer to a full shuffle.
_WINDOWS_PER_CHUNK = 50
# "length": how far a row may be sorted from its place, as a share of its length. Sorted exactly, a small file has nearly the
# same windows in each epoch. The quickstart's loss on its dev rows after 8 epochs, seeds 1, 2 and 3: 0.037, 0.045 and 0.036 by
# "random"; 0.044, 0.057 and 0.041 sorted exactly by the sum of both lengths; 0.039, 0.050 and 0.040 with such a spread.
_JITTER = 0.05
# "tokens": of these many windows of like source length, rows of like target length share one. On Korean DialogSum (12,457
# rows, windows of 16) 1, 2 and 4 of them leave 8.0, 6.8 and 7.5 % of all cells as padding; sorting by the sum 9.9 %.
_WINDOWS_PER_GROUP = 2


class WindowSampler:
    """Seeded windows, dealt to ranks.

    Args:
        lengths: tokens of each row, (N,) or (N, P).
        micro_batch_size: most rows of one forward pass on one rank.
        accumulation_steps: most micro-batches of one rank in one update.
        rank: whose micro-batches `window` returns.
        strategy: "random" shuffles; "length" shuffles, then gathers rows whose first parts are of like length, within chunks
            of 50 windows, in shuffled order; "tokens" does so by both parts, and cuts windows by `tokens_per_batch`;
            "sequential" keeps the order of the file.
        tokens_per_batch: with "tokens", most cells of one forward pass on one rank, padding included; a longer row goes
            alone. `micro_batch_size` and `accumulation_steps` then say only how many rows an update has.

    Attributes:
        order: which of `ORDERS`; a run keeps the one that it began with.

    Raises:
        ValueError: arguments out of range.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Sequence[Sequence[int]],
        *,
        micro_batch_size: int,
        accumulation_steps: int,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 42,
        strategy: str = "length",
        tokens_per_batch: int | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
        if min(micro_batch_size, accumulation_steps, world_size) < 1:
            raise ValueError("micro_batch_size, accumulation_steps and world_size must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if seed < 0:
            raise ValueError("seed must not be negative")
        budgeted = tokens_per_batch is not None
        if budgeted != (strategy == "tokens") or (budgeted and tokens_per_batch < 1):
            raise ValueError('tokens_per_batch belongs to strategy "tokens" and must be at least 1')
        self.parts = np.asarray(lengths, dtype=np.int64)
        self.parts = (
            self.parts.reshape(len(self.parts), -1) if self.parts.size else np.zeros((0, 1), np.int64)
        )  # (N, P)
        self.lengths, self.tokens_per_batch = self.parts.sum(axis=1), tokens_per_batch  # (N,)
        self.micro_batch_size, self.world_size, self.rank = micro_batch_size, world_size, rank
        self.seed, self.strategy = seed, strategy
        self.window_size = micro_batch_size * accumulation_steps * world_size
        self.updates_per_epoch = -(-len(self.lengths) // self.window_size)
        self.order = ORDERS[-1]
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None  # (epoch, order), rows

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
        mine = [ranks[self.rank] for ranks in self._dealt(epoch, index)]
        return [micro for micro in mine if micro or same_count] or [[]]

    def cells(self, epoch: int, index: int) -> np.ndarray:
        """Cells (P,) that all ranks compute for one update, padding included."""
        dealt = [micro for ranks in self._dealt(epoch, index) for micro in ranks if micro]
        return sum(len(micro) * self.parts[micro].max(axis=0) for micro in dealt)

    def padding(self, epoch: int, *, most: int = 500) -> np.ndarray:
        """Share (P,) of an epoch's cells that is padding; of longer epochs `most` evenly spaced windows are looked at."""
        count = min(most, self.updates_per_epoch)
        picked = [at * self.updates_per_epoch // count for at in range(count)]
        real = sum(self.parts[self.global_window(epoch, index)].sum(axis=0) for index in picked)
        return 1 - real / np.maximum(1, sum(self.cells(epoch, index) for index in picked))

    def _dealt(self, epoch: int, index: int) -> list[list[list[int]]]:
        """One update's micro-batches by micro-step and rank; those of one micro-step are computed at the same time."""
        rows = self.global_window(epoch, index)
        if self.strategy != "sequential":
            # Longest first: an update that does not fit fails in its first forward pass, and padding stays small.
            rows.sort(key=lambda row: (-int(self.lengths[row]), row))
        return [self._deal(rows[start:end]) for start, end in pairwise(self._cuts(rows))]

    def _deal(self, rows: list[int]) -> list[list[int]]:
        """Each rank's part of the rows of one micro-step."""
        ranks, size = range(self.world_size), self.micro_batch_size
        if self.strategy == "sequential":
            return [rows[rank * size : (rank + 1) * size] for rank in ranks]
        return [rows[rank :: self.world_size] for rank in ranks]  # like lengths on every rank: none waits for another

    def _cuts(self, rows: list[int]) -> list[int]:
        """Where a window's rows are cut into micro-steps: the same on every rank, so that all have as many."""
        if self.tokens_per_batch is None:
            return [*range(0, len(rows), self.micro_batch_size * self.world_size), len(rows)]
        cuts, widest = [0], np.zeros_like(self.parts[0])
        for start in range(0, len(rows), self.world_size):  # one more row for each rank
            own = self.parts[rows[start : start + self.world_size]].max(axis=0)
            count, wider = (start - cuts[-1]) // self.world_size + 1, np.maximum(widest, own)
            fits = count == 1 or count * wider.sum() <= self.tokens_per_batch
            if not fits:
                cuts.append(start)
            widest = wider if fits else own
        return [*cuts, len(rows)]

    def _order(self, epoch: int) -> np.ndarray:
        """All rows (N,) in the order of the epoch's windows."""
        if epoch < 0:
            raise ValueError("epochs count from 0")
        if self._cached is None or self._cached[0] != (epoch, self.order):
            self._cached = ((epoch, self.order), self._make_order(epoch))
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
        chunks = [self._gathered(chunk, random) for chunk in chunks]
        if not chunks:
            return order
        windows = np.concatenate(chunks).reshape(-1, self.window_size)
        windows = windows[_shuffled(np.arange(len(windows)), random)]
        return np.concatenate([windows.reshape(-1), order[whole:]])

    def _gathered(self, chunk: np.ndarray, random: np.random.PCG64) -> np.ndarray:
        """Rows of a chunk with those of like length side by side."""
        if self.strategy == "length":
            if self.order == 1:
                return chunk[np.argsort(self.lengths[chunk], kind="stable")]
            spread = 1 + _JITTER * (random.random_raw(len(chunk)) / 2.0**63 - 1)
            return chunk[np.argsort(self.parts[chunk, 0] * spread, kind="stable")]
        chunk, size = chunk[np.argsort(self.parts[chunk, 0], kind="stable")], _WINDOWS_PER_GROUP * self.window_size
        groups = [chunk[start : start + size] for start in range(0, len(chunk), size)]
        return np.concatenate([group[np.argsort(self.parts[group, -1], kind="stable")] for group in groups])


def _shuffled(values: np.ndarray, random: np.random.PCG64) -> np.ndarray:
    """A permutation by sorting 64-bit random keys."""
    return values[np.argsort(random.random_raw(len(values)), kind="stable")]
