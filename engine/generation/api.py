"""`generate` for one batch of tensors, `generate_all` for prompts of any lengths, `generate_batch` for a planned batch.

Where our own search runs, an example alone and in any batch has the same result in exact arithmetic. In float32, sums are
rounded differently in other company, so where two hypotheses tie to the last digits the other one may win. A
model that writes its own padding token is another matter: transformers' n-gram rule counts padding. What is handed
back to transformers (see `fallback`) keeps what `generate` promises, which for some positions depends on the batch.

Shapes: B examples, S prompt or source tokens, K beams, R returned sequences per example, T most new tokens,
L new tokens of the longest result, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine.generation import modelstate
from engine.generation.fallback import decode
from engine.generation.linears import fast_linears
from engine.generation.search import Decoded, Search, unverified
from engine.generation.settings import GenerationSettings


@dataclass(frozen=True)
class Generated:
    """New tokens of one batch; example b's results are rows `b*R .. b*R+R-1`, best first.

    sequences `[B*R, L]`: without prompt or decoder start, with the end token, padded after it. scores `[B*R]`: length-
    normalised log-probability, or None without beams. lengths `[B*R]`: new tokens, the end token included.
    ended `[B*R]` bool: closed by an end token that the model chose, not by the length limit.
    """

    sequences: torch.Tensor
    scores: torch.Tensor | None
    lengths: torch.Tensor
    ended: torch.Tensor


@dataclass(frozen=True)
class Hypothesis:
    """One result: token ids as generated (special tokens included, padding not), its score, and whether it ended."""

    token_ids: list[int]
    score: float | None
    ended: bool


def generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: GenerationSettings,
    *,
    vocabulary_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Decode one batch.

    Args:
        model: a transformers model with a language-modelling head; PEFT and DDP wrappers are looked through.
        input_ids: `[B, S]`, left-padded for causal models, right-padded for encoder-decoders; on the model's device.
        attention_mask: `[B, S]`, 1 for real tokens.
        vocabulary_mask: 0 / -inf, `[V]` or `[B, V]`, added to every step's scores.
        generator: source of sampling draws. None = a copy of torch's global generator of that device, which itself
            stays untouched: the same global state gives the same samples again (and `generate`'s own).
    Raises: ValueError: from transformers, for settings that do not fit this batch (prompt longer than max_length).
    """
    with prepared(model, settings.max_new_tokens or settings.max_length) as base:
        search = _search(settings, input_ids.device, vocabulary_mask, generator)
        return run_search(base, input_ids, attention_mask, settings, search)


def generate_all(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    pad_token_id: int,
    tokens_per_batch: int = 16384,
    max_batch_size: int | None = None,
    sort_by_length: bool = True,
    vocabulary_mask: torch.Tensor | None = None,
    on_batch: Callable[[list[int], list[list[Hypothesis]]], None] | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
) -> list[list[Hypothesis]]:
    """Decode prompts of any lengths, longest first, in batches under a token budget. Results are in input order.

    Args:
        prompts: token ids, at least one each (source of an encoder-decoder, or a causal model's prompt).
        pad_token_id: fills batches, left for causal models and right for encoder-decoders.
        tokens_per_batch: budget for B * (S + K*T), what the caches of a batch hold.
        max_batch_size: most prompts per batch; None = no limit but the budget.
        sort_by_length: False keeps the given order (less padding is worth much more on a CPU).
        vocabulary_mask: `[V]`, or `[len(prompts), V]`, one row per prompt.
        on_batch: called after each batch with the prompts' indices and their results.
        generator: as in `generate`; one source for the whole call.
        tokenizer: `stop_strings` needs it, and nothing else.
    Returns: per prompt, its R results, best first.
    """
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompt {empty[0]} is empty")
    results: list[list[Hypothesis]] = [[] for _ in prompts]
    with prepared(model, (settings.max_new_tokens or settings.max_length) * len(prompts)) as base:
        if settings.do_sample and generator is None:
            generator = _copy_of_global(base.device)
        lengths, encoder_decoder = [len(prompt) for prompt in prompts], base.config.is_encoder_decoder
        for batch in plan_batches(lengths, settings, tokens_per_batch, max_batch_size, sort_by_length, encoder_decoder):
            hypotheses = generate_batch(
                base,
                [prompts[i] for i in batch],
                settings,
                pad_token_id=pad_token_id,
                vocabulary_mask=mask_of(vocabulary_mask, batch),
                generator=generator,
                tokenizer=tokenizer,
            )
            for i, found in zip(batch, hypotheses, strict=True):
                results[i] = found
            if on_batch is not None:
                on_batch(batch, hypotheses)
    return results


def generate_batch(
    base: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    pad_token_id: int,
    vocabulary_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
) -> list[list[Hypothesis]]:
    """Decode these prompts together, however long they are: one of the batches that a caller has planned.

    Args:
        base: what `prepared` yields.
        vocabulary_mask: `[V]`, or `[len(prompts), V]`.
    Returns: per prompt, its R results, best first.
    """
    ids, mask = pad(prompts, pad_token_id, left=not base.config.is_encoder_decoder, device=base.device)
    search = _search(settings, base.device, vocabulary_mask, generator)
    generated = run_search(base, ids, mask, settings, search, tokenizer)
    return as_hypotheses(generated, settings.num_return_sequences)


