"""Key/value cache shared by all beams of an example, and the attention that reads it.

Shapes: B examples, K beams (or samples) per example, P prompt tokens, H heads, D head size, C slots.

Ordinary beam search keeps one cache row per beam and copies all of it whenever beams change places. Here an example
owns one row. Slots `0..P-1` hold its prompt, then every step adds K slots, one per beam, and nothing ever moves: which
slots are the ancestors of which beam is a mask `[B, K, C]`, and changing places means gathering rows of that mask.
The K queries of an example attend to its row together, as if they were K tokens of one sequence.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ATTENTION_NAME = "beams_share_keys"


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, `[B, H, C, D]`, allocated once, written at `cache.slot`, never reordered."""

    is_sliding = False

    def __init__(self, tree: TreeCache):
        super().__init__()
        self.tree = tree

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the first write's dtype and device (which autocast or sharding may have chosen)."""

        def empty(like: torch.Tensor) -> torch.Tensor:
            return like.new_empty(self.tree.examples, like.shape[1], self.tree.capacity, like.shape[3])

        self.keys, self.values = empty(key_states), empty(value_states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write states `[B, H, n, D]` or beam-major `[B*K, H, 1, D]`; return all that are in use, `[B, H, used, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = self._per_example(key_states), self._per_example(value_states)
        start = self.tree.slot
        end = start + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _per_example(self, states: torch.Tensor) -> torch.Tensor:
        """`[B*K, H, 1, D]` -> `[B, H, K, D]`; states that already have one row per example pass unchanged."""
        if states.shape[0] == self.tree.examples:
            return states
        _, heads, _, size = states.shape
        return states.reshape(self.tree.examples, -1, heads, size).transpose(1, 2)

    def get_seq_length(self) -> int:
        """Tokens before the next one in any beam's own sequence: a position, not a number of slots."""
        return self.tree.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tree.slot + query_length, 0

    def get_max_length(self) -> int:
        return self.tree.capacity


class TreeCache(Cache):
    """The layers, and the two counters that they share: `slot` (next free slot) and `position` (next token's place)."""

    def __init__(self, examples: int, capacity: int):
        self.examples = examples
        self.capacity = capacity
        self.slot = 0
        self.position = 0
        super().__init__(layer_class_to_replicate=partial(TreeLayer, self))

    def keep(self, holes: torch.Tensor, movers: torch.Tensor, examples: int) -> None:
        """Shrink to `examples` rows after moving rows `movers` into rows `holes` (see `fill_holes`)."""
        fill_holes(self.layers, holes, movers, examples)
        self.examples = examples

    def pick(self, start: int, order: torch.Tensor) -> None:
        """Keep of the slots from `start` on only those that `order` `[B, m]` names for each example, in that order."""
        end, count = self.slot, order.shape[1]
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                states[:, :, start : start + count] = states[:, :, start:end].gather(2, index)
        self.slot = start + count


def fill_holes(layers, holes: torch.Tensor, movers: torch.Tensor, examples: int) -> None:
    """Keep the first `examples` rows of each layer, after copying rows `movers` over rows `holes`.

    Costs one row per departed example instead of a copy of all that stay, and allocates nothing that lasts.
    """
    for layer in layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            if holes.numel():
                states.index_copy_(0, holes, states.index_select(0, movers))
            setattr(layer, name, states[:examples])


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
