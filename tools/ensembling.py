"""Several models or checkpoints as one: consensus of texts, mean of weights, mean of token probabilities.

Each does what its name says:

- `choose_by_consensus`: minimum-Bayes-risk decoding with ROUGE as the gain (Kumar & Byrne, 2004). Of the candidates for
  a row it takes the one that agrees best with all of them; it writes no text of its own; models may differ in anything.
- `average_tensors`: one model whose weights are the weighted mean of others' (checkpoints of one run, model soups).
- `generate_together`: beam search in which every step's distribution is the weighted mean of the members'
  distributions; members share a vocabulary, not a shape. Each has its own cache, so it costs their times added up.

Shapes: B examples, K beams, S prompt or source tokens, V vocabulary, M members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from engine.generation import api, modelstate
from engine.generation.api import Hypothesis
from engine.generation.cache import ATTENTION_NAME
from engine.generation.decoder import Prompt, TreeDecoder
from engine.generation.encoder import encode
from engine.generation.search import Decoded, Search, unsupported, unverified
from engine.generation.settings import GenerationSettings
from engine.scoring import rouge


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights of `count` members that sum to 1; equal ones where none are given.

    Raises ValueError for a wrong number of weights, a negative or non-finite one, or all zeros.
    """
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} members")
    if any(not math.isfinite(w) or w < 0 for w in weights) or not sum(weights):
        raise ValueError(f"weights must be positive numbers, not {list(weights)}")
    return [w / sum(weights) for w in weights]


# --- consensus of texts ---------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The chosen candidate: its place in the row, its text, and its expected ROUGE (0..100) under the candidates."""

    index: int
    text: str
    expected: float


def choose_by_consensus(
    candidates: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    metric: str = "rouge_mean",
    tokenizer: str = "mecab",
) -> Choice:
    """Minimum-Bayes-risk choice among one row's candidates.

    Candidate i is expected to score sum_j w_j * ROUGE(i, j), as if each candidate j were the reference with probability
    w_j. With equal weights that order is the one by mean ROUGE against the other candidates; equal texts count as
    votes. A tie goes to the greater weight, then to the earlier candidate.
    """
    if not candidates:
        raise ValueError("no candidates to choose from")
    shares = normalised(weights, len(candidates))
    best: tuple[float, float, int] | None = None
    for i, text in enumerate(candidates):
        gains = (rouge.similarity(text, other, metric, tokenizer) for other in candidates)
        expected = math.fsum(share * gain for share, gain in zip(shares, gains, strict=True))
        key = (round(expected, 9), shares[i], -i)  # rounded: sums in another order must not break a tie
        best = key if best is None else max(best, key)
    expected, _, place = best
    return Choice(-place, candidates[-place], expected)


# --- mean of weights ------------------------------------------------------------------------------------------------