def plan_batches(
    lengths: Sequence[int],
    settings: GenerationSettings,
    tokens_per_batch: int,
    max_batch_size: int | None,
    sort_by_length: bool,
    encoder_decoder: bool,
) -> Iterator[list[int]]:
    """Split prompts into batches of indices with B * (S + K*T) <= tokens_per_batch (or one prompt alone).

    Where a causal model's limit is max_length, which counts the prompt, prompts of different lengths never share a
    batch: padding would shorten the output of the shorter one.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)) if sort_by_length else range(len(lengths))
    copies = max(settings.num_beams, settings.num_return_sequences)
    same_length_only = settings.max_new_tokens is None and not encoder_decoder
    batch: list[int] = []
    width = 0
    for i in order:
        wider = max(width, lengths[i])
        new_tokens = settings.new_token_limit(1 if encoder_decoder else wider)
        cost = (len(batch) + 1) * (wider + copies * max(new_tokens, 0))
        full = cost > tokens_per_batch or len(batch) == max_batch_size
        if batch and (full or (same_length_only and lengths[i] != width)):
            yield batch
            batch, wider = [], lengths[i]
        batch.append(i)
        width = wider
    if batch:
        yield batch


def pad(
    prompts: Sequence[Sequence[int]], pad_token_id: int, *, left: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[B, S]`, padded on one side."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place] = torch.as_tensor(prompt, dtype=torch.long)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


# --- one batch ------------------------------------------------------------------------------------------------------


@contextmanager
def prepared(model: torch.nn.Module, steps: int) -> Iterator[torch.nn.Module]:
    """The model inside its wrappers, ready to decode batches; everything is put back on the way out. steps: at most."""
    base = modelstate.unwrap(model)
    modelstate.keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(modelstate.exclusive(base))
        stack.enter_context(torch.no_grad())
        stack.enter_context(modelstate.evaluation_mode(base))
        if unverified(base) is None:  # what is handed back runs as it is
            stack.enter_context(fast_linears(base, steps))
        yield base


def mask_of(vocabulary_mask: torch.Tensor | None, batch: Sequence[int]) -> torch.Tensor | None:
    """The part of a vocabulary mask `[V]` or `[prompts, V]` that belongs to a batch of prompts."""
    if vocabulary_mask is None or vocabulary_mask.dim() == 1:
        return vocabulary_mask
    return vocabulary_mask[torch.tensor(batch, device=vocabulary_mask.device)]


def _search(settings, device: torch.device, vocabulary_mask, generator) -> Search:
    if vocabulary_mask is not None:
        vocabulary_mask = vocabulary_mask.to(device)
    if settings.do_sample and generator is None:
        generator = _copy_of_global(device)
    return Search(settings.repetition_scope, vocabulary_mask, generator, cuda_graphs=settings.cuda_graphs)


def run_search(
    base: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: GenerationSettings,
    search: Search,
    tokenizer: Any = None,
) -> Generated:
    """Decode one batch with a given search, on a model that is prepared already (see `prepared`)."""
    prompt_length = 1 if base.config.is_encoder_decoder else input_ids.shape[1]
    arguments = settings.generate_arguments(prompt_length)
    if arguments.get("stop_strings") and tokenizer is None:
        raise ValueError("generation.stop_strings needs the tokenizer")
    arguments |= {"input_ids": input_ids, "attention_mask": attention_mask, "output_scores": settings.output_scores}
    decoded = decode(base, arguments, search, tokenizer)
    return _measure(decoded, base, settings, arguments["max_length"] - prompt_length)


def _measure(decoded: Decoded, base, settings: GenerationSettings, limit: int) -> Generated:
    """Cut the prompt off, and find each row's length and reason to end."""
    sequences = decoded.sequences[:, decoded.prompt_length :]
    rows, width = sequences.shape
    ends = _as_tensor(settings.eos_token_id, base.generation_config.eos_token_id, sequences.device)
    is_end = torch.isin(sequences, ends)
    if decoded.beam_indices is not None:
        lengths = (decoded.beam_indices >= 0).sum(dim=-1)
    else:
        places = torch.arange(1, width + 1, device=sequences.device).expand(rows, -1)
        lengths = torch.where(is_end, places, width).amin(dim=-1) if width else torch.zeros(rows, dtype=torch.long)
    closing = sequences.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] if width else lengths
    ended = torch.isin(closing, ends) & (lengths > 0)
    forced = (
        base.generation_config.forced_eos_token_id
        if settings.forced_eos_token_id is None
        else settings.forced_eos_token_id
    )
    if forced is not None:
        ended &= (lengths < limit) | ~torch.isin(closing, _as_tensor(forced, None, sequences.device))
    return Generated(sequences, decoded.sequences_scores, lengths, ended)


def _as_tensor(token_ids, default, device: torch.device) -> torch.Tensor:
    token_ids = default if token_ids is None else token_ids
    token_ids = [] if token_ids is None else token_ids
    return torch.tensor(token_ids, dtype=torch.long, device=device).reshape(-1)


def as_hypotheses(generated: Generated, count: int) -> list[list[Hypothesis]]:
    """Rows as Python values, `count` per example."""
    lengths, ended = generated.lengths.tolist(), generated.ended.tolist()
    scores = [None] * len(lengths) if generated.scores is None else generated.scores.tolist()
    rows = [
        Hypothesis(ids[:length], score, end)
        for ids, length, score, end in zip(generated.sequences.tolist(), lengths, scores, ended, strict=True)
    ]
    return [rows[i : i + count] for i in range(0, len(rows), count)]


def _copy_of_global(device: torch.device) -> torch.Generator:
    """A generator that draws what torch's global one would draw next, without moving it."""
    generator = torch.Generator(device=device)
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    generator.set_state(state)
    return generator
