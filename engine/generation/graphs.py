"""Decoding steps without a host: fixed shapes and addresses, so that a GPU can replay one as a CUDA graph.

An eager step launches 300 to 1,300 kernels from Python, which for small models takes longer than running them. Here the
slot, the position and the mask are device tensors, attention reads a fixed window of slots, and the whole forward pass
is captured once per window and replayed. Windows grow in strides, and shrink again when dead slots are dropped.

Off unless `generation.cuda_graphs` asks for it: on a CPU the steps are held against the eager ones, but no GPU has replayed
them yet. `StaticStep` runs on any device (the tests hold it against the eager step on a CPU); capturing needs CUDA. Where a
capture fails, its call goes on with the same step without a graph, and the model's later ones with the eager step; one
warning says so.

Shapes: B examples, K beams, C slots, W window (slots that attention reads), V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import torch

from engine import families

logger = logging.getLogger(__name__)

WINDOW_STRIDE = 64
MIN_STEPS = 16  # a capture costs about two eager steps per window
_uncaptured: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # models of which a capture has failed


class StaticStep:
    """The steps of one `TreeDecoder`, for as long as its examples stay the same."""

    def __init__(self, decoder):
        self.decoder = decoder
        tree, device = decoder.tree, decoder.device
        beams = decoder.beams
        self.tokens = torch.zeros(decoder.examples, beams, dtype=torch.long, device=device)
        self.parents = torch.arange(beams, device=device).repeat(decoder.examples, 1)
        self.slots = tree.slot + torch.arange(beams, device=device)
        self.position = torch.tensor(tree.position, device=device)
        self.used: set[int] = set()
        self.graphs: dict[int, tuple[Callable[[], None], torch.Tensor]] = {}
        self.pool = None
        self.capturable = device.type == "cuda"

    def __call__(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        """Logits `[B, K, V]`, valid until the next call."""
        self.tokens.copy_(tokens)
        if parents is not None:
            self.parents.copy_(parents)
        window = self._window()
        captured = self.graphs.get(window)
        if captured is None and self.capturable and window in self.used:
            captured = self._capture(window)
        self.used.add(window)  # the first time runs eagerly, which loads the kernels that a capture must not load
        if captured is None:
            return self._run(window)
        replay, logits = captured
        replay()
        return logits

    def moved(self) -> None:
        """Dead slots were dropped: go on from the tree's new slot."""
        self.slots.copy_(self.decoder.tree.slot + torch.arange(self.decoder.beams, device=self.slots.device))

    def _window(self) -> int:
        """W: the slots in use after this step, rounded up to the stride."""
        decoder = self.decoder
        generated = decoder.tree.slot + decoder.beams - decoder.prompt_length
        strides = -(-generated // WINDOW_STRIDE)
        return min(decoder.prompt_length + strides * WINDOW_STRIDE, decoder.capacity)

    def _run(self, window: int) -> torch.Tensor:
        """One step over `window` slots. Reads and writes device tensors only."""
        decoder = self.decoder
        start, beams = decoder.prompt_length, decoder.beams
        generated = decoder.visible[:, :, start:window]
        generated.copy_(generated.gather(1, self.parents[:, :, None].expand(-1, -1, window - start)))
        decoder.visible.scatter_(2, self.slots[None, :, None].expand(decoder.examples, -1, 1), 0.0)
        decoder.slot_positions.index_copy_(1, self.slots, self.position.expand(decoder.examples, beams))
        with decoder.tree.fixed(self.slots, self.position, window):
            logits = decoder.forward(self.tokens, decoder.grouped(decoder.visible[:, None, :, :window]), window)
        self.slots.add_(beams)
        self.position.add_(1)
        return logits

    def _capture(self, window: int) -> tuple[Callable[[], None], torch.Tensor] | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context brings the stream back: after a failed capture torch leaves its own as the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                logits = self._run(window)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("generation.cuda_graphs: decoding goes on without CUDA graphs: %s", reason)
            _uncaptured.add(self.decoder.model)
            self.capturable = False
            torch.cuda.synchronize()
            return None
        self.pool = graph.pool()
        self.graphs[window] = (graph.replay, logits)
        return self.graphs[window]


def worth_capturing(model: torch.nn.Module, device: torch.device, steps: int) -> bool:
    """Whether a call that may should decode with fixed shapes. Not for models spread over devices, nor under autocast, whose
    cache of converted weights would end up in a graph's memory, nor where a capture has failed before."""
    if device.type != "cuda" or steps < MIN_STEPS or hasattr(model, "hf_device_map") or model in _uncaptured:
        return False
    if not families.of(model.config.model_type).capturable:
        return False
    return not torch.is_autocast_enabled("cuda")