def average_tensors(tensors: Sequence[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """Weighted mean in float32 (float64 for float64), in the type of the first; whole numbers must be equal in all.

    Raises ValueError where shapes differ, or where whole numbers (counters, index tables) do.
    """
    shares = normalised(weights, len(tensors))
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        raise ValueError(f"shapes differ: {sorted({tuple(tensor.shape) for tensor in tensors})}")
    if not first.is_floating_point():
        if any(not torch.equal(tensor, first) for tensor in tensors):
            raise ValueError(f"{first.dtype} values differ and have no mean")
        return first.clone()
    exact = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = torch.zeros(first.shape, dtype=exact)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(exact), alpha=share)
    return total.to(first.dtype)


def average_state_dicts(
    states: Sequence[dict[str, torch.Tensor]], weights: Sequence[float] | None = None
) -> dict[str, torch.Tensor]:
    """`average_tensors` under every name. Raises ValueError where names differ, or with the name of a bad tensor."""
    check_names([list(state) for state in states])
    means = {}
    for name in states[0]:
        try:
            means[name] = average_tensors([state[name] for state in states], weights)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return means


def check_names(names: Sequence[Sequence[str]]) -> None:
    """All members hold the same tensors. Raises ValueError naming one that they do not share."""
    if not names:
        raise ValueError("nothing to average")
    for other in names[1:]:
        if odd := set(names[0]) ^ set(other):
            raise ValueError(
                f"not the same model: {len(odd)} tensors are in one and not in another, such as {min(odd)}"
            )


# --- mean of token probabilities ------------------------------------------------------------------------------------


def generate_together(
    models: Sequence[torch.nn.Module],
    prompts: Sequence[Sequence[Sequence[int]]],
    settings: GenerationSettings,
    *,
    pad_token_id: int,
    weights: Sequence[float] | None = None,
    tokens_per_batch: int = 16384,
    max_batch_size: int | None = None,
    vocabulary_mask: torch.Tensor | None = None,
    on_batch: Callable[[list[int], list[list[Hypothesis]]], None] | None = None,
) -> list[list[Hypothesis]]:
    """Decode rows with all models at once; results in input order, R per row, best first.

    Args:
        models: all encoder-decoders or all causal, over one vocabulary. The first one's generation config counts.
        prompts: for each model its own token ids of every row (prompts may differ between models).
        weights: of the models' probabilities; equal where None.
        vocabulary_mask: 0 / -inf, `[V]`, or one row per prompt.

    Raises: ValueError: vocabularies of different sizes, a model that our search does not run, prompts that do not pair.
    """
    shares = normalised(weights, len(models))
    if len(prompts) != len(models) or len({len(rows) for rows in prompts}) != 1:
        raise ValueError("every model needs its own prompt for every row")
    results: list[list[Hypothesis]] = [[] for _ in prompts[0]]
    with ExitStack() as stack:
        if vocabulary_mask is not None:
            vocabulary_mask = vocabulary_mask.to(modelstate.unwrap(models[0]).device)
        steps = (settings.max_new_tokens or settings.max_length) * len(results)
        bases = [stack.enter_context(api.prepared(model, steps)) for model in models]
        _refuse_strangers(bases)
        seq2seq = bases[0].config.is_encoder_decoder
        lengths = [max(len(rows[i]) for rows in prompts) for i in range(len(prompts[0]))]
        for batch in api.plan_batches(lengths, settings, tokens_per_batch, max_batch_size, True, seq2seq):
            inputs = [
                api.pad([rows[i] for i in batch], pad_token_id, left=not seq2seq, device=base.device)
                for base, rows in zip(bases, prompts, strict=True)
            ]
            mask = api.mask_of(vocabulary_mask, batch)
            search = _TogetherSearch(settings.repetition_scope, mask, bases, inputs, shares)
            generated = api.run_search(bases[0], *inputs[0], settings, search)
            hypotheses = api.as_hypotheses(generated, settings.num_return_sequences)
            for i, found in zip(batch, hypotheses, strict=True):
                results[i] = found
            if on_batch is not None:
                on_batch(batch, hypotheses)
    return results


def _refuse_strangers(bases: Sequence[torch.nn.Module]) -> None:
    kinds = {bool(base.config.is_encoder_decoder) for base in bases}
    sizes = {base.get_output_embeddings().weight.shape[0] for base in bases}
    if len(kinds) > 1:
        raise ValueError("encoder-decoders and causal models cannot be decoded together")
    for reason in filter(None, map(unverified, bases)):
        raise ValueError(f"decoding together does not support: {reason}")
    if len(sizes) > 1:
        raise ValueError(f"the models' vocabularies differ: {sorted(sizes)} tokens")


class _TogetherSearch(Search):
    """Our search, with a decoder that asks every member."""

    def __init__(self, scope, vocabulary_mask, bases, inputs, shares):
        """Args: inputs: for each member its token ids and mask, `[B, S]` each. shares: M weights that sum to 1."""
        super().__init__(scope, vocabulary_mask)
        self.bases, self.inputs, self.shares = bases, inputs, shares

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        for base in self.bases:
            reason = unsupported(base, generation_config, logits_processor, stopping_criteria, model_kwargs)
            if reason is not None:
                raise ValueError(f"decoding together does not support: {reason}")
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        new_tokens = generation_config.max_length - input_ids.shape[1]
        start = input_ids[::copies]
        prompts = [self._prompt(i, start, model_kwargs, copies) for i in range(len(self.bases))]
        decoder = TogetherDecoder(
            [TreeDecoder(b, p, copies, new_tokens) for b, p in zip(self.bases, prompts, strict=True)], self.shares
        )
        logits = decoder.prefill()
        chain = self._chain(logits_processor, start, copies, logits.shape[-1])
        with ExitStack() as stack:
            for base in self.bases:
                stack.enter_context(modelstate.attention(base, ATTENTION_NAME))
            loop = self._beam_search if (generation_config.num_beams or 1) > 1 else self._sample
            decoded: Decoded = loop(decoder, logits, chain, generation_config)
        decoded.cache_bytes = sum(member.tree.nbytes() for member in decoder.members)
        return decoded

    def _prompt(self, member: int, start: torch.Tensor, model_kwargs: dict, copies: int) -> Prompt:
        base, (ids, mask) = self.bases[member], self.inputs[member]
        if not base.config.is_encoder_decoder:
            return Prompt(ids, mask)
        if member == 0:  # went through `generate`, which copies it for every beam
            states = model_kwargs["encoder_outputs"][0][::copies]
        else:
            states = encode(base, ids, mask)
        return Prompt(start.to(ids.device), mask, None, states)


class TogetherDecoder:
    """Stands in for one `TreeDecoder`: same calls, and log of the members' weighted mean probability for logits."""

    def __init__(self, members: Sequence[TreeDecoder], shares: Sequence[float]):
        self.members = members
        self.log_shares = [math.log(share) if share else -math.inf for share in shares]

    @property
    def prompt(self) -> Prompt:
        return self.members[0].prompt

    @property
    def beams(self) -> int:
        return self.members[0].beams

    def prefill(self) -> torch.Tensor:
        """Log-probabilities after the prompt, `[B, V]`."""
        return self._mean([member.prefill() for member in self.members])

    def step(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        """Log-probabilities after one more token for every beam, `[B, K, V]`."""
        steps = []
        for member in self.members:
            moved = None if parents is None else parents.to(member.device)
            steps.append(member.step(tokens.to(member.device), moved))
        return self._mean(steps)

    def keep(self, rows: torch.Tensor, holes: torch.Tensor, movers: torch.Tensor) -> None:
        """Go on with examples `rows` only, in every member."""
        for member in self.members:
            member.keep(*(index.to(member.device) for index in (rows, holes, movers)))

    def _mean(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """log sum_m w_m softmax(logits_m), in float32 and without leaving the log scale."""
        device = logits[0].device
        total: torch.Tensor | None = None
        for member, log_share in zip(logits, self.log_shares, strict=True):
            if log_share == -math.inf:
                continue
            scores = torch.log_softmax(member.to(device, torch.float32), dim=-1).add_(log_share)
            total = scores if total is None else torch.logaddexp(total, scores)
        return total
