"""Score processors of transformers, applied in place to one buffer.

transformers builds the list (which processors, in which order, with which parameters); this module swaps the common
ones for in-place equals that touch only the entries they change, and calls every other one as it is, in its turn.
Semantics read from transformers 5.23 `generation/logits_process.py`; results are equal bit for bit.

Shapes: B examples, K beams, N = B*K rows, P prompt tokens, T generated tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from transformers.generation import logits_process as hf

InPlace = Callable[[torch.Tensor, "History"], None]


class History:
    """What the rows hold so far: prompt `[B, P]` and generated tokens `[B, K, T]`.

    `scope` "all" shows processors the whole row, as transformers does; "output" only what was generated.
    """

    def __init__(self, prompt: torch.Tensor, beams: int, scope: str, padding: torch.Tensor | None, vocabulary: int):
        """Args: padding: `[B]` leading prompt tokens that the repetition penalty ignores, or None.
        vocabulary: V; prompt ids beyond it (an embedding larger than the head) cannot be generated."""
        self.prompt = prompt
        self.beams = beams
        self.scope = scope
        self.vocabulary = vocabulary
        self.penalised_prompt = _countable(prompt, padding, vocabulary)
        self.tokens = prompt.new_empty(prompt.shape[0], beams, 0)

    @property
    def length(self) -> int:
        """Tokens per row, prompt included: what length limits are counted in."""
        return self.prompt.shape[1] + self.tokens.shape[2]

    def rows(self) -> torch.Tensor:
        """Everything, `[N, P+T]`, as transformers' processors expect it."""
        return self._join(self.prompt)

    def scoped_rows(self) -> torch.Tensor:
        """`[N, P+T]`, or `[N, T]` under scope "output"."""
        return self._join(self.prompt if self.scope == "all" else None)

    def penalised_rows(self) -> torch.Tensor:
        """Ids to penalise, `[N, P+T]` or `[N, T]`, padding and impossible ids replaced by others of the same row."""
        return self._join(self.penalised_prompt if self.scope == "all" else None)

    def keep(self, rows: torch.Tensor) -> None:
        self.prompt = self.prompt.index_select(0, rows)
        if self.penalised_prompt is not None:
            self.penalised_prompt = self.penalised_prompt.index_select(0, rows)

    def _join(self, prompt: torch.Tensor | None) -> torch.Tensor:
        tokens = self.tokens.flatten(0, 1)
        if prompt is None:
            return tokens
        return torch.cat([prompt.repeat_interleave(self.beams, dim=0), tokens], dim=1)


def _countable(prompt: torch.Tensor, padding: torch.Tensor | None, vocabulary: int) -> torch.Tensor | None:
    """Prompt with uncounted ids replaced by the row's last id, which counts anyway; None if that cannot count."""
    if prompt.shape[1] == 0:
        return prompt
    last = prompt[:, -1:]
    if bool((last >= vocabulary).any()):
        return None
    uncounted = prompt >= vocabulary
    if padding is not None:
        uncounted |= torch.arange(prompt.shape[1], device=prompt.device) < padding[:, None].to(prompt.device)
    return torch.where(uncounted, last, prompt)


