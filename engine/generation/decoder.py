"""Runs a model for B examples x K beams over one cache per example: the prompt once, then a token per beam and step.

Shapes: B examples, K beams (or samples), P prompt tokens (decoder start for encoder-decoders), S source tokens,
C slots, G query heads per key head, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from engine.generation.cache import SourceCache, TreeCache
from engine.generation.encoder import source_lengths
from engine.generation.graphs import StaticStep

PRUNE_EVERY = 16  # steps; a look costs one device read
WORTH_PRUNING = 0.7  # share of slots alive above which moving them does not pay
SAME_LENGTH = 0.75  # sources down to this share of a group's longest join it


@dataclass
class Prompt:
    """What decoding starts from, one row per example.

    ids `[B, P]`; mask `[B, P]` of ids (causal models; None = all real) or `[B, S]` of the source (encoder-decoders);
    position_ids `[B, P]` or None (causal models); encoder_states `[B, S, D]` or None (encoder-decoders).
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    encoder_states: torch.Tensor | None = None


class TreeDecoder:
    """`prefill()` once, then `step(tokens, parents)`; `keep(rows)` drops finished examples."""

    def __init__(self, model: torch.nn.Module, prompt: Prompt, beams: int, new_tokens: int, fixed_shapes: bool = False):
        """Args: beams: K. new_tokens: most tokens that any beam will get; fixes the cache's size.
        fixed_shapes: run steps as `graphs.StaticStep` does."""
        self.model = model
        self.prompt = prompt
        self.beams = beams
        self.examples, self.prompt_length = prompt.ids.shape
        # The last token is chosen but never fed back, so it needs no slot.
        self.capacity = self.prompt_length + beams * max(new_tokens - 1, 0)
        self.tree = TreeCache(self.examples, self.capacity)
        self.tree.clean = fixed_shapes
        self.static: StaticStep | None = None
        self.groups = 1
        self.source = None
        self.cache = self.tree
        if prompt.encoder_states is not None:
            self.source = SourceCache(self.examples, prompt.encoder_states.shape[1])
            self.cache = EncoderDecoderCache(self.tree, self.source)
        self.device = prompt.ids.device
        self.visible = self._initial_mask()
        self.next_position = None
        # Place of each slot's token in its beam's sequence, `[B, C]`; only relative position biases (T5) ask for it.
        self.slot_positions = torch.arange(self.capacity, device=self.device).repeat(self.examples, 1)
        self._unpruned = 0
        self._source_mask = self._additive_source_mask()
        self._source_groups = self._groups_by_source_length()

    # --- the two forward passes -------------------------------------------------------------------------------------

    def prefill(self) -> torch.Tensor:
        """Run the prompt, one row per example. Returns logits of its last position, `[B, V]`."""
        if self.source is not None:
            logits = self._prefill_decoder()
        else:
            logits = self._prefill_causal()
            heads = self.model.config.get_text_config(decoder=True).num_attention_heads
            self.groups = heads // self.tree.layers[0].keys.shape[1]
        self.tree.slot = self.tree.position = self.prompt_length
        if self.tree.clean:
            self.static = StaticStep(self)
        return logits

    def _prefill_causal(self) -> torch.Tensor:
        prompt = self.prompt
        positions = self._prompt_positions()
        self.next_position = positions[:, -1:] + 1
        arguments = {"input_ids": prompt.ids, "attention_mask": prompt.mask, "position_ids": positions}
        if _accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        return self.model(**arguments, **self._cache_arguments()).logits[:, -1]

    def _prefill_decoder(self) -> torch.Tensor:
        """The decoder's prompt, in groups of like source length, so that no keys of mere padding are computed."""
        prompt, logits = self.prompt, []
        for first, last, width in self._source_groups:
            self.tree.rows = self.source.rows = (first, last)
            self.cache.is_updated.clear()
            output = self.model(
                decoder_input_ids=prompt.ids[first:last],
                encoder_outputs=BaseModelOutput(last_hidden_state=prompt.encoder_states[first:last, :width]),
                attention_mask=None if prompt.mask is None else prompt.mask[first:last, :width],
                **self._cache_arguments(),
            )
            logits.append(output.logits[:, -1])
        self.tree.rows = self.source.rows = (0, self.examples)
        return torch.cat(logits)

    def _cache_arguments(self) -> dict:
        return {"past_key_values": self.cache, "use_cache": True, "return_dict": True}

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values held now."""
        return self.tree.nbytes() + (0 if self.source is None else self.source.nbytes())

    def step(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        """Append one token to every beam. Returns logits `[B, K, V]`, valid until the next step.

        Args: tokens: `[B, K]`. parents: `[B, K]`, the beam of the last step that each beam continues; None = itself.
        """
        if parents is not None:
            self._prune_if_due()
        if self.static is not None:
            logits = self.static(tokens, parents)
        else:
            logits = self.forward(tokens, self._advance_mask(parents), self.tree.slot + self.beams)
        if self.next_position is not None:
            self.next_position.add_(1)
        self.tree.slot += self.beams
        self.tree.position += 1
        return logits.view(self.examples, self.beams, -1)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, slots: int) -> torch.Tensor:
        """One pass over `tokens` `[B, K]`, which see what `mask` `[B, 1, G*K, slots]` says. Returns logits."""
        if self.source is None:
            positions = self.next_position.expand(-1, self.beams)
            arguments = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        else:
            arguments = {
                "decoder_input_ids": tokens.reshape(-1, 1),
                "encoder_outputs": BaseModelOutput(last_hidden_state=self.prompt.encoder_states),
                "attention_mask": self._source_mask,
                "decoder_attention_mask": mask,
                "slot_positions": self.slot_positions[:, :slots],
                "source_groups": self._source_groups if len(self._source_groups) > 1 else None,
            }
        return self.model(**arguments, **self._cache_arguments()).logits

    def keep(self, rows: torch.Tensor, holes: torch.Tensor, movers: torch.Tensor) -> None:
        """Go on with examples `rows` only: row `holes[i]` is overwritten by row `movers[i]`, then the tail is cut."""
        examples = rows.numel()
        self.tree.keep(holes, movers, examples)
        self.visible = self.visible.index_select(0, rows)
        self.slot_positions = self.slot_positions.index_select(0, rows)
        if self.source is not None:
            self.source.keep(holes, movers, examples)
            # Rows only ever move forward, to wider groups.
            self._source_groups = [(a, min(b, examples), width) for a, b, width in self._source_groups if a < examples]
            # Only its shape is read from now on: keys and values of the source are in the cache.
            self.prompt.encoder_states = self.prompt.encoder_states[:examples]
            if self._source_mask is not None:
                self._source_mask = self._source_mask.index_select(0, rows)
        else:
            self.next_position = self.next_position.index_select(0, rows)
        self.examples = examples
        if self.static is not None:
            self.static = StaticStep(self)

    # --- masks and positions ----------------------------------------------------------------------------------------

    def _initial_mask(self) -> torch.Tensor:
        """Additive mask `[B, K, C]`: 0 where a beam sees a slot, -inf elsewhere. The prompt is seen by all beams."""
        visible = torch.full((self.examples, self.beams, self.capacity), float("-inf"), device=self.device)
        seen = self.prompt.mask if self.source is None else None
        if seen is None:
            visible[:, :, : self.prompt_length] = 0.0
        else:
            visible[:, :, : self.prompt_length].masked_fill_((seen != 0)[:, None], 0.0)
        return visible

    def _advance_mask(self, parents: torch.Tensor | None) -> torch.Tensor:
        """Let each beam inherit its parent's ancestors and see its own new slot. Returns `[B, 1, G*K, used]`."""
        start, end = self.prompt_length, self.tree.slot
        if parents is not None and end > start:
            generated = self.visible[:, :, start:end]
            generated.copy_(generated.gather(1, parents[:, :, None].expand(-1, -1, end - start)))
        self.slot_positions[:, end : end + self.beams] = self.tree.position
        own = self.visible[:, :, end : end + self.beams]
        own.diagonal(dim1=1, dim2=2).zero_()
        return self.grouped(self.visible[:, None, :, : end + self.beams])

    def grouped(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask of `[B, 1, K, n]`, repeated for the G query heads of a key head: `[B, 1, G*K, n]`."""
        if self.groups == 1:
            return mask
        return mask[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(2, 3)

    def _prune_if_due(self) -> None:
        """Now and then, drop slots that no beam descends from: beams mostly part a few steps back."""
        self._unpruned += 1
        if self._unpruned < PRUNE_EVERY:
            return
        self._unpruned = 0
        start, end = self.prompt_length, self.tree.slot
        generated = self.visible[:, :, start:end]
        alive = (generated == 0).any(dim=1)
        count = int(alive.sum(dim=1).max())
        if count > WORTH_PRUNING * (end - start):
            return
        order = alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        self.tree.pick(start, order)
        kept = generated.gather(2, order[:, None].expand(-1, self.beams, -1))
        generated.fill_(float("-inf"))
        generated[:, :, :count] = kept
        self.slot_positions[:, start : start + count] = self.slot_positions[:, start:end].gather(1, order)
        if self.static is not None:
            self.static.moved()

    def _prompt_positions(self) -> torch.Tensor:
        """Positions `[B, P]` that count real tokens only, so that left padding changes nothing."""
        prompt = self.prompt
        if prompt.position_ids is not None:
            return prompt.position_ids.expand(self.examples, -1)
        if prompt.mask is None:
            return torch.arange(self.prompt_length, device=self.device).expand(self.examples, -1)
        positions = prompt.mask.long().cumsum(-1) - 1
        return positions.masked_fill(prompt.mask == 0, 0)

    def _additive_source_mask(self) -> torch.Tensor | None:
        """`[B, 1, 1, S]` with 0 / -inf for cross-attention after the prefill; None where nothing is padded."""
        mask = self.prompt.mask
        if self.prompt.encoder_states is None or mask is None or bool((mask != 0).all()):
            return None
        return torch.zeros(mask.shape, device=self.device).masked_fill_(mask == 0, float("-inf"))[:, None, None]

    def _groups_by_source_length(self) -> list[tuple[int, int, int]]:
        """Rows `a..b` whose sources are about equally long, and the longest of them: `[(a, b, width)]`.

        More than one only on a CPU, where calls cost little, and for rows sorted by falling length.
        """
        if self.source is None:
            return []
        lengths = [self.source.width] if self._source_mask is None else source_lengths(self.prompt.mask)
        starts = [0]
        if self.device.type == "cpu" and lengths == sorted(lengths, reverse=True):
            for row, length in enumerate(lengths):
                if length < SAME_LENGTH * lengths[starts[-1]]:
                    starts.append(row)
        ends = [*starts[1:], self.examples]
        return [
            (a, b, self.source.width if len(starts) == 1 else lengths[a]) for a, b in zip(starts, ends, strict=True)
        ]


def _accepts(model: torch.nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters
