"""The decoding loops, run inside `model.generate` as its `custom_generate` callable.

transformers keeps everything a user can configure: merging settings, defaults, warnings and errors, the encoder pass,
and the lists of processors and stopping criteria. It then calls `Search`, which decodes with one cache row per example,
or raises `HandedBack` where `unsupported` names a reason (`fallback.decode` then lets transformers do all of it).

Shapes: B examples, K beams, R returned sequences per example, P prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.generation import logits_process as hf
from transformers.generation import stopping_criteria as criteria
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from engine import families
from engine.generation.beams import BeamRules, Beams
from engine.generation.cache import ATTENTION_NAME
from engine.generation.decoder import Prompt, TreeDecoder
from engine.generation.graphs import worth_capturing
from engine.generation.modelstate import attention
from engine.generation.processors import Chain, History

logger = logging.getLogger(__name__)

# Rotary positions whose frequencies never change, and those that change once a sequence outgrows the original length.
_STEADY_POSITIONS = {"default", "linear", "llama3", "yarn"}
_GROWING_POSITIONS = {"dynamic", "longrope"}
_HANDLED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH)
_DECIDING = ("forward", "prepare_inputs_for_generation")  # methods that decide what a checked class computes
_KNOWN_MODEL_KWARGS = {
    "attention_mask",
    "encoder_outputs",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}
_ROWWISE_ONLY = (
    hf.PrefixConstrainedLogitsProcessor,
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.WatermarkLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
)


class HandedBack(Exception):
    """This call is for transformers to decode; the text says why."""


@dataclass
class Decoded:
    """Result in transformers' layout.

    sequences `[B*R, P+L]` with prompt and fill values; sequences_scores `[B*R]` or None; beam_indices `[B*R, L]` int32,
    -1 past the end, or None; prompt_length P; native False where transformers' own loop ran.
    """

    sequences: torch.Tensor
    sequences_scores: torch.Tensor | None
    beam_indices: torch.Tensor | None
    prompt_length: int
    native: bool = True
    cache_bytes: int = 0


class Search:
    """One call's decoding loop; hand it to `model.generate(..., custom_generate=Search(...))`."""

    def __init__(
        self,
        scope: str = "all",
        vocabulary_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        compaction: bool = True,
        cuda_graphs: bool = False,
    ):
        """Args: scope: "all" or "output", what repetition rules look at. vocabulary_mask: `[V]` or `[B, V]`.
        generator: source of sampling draws; None = torch's global one. compaction: let finished examples leave.
        cuda_graphs: replay captured steps where `worth_capturing` says so."""
        self.scope = scope
        self.vocabulary_mask = vocabulary_mask
        self.generator = generator
        self.compaction = compaction
        self.cuda_graphs = cuda_graphs
        # Of all live examples, how many must be settled for them to leave: new shapes may mean new captures.
        self.least_share = 0.0

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
    ) -> Decoded:
        reason = unsupported(model, generation_config, logits_processor, stopping_criteria, model_kwargs)
        if reason is not None:
            raise HandedBack(reason)
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        prompt = _prompt(model, input_ids, model_kwargs, copies)
        new_tokens = generation_config.max_length - input_ids.shape[1]
        fixed = self.cuda_graphs and worth_capturing(model, input_ids.device, new_tokens)
        self.least_share = 0.5 if fixed else 0.0
        decoder = TreeDecoder(model, prompt, copies, new_tokens, fixed)
        logits = decoder.prefill()
        held = decoder.cache_bytes  # at its peak: examples only leave
        chain = self._chain(logits_processor, prompt.ids, copies, logits.shape[-1])
        with attention(model, ATTENTION_NAME):
            if (generation_config.num_beams or 1) > 1:
                decoded = self._beam_search(decoder, logits, chain, generation_config)
            else:
                decoded = self._sample(decoder, logits, chain, generation_config)
        decoded.cache_bytes = held
        return decoded

    # --- beams ------------------------------------------------------------------------------------------------------

    def _beam_search(self, decoder: TreeDecoder, logits: torch.Tensor, chain: Chain, config) -> Decoded:
        prompt = decoder.prompt.ids
        end_ids = config._eos_token_tensor
        rules = BeamRules(
            beams=config.num_beams,
            max_new=config.max_length - prompt.shape[1],
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            end_ids=end_ids,
        )
        beams = Beams(prompt.shape[0], rules, prompt.device, self._mask(logits.shape[-1]))
        logits = logits[:, None].expand(-1, rules.beams, -1)
        buffer = None
        while True:
            buffer = _log_softmax(logits, buffer)
            scores = buffer[: logits.shape[0]]
            chain(scores.flatten(0, 1), beams.tokens)
            scores.add_(beams.running[:, :, None])
            tokens, parents = beams.advance(scores.flatten(1))
            over, settled = beams.status()
            if over:
                break
            if chain.rows_may_leave and self._enough(settled):
                rows, holes, movers = _leave(settled, prompt.device)
                beams.keep(rows)
                chain.keep(rows)
                decoder.keep(rows, holes, movers)
                tokens, parents = tokens.index_select(0, rows), parents.index_select(0, rows)
            logits = decoder.step(tokens, parents)
        return _beam_output(beams, prompt, config, rules)

    # --- greedy and sampling ----------------------------------------------------------------------------------------

    def _sample(self, decoder: TreeDecoder, logits: torch.Tensor, chain: Chain, config) -> Decoded:
        """Rows `[B, R]` that never change places. Finished rows of samples stay, so that draws equal `generate`'s."""
        prompt = decoder.prompt.ids
        examples, rows = prompt.shape[0], decoder.beams
        ends, pad = config._eos_token_tensor, config._pad_token_tensor
        fill = 0 if pad is None else pad
        limit, mask = config.max_length - prompt.shape[1], self._mask(logits.shape[-1])
        output = torch.full((examples, rows, limit), -1, dtype=torch.long, device=prompt.device)
        output[:] = fill
        live = torch.arange(examples, device=prompt.device)
        open_rows = torch.ones(examples, rows, dtype=torch.bool, device=prompt.device)
        logits = logits[:, None].expand(-1, rows, -1)
        for step in range(limit):
            scores = logits.to(torch.float32, copy=True).flatten(0, 1)
            chain(scores, output[live, :, :step])
            if mask is not None:
                scores.view(logits.shape).add_(mask if mask.dim() == 1 else mask[live][:, None])
            tokens = self._choose(scores, config.do_sample).view(-1, rows)
            if ends is not None:
                tokens = torch.where(open_rows, tokens, fill)
            output[live, :, step] = tokens
            if ends is not None:
                open_rows = open_rows & ~torch.isin(tokens, ends)
            closed = (~open_rows).all(dim=1).tolist()
            if all(closed) or step + 1 == limit:
                break
            if chain.rows_may_leave and not config.do_sample and self._enough(closed):
                keep, holes, movers = _leave(closed, prompt.device)
                live, open_rows, tokens = (t.index_select(0, keep) for t in (live, open_rows, tokens))
                chain.keep(keep)
                decoder.keep(keep, holes, movers)
            logits = decoder.step(tokens, None)
        sequences = output[:, :, : step + 1].flatten(0, 1)
        return Decoded(_with_prompt(prompt, sequences, rows), None, None, prompt.shape[1])

    def _choose(self, scores: torch.Tensor, sample: bool) -> torch.Tensor:
        """Next token of each row, `[N]`."""
        if not sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=self.generator).squeeze(1)

    # --- shared -----------------------------------------------------------------------------------------------------

    def _enough(self, settled: list[bool]) -> bool:
        """Whether the settled examples should leave the batch now."""
        return self.compaction and any(settled) and sum(settled) >= self.least_share * len(settled)

    def _mask(self, vocabulary: int) -> torch.Tensor | None:
        mask = self.vocabulary_mask
        if mask is not None and mask.shape[-1] != vocabulary:
            raise ValueError(f"the vocabulary mask has {mask.shape[-1]} entries, the model scores {vocabulary} tokens")
        return mask

    def _chain(self, processors, prompt: torch.Tensor, copies: int, vocabulary: int) -> Chain:
        padding = None
        for processor in processors:
            ignored = getattr(processor, "prompt_ignore_length", None)
            if isinstance(ignored, torch.Tensor):
                padding = ignored[::copies]
        history = History(prompt, copies, self.scope, padding, vocabulary)
        return Chain(processors, history)


def unsupported(model, config, processors, stopping, model_kwargs: dict[str, Any]) -> str | None:
    """Why a call must be left to transformers, or None. This and `unverified` are the whole list."""
    reason = unverified(model)
    if reason is not None:
        return reason
    mode = config.get_generation_mode()
    if mode not in _HANDLED_MODES:
        return f"mode {mode.value}"
    steady = _steady_length(model)
    if steady is not None and config.max_length >= steady:
        return f"positions of {model.config.model_type} change with the length beyond {steady} tokens"
    if not config.use_cache:
        return "use_cache=False"
    if config.output_attentions or config.output_hidden_states or config.output_logits:
        return "attentions, hidden states or logits of every step are asked for"
    if getattr(config, "prefill_chunk_size", None) or config.token_healing or config.low_memory or config.is_assistant:
        return "chunked prefill, token healing, low_memory or assistant mode"
    extra = {name for name, value in model_kwargs.items() if value is not None} - _KNOWN_MODEL_KWARGS
    if extra:
        return f"model inputs {sorted(extra)}"
    if not _plain_cache(model_kwargs.get("past_key_values")):
        return "a cache that is not empty and plain (given by the caller, static, quantised, sliding window)"
    if any(type(c) not in (criteria.MaxLengthCriteria, criteria.EosTokenCriteria) for c in stopping):
        return "stopping criteria other than length and end tokens"
    if any(isinstance(p, _ROWWISE_ONLY) for p in processors):
        return "guidance, prefix function or watermark"
    return None


def unverified(model) -> str | None:
    """Why no call of this model is ours: its class or its scheme of positions was never checked. None if it was."""
    kind = model.config.model_type
    row, encoder_decoder = families.of(kind), model.config.is_encoder_decoder
    classes = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    if not row.verified or (row.kind == "seq2seq") != encoder_decoder or type(model.config) not in classes:
        return f"model type {kind} was never checked"
    checked = classes[type(model.config)]
    if not isinstance(model, checked) or any(getattr(type(model), n) is not getattr(checked, n) for n in _DECIDING):
        return f"{type(model).__name__} is not the class of {kind} that was checked"
    if not _tells_attentions_apart(model):
        return f"this transformers does not mark the self-attention of {kind}"
    if unknown := _position_schemes(model) - _STEADY_POSITIONS - _GROWING_POSITIONS:
        return f"rotary positions of type {sorted(unknown)[0]} were never checked"
    return None


def _position_schemes(model) -> set[str]:
    """Types of rotary positions in a model, as its layers will compute them."""
    schemes: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        schemes |= set(kind.values()) if isinstance(kind, dict) else {kind}
    return schemes - {None}


def _steady_length(model) -> int | None:
    """Tokens below which positions that grow with the length are as the model was built; None if they never grow.

    From there on `generate` recomputes its cache (longrope), or the longest row of a batch counts for all (dynamic).
    """
    if not _position_schemes(model) & _GROWING_POSITIONS:
        return None
    config = model.config.get_text_config(decoder=True)
    lengths = [config.max_position_embeddings, getattr(config, "original_max_position_embeddings", None)]
    lengths.append((config.rope_parameters or {}).get("original_max_position_embeddings"))
    return min(length for length in lengths if length)


def _tells_attentions_apart(model) -> bool:
    """Whether a decoder's self-attention can be told from its cross-attention: before 5.23 UMT5's could not."""
    if not model.config.is_encoder_decoder:
        return True
    return any(getattr(module, "is_causal", False) for module in model.get_decoder().modules())


def _plain_cache(cache) -> bool:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None or getattr(cache, "offloading", False) or cache.get_seq_length() > 0:
        return False
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _prompt(model, input_ids: torch.Tensor, model_kwargs: dict[str, Any], copies: int) -> Prompt:
    """One row per example out of rows that `generate` has already copied for every beam."""

    def first(tensor):
        return None if tensor is None else tensor[::copies]

    states = model_kwargs["encoder_outputs"][0] if model.config.is_encoder_decoder else None
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.shape[0] == input_ids.shape[0]:
        positions = first(positions)
    return Prompt(first(input_ids), first(model_kwargs.get("attention_mask")), positions, first(states))


def _log_softmax(logits: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """float32 log-probabilities `[B, K, V]`, in the first B rows of a buffer that lives as long as the call."""
    logits = logits.to(torch.float32)
    if buffer is None:
        buffer = torch.empty(logits.shape, device=logits.device)
    torch.log_softmax(logits, dim=-1, out=buffer[: logits.shape[0]])
    return buffer


def _leave(gone: list[bool], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New order of the examples that stay: those at the end fill the gaps. Returns rows, gaps and what fills them.

    `rows[i]` is the old place of new example i; it differs from i only where i is a gap.
    """
    staying = [i for i, left in enumerate(gone) if not left]
    count = len(staying)
    movers = [i for i in staying if i >= count]
    rows = list(range(count))
    holes = [i for i in range(count) if gone[i]]
    for hole, mover in zip(holes, movers, strict=True):
        rows[hole] = mover
    return tuple(torch.tensor(x, dtype=torch.long, device=device) for x in (rows, holes, movers))


def _beam_output(beams: Beams, prompt: torch.Tensor, config, rules: BeamRules) -> Decoded:
    """Lay hypotheses out as transformers does, fill value and batch-wide parent numbers included."""
    count = config.num_return_sequences
    tokens, parents, scores = beams.results(count)
    ends, pad = config._eos_token_tensor, config._pad_token_tensor
    # transformers takes the pad id only if it is true: id 0 gives way to the end token.
    fill = -1 if ends is None else int(pad or ends[0])
    written = parents >= 0
    width = int(written.sum(dim=-1).max())
    sequences = torch.where(written, tokens, fill)[:, :, :width].flatten(0, 1)
    offset = torch.arange(prompt.shape[0], device=prompt.device)[:, None, None] * rules.beams
    indices = torch.where(written, parents + offset, -1)[:, :, :width].flatten(0, 1).to(torch.int32)
    scores = scores.flatten() if config.output_scores else None
    return Decoded(_with_prompt(prompt, sequences, count), scores, indices, prompt.shape[1])


def _with_prompt(prompt: torch.Tensor, sequences: torch.Tensor, copies: int) -> torch.Tensor:
    return torch.cat([prompt.repeat_interleave(copies, dim=0), sequences], dim=1)
