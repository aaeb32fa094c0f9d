"""Key/value cache shared by all beams of an example, and the attention that reads it.

Shapes: B examples, K beams (or samples) per example, P prompt tokens, H heads, D head size, C slots.

Ordinary beam search keeps one cache row per beam and copies all of it whenever beams change places. Here an example
owns one row. Slots `0..P-1` hold its prompt, then every step adds K slots, one per beam, and nothing ever moves: which
slots are the ancestors of which beam is a mask `[B, K, C]`, and changing places means gathering rows of that mask.
The K queries of an example attend to its row together, as if they were K tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ATTENTION_NAME = "beams_share_keys"


class RowCache(Cache):
    """A cache with one row per example, allocated once.

    `rows` (first, end) are the examples that the model runs on just now: all of them, but for a prefill in groups.
    `clean`: no cell may hold anything but numbers, because slots are read (under a mask) before they are written.
    """

    clean = False

    def __init__(self, layer: type[CacheLayerMixin], examples: int):
        super().__init__(layer_class_to_replicate=partial(layer, self))
        self.examples = examples
        self.rows = (0, examples)

    def keep(self, holes: torch.Tensor, movers: torch.Tensor, examples: int) -> None:
        """Keep the first `examples` rows, after copying rows `movers` over rows `holes`.

        Costs one row per departed example instead of a copy of all that stay, and allocates nothing that lasts.
        """
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                self._move(states, holes, movers)
            layer.keys, layer.values = layer.keys[:examples], layer.values[:examples]
        self.examples = examples
        self.rows = (0, examples)

    def _move(self, states: torch.Tensor, holes: torch.Tensor, movers: torch.Tensor) -> None:
        states.index_copy_(0, holes, states.index_select(0, movers))

    def nbytes(self) -> int:
        """Bytes of keys and values, over all layers."""
        return sum(states.nbytes for layer in self.layers for states in (layer.keys, layer.values))


class TreeCache(RowCache):
    """What has been decoded. All layers share `slot` (the next free one) and `position` (the next token's place)."""

    def __init__(self, examples: int, capacity: int):
        super().__init__(TreeLayer, examples)
        self.capacity = capacity
        self.slot = 0
        self.position = 0
        self._fixed: tuple[torch.Tensor, torch.Tensor, int] | None = None

    @contextmanager
    def fixed(self, slots: torch.Tensor, position: torch.Tensor, window: int) -> Iterator[None]:
        """Write to `slots` `[K]`, read the first `window` slots, and give out `position` as a tensor meanwhile."""
        self._fixed = (slots, position, window)
        try:
            yield
        finally:
            self._fixed = None

    def write(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Store `new` `[B, H, n, D]` in `states` `[B, H, C, D]`. Returns the slots to attend to."""
        if self._fixed is not None:
            slots, _, window = self._fixed
            states.index_copy_(2, slots, new)
            return states[:, :, :window]
        first, last = self.rows
        end = self.slot + new.shape[2]
        states[first:last, :, self.slot : end] = new
        return states[first:last, :, :end]

    def next_position(self) -> int | torch.Tensor:
        return self.position if self._fixed is None else self._fixed[1]

    def pick(self, start: int, order: torch.Tensor) -> None:
        """Keep of the slots from `start` on only those that `order` `[B, m]` names for each example, in that order."""
        end, count = self.slot, order.shape[1]
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                states[:, :, start : start + count] = states[:, :, start:end].gather(2, index)
        self.slot = start + count


class SourceCache(RowCache):
    """The source of an encoder-decoder, for cross-attention: written once, shared by all beams."""

    def __init__(self, examples: int, width: int):
        super().__init__(SourceLayer, examples)
        self.width = width
        self.written = [width] * examples  # cells of each row that hold numbers; the others may hold anything, NaN too

    def _move(self, states: torch.Tensor, holes: torch.Tensor, movers: torch.Tensor) -> None:
        """A shorter source leaves the longer one's last cells in place: masked, but numbers."""
        if min(self.written) == self.width:
            return super()._move(states, holes, movers)
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            width = self.written[mover]
            states[hole, :, :width] = states[mover, :, :width]


class _RowLayer(CacheLayerMixin):
    """Keys and values `[B, H, C, D]` of one layer, allocated for the first write's dtype and device (autocast and
    sharding have their say there)."""

    is_sliding = False

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def empty(like: torch.Tensor) -> torch.Tensor:
            shape = (self.cache.examples, like.shape[1], self.get_max_length(), like.shape[3])
            return like.new_zeros(shape) if self.cache.clean else like.new_empty(shape)

        self.keys, self.values = empty(key_states), empty(value_states)
        self.is_initialized = True


class TreeLayer(_RowLayer):
    """One layer of a `TreeCache`."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write states `[B, H, n, D]` or beam-major `[B*K, H, 1, D]`; return all that are in use, `[B, H, used, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return (
            self.cache.write(self.keys, self._per_example(key_states)),
            self.cache.write(self.values, self._per_example(value_states)),
        )

    def _per_example(self, states: torch.Tensor) -> torch.Tensor:
        """`[B*K, H, 1, D]` -> `[B, H, K, D]`; states that already have one row per example pass unchanged."""
        first, last = self.cache.rows
        if states.shape[0] == last - first:
            return states
        _, heads, _, size = states.shape
        return states.reshape(last - first, -1, heads, size).transpose(1, 2)

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens before the next one in any beam's own sequence: a position, not a number of slots."""
        return self.cache.next_position()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.slot + query_length, 0

    def get_max_length(self) -> int:
        return self.cache.capacity


class SourceLayer(_RowLayer):
    """One layer of a `SourceCache`."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write states `[b, H, n, D]` of the b rows at hand, whose longest source has n tokens; return them as stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, last = self.cache.rows
        width = key_states.shape[2]
        self.cache.written[first:last] = [width] * (last - first)
        stored = self.keys[first:last, :, :width], self.values[first:last, :, :width]
        stored[0].copy_(key_states)
        stored[1].copy_(value_states)
        return stored

    def get_seq_length(self) -> int:
        return self.cache.width if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_max_length(self) -> int:
        return self.cache.width


def beam_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    slot_positions: torch.Tensor | None = None,
    source_groups: list[tuple[int, int, int]] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of K beams per example over one row of keys per example; an entry of transformers' attention registry.

    query: `[B*K, H, 1, D]` (encoder-decoders: beams in the batch) or `[B, H, K, D]` (causal models: beams as tokens).
    key, value: `[B, Hkv, n, D]`. attention_mask: additive `[B, 1, 1 or G*K, n]` with G = H / Hkv, or None.
    position_bias: T5's `[1, H, 1, n]`, computed as if a slot's number were its position; `slot_positions` `[B, n]` puts
    that right. source_groups: for cross-attention, rows `a..b` and the longest source among them. T5's bias of
    cross-attention is all zeros and ignored. Returns `[B*K, 1, H, D]` or `[B, K, H, D]`.
    """
    rows, heads, tokens, size = query.shape
    examples, kv_heads = key.shape[:2]
    to_itself = getattr(module, "is_causal", False)
    if rows != examples:
        query = query.reshape(examples, -1, heads, size).transpose(1, 2)
    beams = query.shape[2]
    if attention_mask is not None:
        attention_mask = attention_mask.to(query.dtype)
    if position_bias is not None:
        # transformers masks with the least finite number here, so a source of nothing but padding is averaged.
        if attention_mask is not None:
            attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min)
        if to_itself:
            index = slot_positions[:, None, None].expand(-1, heads, -1, -1)
            attention_mask = position_bias.expand(examples, -1, -1, -1).gather(-1, index) + attention_mask
    if kv_heads != heads:
        query = query.reshape(examples, kv_heads, -1, size)
    options = {"dropout_p": dropout, "scale": scaling}
    if source_groups and not to_itself:
        parts = [
            scaled_dot_product_attention(
                query[a:b], key[a:b, :, :n], value[a:b, :, :n], attn_mask=attention_mask[a:b, :, :, :n], **options
            )
            for a, b, n in source_groups
        ]
        output = torch.cat(parts)
    else:
        output = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, **options)
    output = output.reshape(examples, heads, beams, -1).transpose(1, 2)
    return output.reshape(rows, tokens, heads, -1), None


AttentionInterface.register(ATTENTION_NAME, beam_attention)
# Without a mask function of the same name transformers drops every mask it is given as 2D, silently.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
