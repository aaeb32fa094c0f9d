"""Beam search over an example's K beams, with the arithmetic of transformers 5.23 `_beam_search` to the last bit.

Scores stay comparable only if nothing is simplified: unusable candidates are pushed down by *adding* -1e9 (not by
masking), the same three `topk` calls run on tensors of the same width (their order among equal scores is arbitrary,
but fixed by the row), and a candidate counts as finished only if it is among the best K of its example.

Shapes: B live examples, A all examples of the call, K beams, C candidates per example (at least 2K), T most new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FAR = -1.0e9
SPARE = 64  # candidates looked at beyond those needed, before all scores are masked


@dataclass(frozen=True)
class BeamRules:
    """The settings that selection depends on. end_ids: tensor of end tokens or None. max_new: most new tokens."""

    beams: int
    max_new: int
    length_penalty: float
    early_stopping: bool | str
    end_ids: torch.Tensor | None

    @property
    def candidates(self) -> int:
        """C: enough that K beams remain even if every end token of every beam is among the best."""
        ends = 0 if self.end_ids is None else self.end_ids.shape[0]
        return max(2, 1 + ends) * self.beams


class Beams:
    """Running and finished hypotheses. `running` scores `[B, K]`; `trace` `[B, K, 2, T]`: token and parent.

    Args: mask: vocabulary mask, 0 / -inf, `[V]` or `[B, V]`.
    """

    def __init__(self, examples: int, rules: BeamRules, device: torch.device, mask: torch.Tensor | None = None):
        self.rules = rules
        self.mask = mask
        self.look_first = device.type == "cpu"  # on a GPU masking is cheap, and looking makes the host wait
        self.step = 0
        beams = rules.beams
        self.running = torch.zeros(examples, beams, device=device)
        self.running[:, 1:] = FAR  # all beams are equal at first: only one may fan out
        self.trace = torch.full((examples, beams, 2, rules.max_new), -1, dtype=torch.long, device=device)
        self.done_trace = self.trace.clone()
        self.done_scores = torch.full((examples, beams), FAR, device=device)
        self.done = torch.zeros(examples, beams, dtype=torch.bool, device=device)
        self.improvable = torch.ones(examples, 1, dtype=torch.bool, device=device)
        self.hits = None
        self.may_finish = torch.arange(rules.candidates, device=device) < beams
        # Where live example b stands among all examples; final hypotheses of all, once the first example has left.
        self.origin = torch.arange(examples, device=device)
        self.stored: tuple[torch.Tensor, torch.Tensor] | None = None
        self.left_improvable = False

    @property
    def tokens(self) -> torch.Tensor:
        """Generated tokens of the running beams, `[B, K, step]`."""
        return self.trace[:, :, 0, : self.step]

    def advance(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one step. scores: accumulated log-probabilities `[B, K*V]`; the mask is added to them, if that is needed.

        Returns: next tokens and the beams that they continue, both `[B, K]`.
        """
        rules = self.rules
        vocabulary = scores.shape[1] // rules.beams
        best, index = self._best(scores, vocabulary)
        parents = index.div(vocabulary, rounding_mode="floor")
        tokens = index - parents * vocabulary
        trace = _rows(self.trace, parents)
        trace[:, :, 0, self.step] = tokens
        trace[:, :, 1, self.step] = parents
        hits = self._hits(tokens)
        self._finish(best, trace, hits)
        pushed = best + hits.to(torch.float32) * FAR
        chosen = torch.topk(pushed, k=rules.beams)[1]
        self.running = pushed.gather(1, chosen)
        self.trace = _rows(trace, chosen)
        self.hits = hits
        self.step += 1
        self._judge()
        return tokens.gather(1, chosen), parents.gather(1, chosen)

    def _best(self, scores: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The C best candidates that the mask permits, best first, and where they stand: both `[B, C]`.

        Masking all scores costs a pass over them. The best permitted candidates are among the best few as a rule: these
        are masked first, and everything only from the step on at which they do not suffice.
        """
        count = self.rules.candidates
        if self.mask is None:
            return torch.topk(scores, k=count)
        mask = self.mask.expand(scores.shape[0], -1)
        if self.look_first:
            best, index = torch.topk(scores, k=min(count + SPARE, scores.shape[1]))
            penalty = mask.gather(1, index % vocabulary)
            if bool(((penalty == 0).sum(dim=1) >= count).all()):
                best, chosen = torch.topk(best + penalty, k=count)
                return best, index.gather(1, chosen)
            self.look_first = False
        scores.view(scores.shape[0], -1, vocabulary).add_(mask[:, None])
        return torch.topk(scores, k=count)

    def _hits(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, C]`: candidates that end here, by an end token or by length."""
        if self.step + 1 >= self.rules.max_new:
            return torch.ones_like(tokens, dtype=torch.bool)
        if self.rules.end_ids is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return torch.isin(tokens, self.rules.end_ids)

    def _finish(self, best: torch.Tensor, trace: torch.Tensor, hits: torch.Tensor) -> None:
        """Merge the candidates that ended with the K best hypotheses of each example."""
        rules = self.rules
        ended = hits & self.may_finish
        scores = best / ((self.step + 1) ** rules.length_penalty)
        full = self.done.all(dim=-1, keepdim=True) & (rules.early_stopping is True)
        scores += full.to(torch.float32) * FAR
        scores += (~self.improvable).to(torch.float32) * FAR
        scores += (~ended) * FAR
        merged = torch.cat((self.done_scores, scores), dim=1)
        chosen = torch.topk(merged, k=rules.beams)[1]
        self.done_scores = merged.gather(1, chosen)
        self.done = torch.cat((self.done, ended), dim=1).gather(1, chosen)
        self.done_trace = _rows(torch.cat((self.done_trace, trace), dim=1), chosen)

    def _judge(self) -> None:
        """Update, per example, whether a running beam may still beat the worst finished hypothesis."""
        rules = self.rules
        optimistic = rules.early_stopping == "never" and rules.length_penalty > 0.0
        length = rules.max_new if optimistic else self.step
        hope = self.running[:, :1] / (length**rules.length_penalty)
        worst = torch.where(self.done, self.done_scores.min(dim=1, keepdim=True)[0], FAR)
        self.improvable = self.improvable & (hope > worst).any(dim=-1, keepdim=True)

    # --- ending -----------------------------------------------------------------------------------------------------

    def status(self) -> tuple[bool, list[bool]]:
        """Whether the search is over, and which live examples are settled for good (one device read).

        An example is settled when no later step can change its hypotheses: all K are there, and none may be improved.
        """
        full = self.done.all(dim=1)
        improvable = self.improvable[:, 0]
        settled = full & ~improvable
        if self.rules.early_stopping is True:
            settled = full
        summary = torch.stack([settled, improvable, full, self.hits.all(dim=1)]).tolist()
        settled, improvable, full, exhausted = summary
        open_beams = not (self.rules.early_stopping is True and all(full))
        running = (any(improvable) or self.left_improvable) and open_beams and not all(exhausted)
        return not running, settled

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with live examples `rows` only; the others' hypotheses are final."""
        self._write_out()
        gone = torch.ones(self.origin.numel(), dtype=torch.bool, device=rows.device)
        gone[rows] = False
        self.left_improvable = self.left_improvable or bool(self.improvable[gone].any())
        self.origin = self.origin.index_select(0, rows)
        for name in ("running", "trace", "done_trace", "done_scores", "done", "improvable", "hits"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        if self.mask is not None and self.mask.dim() == 2:
            self.mask = self.mask.index_select(0, rows)

    def _write_out(self) -> None:
        """Store the live examples' hypotheses where they belong among all examples."""
        if self.stored is None:
            self.stored = (self.done_trace.clone(), self.done_scores.clone())
            return
        trace, scores = self.stored
        trace[self.origin] = self.done_trace
        scores[self.origin] = self.done_scores

    def results(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Best `count` hypotheses of all examples: tokens `[A, count, T]` and parents (-1 after the end), scores."""
        self._write_out()
        trace, scores = self.stored
        return trace[:, :count, 0], trace[:, :count, 1], scores[:, :count]


def _rows(trace: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather hypotheses: trace `[B, n, 2, T]`, index `[B, m]` -> `[B, m, 2, T]`."""
    return trace.gather(1, index[:, :, None, None].expand(-1, -1, trace.shape[2], trace.shape[3]))