class Chain:
    """The processors of one `generate` call, in order, over a score buffer `[N, V]`."""

    def __init__(self, processors: Iterable, history: History):
        self.history = history
        self.steps = [_in_place(p, history) for p in processors]
        # A processor that we do not know may hold one state per row, so rows must stay where they are.
        self.rows_may_leave = all(known for _, known in self.steps)

    def __call__(self, scores: torch.Tensor, tokens: torch.Tensor) -> None:
        """Process `scores` `[N, V]` in place, given the generated `tokens` `[B, K, T]`."""
        self.history.tokens = tokens
        for step, _ in self.steps:
            step(scores, self.history)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all examples but `rows`."""
        self.history.keep(rows)


# --- in-place equals ------------------------------------------------------------------------------------------------


def _in_place(processor, history: History) -> tuple[InPlace, bool]:
    """The in-place equal of a processor and True, or a call of the processor itself and False."""
    build = _BUILDERS.get(type(processor))
    step = build(processor, history) if build is not None else None
    if step is not None:
        return step, True

    def call(scores: torch.Tensor, history: History) -> None:
        scores.copy_(processor(history.rows(), scores))

    return call, False


def _repetition_penalty(processor, history: History) -> InPlace | None:
    if history.scope == "all" and history.penalised_prompt is None:
        return None
    penalty = processor.penalty

    def step(scores: torch.Tensor, history: History) -> None:
        ids = history.penalised_rows()
        seen = scores.gather(1, ids)
        # Duplicates write the same value, so every seen token is penalised once.
        scores.scatter_(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    return step


def _no_repeat_ngram(processor, history: History) -> InPlace:
    size = processor.ngram_size

    def step(scores: torch.Tensor, history: History) -> None:
        ids = history.scoped_rows()
        length = ids.shape[1]
        if length < size:
            return
        suffix = ids[:, length + 1 - size :]
        windows = ids.unfold(1, size, 1)
        matches = (windows[..., :-1] == suffix[:, None]).all(dim=-1)
        last = windows[..., -1]
        matches &= last < history.vocabulary
        # Minimum, not assignment: a window that does not match must not undo the ban of one that does.
        bans = torch.where(matches, float("-inf"), float("inf")).to(scores.dtype)
        scores.scatter_reduce_(1, last.clamp(max=history.vocabulary - 1), bans, "amin")

    return step


def _sequence_bias(processor, history: History) -> InPlace | None:
    entries = processor.sequence_bias
    single = all(len(ids) == 1 and ids[0] < history.vocabulary for ids in entries)
    if not single:
        return None  # longer sequences need the rows; ids out of range need transformers' own error
    bias = torch.zeros(history.vocabulary, device=history.prompt.device)
    ids = torch.tensor([ids[0] for ids in entries], dtype=torch.long, device=bias.device)
    bias[ids] = torch.tensor(list(entries.values()), dtype=bias.dtype, device=bias.device)
    return lambda scores, _: scores.add_(bias)


def _min_length(processor, history: History) -> InPlace:
    return _ban_ends_until(processor.min_length, processor.eos_token_id, history)


def _min_new_tokens(processor, history: History) -> InPlace:
    return _ban_ends_until(processor.prompt_length_to_skip + processor.min_new_tokens, processor.eos_token_id, history)


def _ban_ends_until(length: int, end_ids: torch.Tensor, history: History) -> InPlace:
    ends = end_ids[(end_ids >= 0) & (end_ids < history.vocabulary)].to(history.prompt.device)

    def step(scores: torch.Tensor, history: History) -> None:
        if history.length < length:
            scores.index_fill_(1, ends, float("-inf"))

    return step


def _forced_bos(processor, history: History) -> InPlace:
    return _force_at(1, processor.bos_token_id)


def _forced_eos(processor, history: History) -> InPlace:
    return _force_at(processor.max_length - 1, processor.eos_token_id)


def _force_at(length: int, ids) -> InPlace:
    def step(scores: torch.Tensor, history: History) -> None:
        if history.length == length:
            scores.fill_(float("-inf"))
            scores[:, ids] = 0

    return step


def _suppress(processor, history: History) -> InPlace:
    banned = _membership(processor.suppress_tokens, history)
    return lambda scores, _: scores.masked_fill_(banned, float("-inf"))


def _suppress_at_begin(processor, history: History) -> InPlace:
    banned = _membership(processor.begin_suppress_tokens, history)

    def step(scores: torch.Tensor, history: History) -> None:
        if history.length == processor.begin_index:
            scores.masked_fill_(banned, float("-inf"))

    return step


def _membership(ids: torch.Tensor, history: History) -> torch.Tensor:
    device = history.prompt.device
    return torch.isin(torch.arange(history.vocabulary, device=device), ids.to(device))


_BUILDERS: dict[type, Callable] = {
    hf.RepetitionPenaltyLogitsProcessor: _repetition_penalty,
    hf.NoRepeatNGramLogitsProcessor: _no_repeat_ngram,
    hf.NoBadWordsLogitsProcessor: _sequence_bias,
    hf.SequenceBiasLogitsProcessor: _sequence_bias,
    hf.MinLengthLogitsProcessor: _min_length,
    hf.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    hf.ForcedBOSTokenLogitsProcessor: _forced_bos,
    hf.ForcedEOSTokenLogitsProcessor: _forced_eos,
    hf.SuppressTokensLogitsProcessor: _suppress,
    hf.SuppressTokensAtBeginLogitsProcessor: _suppress_at_begin,
}


class OutputOnly(hf.LogitsProcessor):
    """Shows another processor only the generated part of the rows: scope "output" for runs left to transformers."""

    def __init__(self, processor, prompt_length: int):
        self.processor = processor
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(input_ids[:, self.prompt_length :], scores)


class VocabularyMask(hf.LogitsProcessor):
    """Adds a 0 / -inf mask, `[V]` or one row per score row, for runs left to transformers."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.mask
