"""From tokenised dialogues to summaries as text, the same way in evaluation and in prediction.

Batches are planned over all rows before they are dealt to ranks, so a row meets the same neighbours, and therefore the same
rounding, on one rank and on many.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.errors import EngineError
from engine.generation import api
from engine.generation.settings import GenerationSettings
from engine.models import configuration
from engine.prediction import constraints
from engine.prediction.postprocess import RULES, postprocess
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from engine.data.encode import Feature, TextEncoder
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Generation
    from engine.runtime.process import Runtime

_NOT_OF_GENERATE = {"tokens_per_batch", *RULES}  # keys of the recipe's section that `generate` does not know


@dataclass(frozen=True)
class Summary:
    """One decoded row. `texts` and `scores` are the n-best list, best first; `ended`: by an end token, not the cap."""

    index: int
    texts: list[str]
    scores: list[float | None]
    tokens: int
    ended: bool
    fired: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.texts[0]


class Summarizer:
    """Decodes prompts with one model and one group of generation settings.

    Args:
        bundle: model, tokenizer and family.
        encoder: decodes token ids to text; knows which tokens end a turn.
        generation: the recipe's section. Where it leaves both max_new_tokens and max_length open, summaries may become as
            long as the model's training targets.
        batch_size: most dialogues decoded at once.

    Raises: EngineError: E2.36 for settings that do not fit each other or the model, E4.17 for the model's own.
    """

    def __init__(self, bundle: ModelBundle, encoder: TextEncoder, generation: Generation, *, batch_size: int) -> None:
        self.bundle, self.encoder, self.batch_size = bundle, encoder, batch_size
        self.tokens_per_batch = generation.tokens_per_batch
        self.fixes = {rule: getattr(generation, rule) for rule in sorted(RULES)}
        self.settings = self._resolve(self._values(generation))
        self.mask = self._vocabulary_mask()

    def _values(self, generation: Generation) -> dict[str, Any]:
        """What the recipe says under `generate`'s names, completed by what model and encoder know."""
        section = generation.model_dump(exclude=_NOT_OF_GENERATE)
        values = {name: value for name, value in section.items() if value is not None}
        if values["repetition_scope"] == "auto":
            del values["repetition_scope"]
        if "max_new_tokens" not in values and "max_length" not in values:
            values["max_new_tokens"] = self.bundle.lengths["max_target_length"]
        _, positions = configuration.most_tokens(self.bundle.model, self.bundle.family)
        prompt = self.bundle.lengths["max_source_length"] if self.bundle.family == "causal" else 0
        for name, room in (("max_new_tokens", positions - prompt), ("max_length", positions)):
            if name in values:
                values[name] = configuration.within(room, f"generation.{name}", values[name])
        if self.encoder.stop_token_ids:
            values.setdefault("eos_token_id", list(self.encoder.stop_token_ids))
        return values

    def _resolve(self, values: dict[str, Any]) -> GenerationSettings:
        """The settings in force. What cannot be is the user's fault, E2.36, unless the model's own settings alone cannot be."""
        what, where = (
            "the model's own generation settings cannot be used",
            f"generation_config.json of {self.bundle.base.name}",
        )
        with blaming("E4.17", what, where, "mend the file, or give another value for that setting"):
            try:
                return self._checked(values)
            except ValueError as error:
                self._checked({})
                safe = "nothing was decoded"
                raise EngineError("E2.36", str(error), "generation", "change that setting", safe=safe) from error

    def _checked(self, values: dict[str, Any]) -> GenerationSettings:
        """Raises: ValueError for settings that do not fit each other or the model, TypeError and others for what is none."""
        settings = GenerationSettings.resolve(
            values,
            model_generation_config=self.bundle.model.generation_config,
            is_encoder_decoder=self.bundle.family == "seq2seq",
        )
        settings.check_token_ids(self._vocabulary, values)
        if self.bundle.family == "seq2seq" and settings.extra.get("guidance_scale", 1) != 1:
            raise ValueError("generation.guidance_scale: transformers guides causal LMs only")
        return settings

    @property
    def _vocabulary(self) -> int:
        return self.bundle.model.get_output_embeddings().weight.shape[0]

    def _vocabulary_mask(self) -> torch.Tensor | None:
        settings = self.settings
        if not (settings.block_scripts or settings.allow_scripts):
            return None
        return constraints.script_mask(
            self.bundle.tokenizer,
            self._vocabulary,
            block_scripts=settings.block_scripts or None,
            allow_scripts=settings.allow_scripts or None,
        )

    def describe(self) -> dict[str, Any]:
        """Everything that decides a decoded text beside model and prompt: what fingerprints and logs hold."""
        batches = {"batch_size": self.batch_size, "tokens_per_batch": self.tokens_per_batch}
        return self.settings.describe() | batches | self.fixes

    def plan(self, features: Sequence[Feature]) -> list[list[int]]:
        """Batches of positions in `features`, longest first, so that too large a batch fails at once and not at the end."""
        lengths = [len(feature.input_ids) for feature in features]
        written = self.settings.num_beams * (
            self.settings.max_new_tokens or 0
        )  # tokens that a row's beams hold at most
        batches: list[list[int]] = []
        for position in sorted(range(len(features)), key=lambda i: (-lengths[i], i)):
            room = self.batch_size
            if self.tokens_per_batch is not None:
                longest = lengths[batches[-1][0] if batches else position]
                room = min(room, max(1, self.tokens_per_batch // (longest + written)))
            if not batches or len(batches[-1]) >= room:
                batches.append([])
            batches[-1].append(position)
        if self.settings.max_new_tokens is not None or self.bundle.family == "seq2seq":
            return batches
        # max_length counts a causal model's prompt: padded to a longer neighbour's width, a row could write less.
        return [list(same) for batch in batches for _, same in itertools.groupby(batch, key=lengths.__getitem__)]

    def summarize(
        self,
        model: nn.Module,
        features: Sequence[Feature],
        dialogues: Sequence[str],
        *,
        skip: Collection[int] = (),
        rank: int = 0,
        world_size: int = 1,
        on_batch: Callable[[list[Summary]], None] | None = None,
    ) -> list[Summary]:
        """Decode this rank's batches; no collective. `Summary.index` is the feature's own index.

        Args:
            dialogues: the features' texts, whose words `keep_source_words` lets through.
            skip: indices that are decoded already. Batches are planned with them and decoded without, so the rest of an
                interrupted prediction meets the same neighbours.
        """
        done: list[Summary] = []
        left = [[i for i in batch if features[i].index not in skip] for batch in self.plan(features)]
        mine = [batch for batch in left if batch][rank::world_size]
        steps = len(mine) * (self.settings.max_new_tokens or self.settings.max_length)
        with api.prepared(model, steps) as base:  # once, not for each batch
            for batch in mine:
                mask = self.mask_for([dialogues[i] for i in batch])
                summaries = self._decode(base, [features[i] for i in batch], mask)
                done.extend(summaries)
                if on_batch:
                    on_batch(summaries)
        return done

    def mask_for(self, dialogues: Sequence[str]) -> torch.Tensor | None:
        """The script rules' mask (V,), or (B, V) where each row may use the foreign words of its own dialogue."""
        if self.mask is None or not self.settings.keep_source_words:
            return self.mask
        blocked = constraints.blocked_scripts(self.settings.block_scripts, self.settings.allow_scripts)
        return constraints.keep_source_words(self.mask, self.bundle.tokenizer, dialogues, blocked)

    def _decode(self, base: nn.Module, rows: Sequence[Feature], mask: torch.Tensor | None) -> list[Summary]:
        hypotheses = api.generate_batch(
            base,
            [row.input_ids for row in rows],
            self.settings,
            pad_token_id=self.bundle.tokenizer.pad_token_id,
            vocabulary_mask=mask,
            tokenizer=self.bundle.tokenizer,
        )
        return [self.summary_of(row.index, n_best) for row, n_best in zip(rows, hypotheses, strict=True)]

    def summary_of(self, index: int, n_best: Sequence[api.Hypothesis]) -> Summary:
        """What one row's hypotheses say, best first, cleaned and repaired."""
        fixed = [postprocess(self.encoder.decode(h.token_ids), **self.fixes, capped=not h.ended) for h in n_best]
        return Summary(
            index=index,
            texts=[text for text, _ in fixed],
            scores=[h.score for h in n_best],
            tokens=len(n_best[0].token_ids),
            ended=n_best[0].ended,
            fired=list(fixed[0][1]),
        )


def gather_summaries(mine: Sequence[Summary], expected: Sequence[int], runtime: Runtime) -> list[Summary]:
    """All ranks' summaries in the order of the indices `expected`, each row exactly once."""
    runtime.ranks.wait_for_all(
        "decoding"
    )  # ranks finish far apart; only then the collective, with nothing left to wait for
    everyone = [Summary(**record) for record in runtime.ranks.gather([asdict(summary) for summary in mine])]
    by_index = {summary.index: summary for summary in everyone}
    if len(by_index) != len(everyone) or set(by_index) != set(expected):
        what = f"decoded {len(everyone)} rows for {len(expected)}; each must come back once"
        raise EngineError("E1.3", what, "decoding", "please report this")
    return [by_index[index] for index in expected]
