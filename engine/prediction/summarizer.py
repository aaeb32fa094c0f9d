"""From tokenised dialogues to summaries as text, the same way in evaluation and in prediction.

Batches are planned over all rows before they are dealt to ranks, so a row meets the same neighbours, and therefore the same
rounding, on one rank and on many.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.errors import EngineError
from engine.generation import constraints
from engine.generation.api import generate_all
from engine.generation.linears import fast_linears
from engine.generation.modelstate import unwrap
from engine.generation.settings import GenerationSettings
from engine.models import configuration
from engine.prediction.postprocess import postprocess

if TYPE_CHECKING:
    from engine.data.encode import Feature, TextEncoder
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Generation

_PLANNED = 1 << 62  # the batch is planned here already; generate_all has nothing to cut
_OURS = {"tokens_per_batch", "fix_placeholders", "fix_cut_word", "fix_full_stop", "fix_particles"}


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
        generation: the recipe's section, or an object with its fields. Where it leaves both max_new_tokens and max_length
            open, summaries may become as long as the model's training targets.
        batch_size: most dialogues decoded at once.
    """

    def __init__(self, bundle: ModelBundle, encoder: TextEncoder, generation: Generation, *, batch_size: int) -> None:
        self.bundle, self.encoder, self.batch_size = bundle, encoder, batch_size
        self.tokens_per_batch = generation.tokens_per_batch
        self.fixes = {name: getattr(generation, name) for name in sorted(_OURS) if name.startswith("fix_")}
        values = {k: v for k, v in generation.model_dump(exclude=_OURS).items() if v is not None}
        if values.get("repetition_scope") == "auto":
            del values["repetition_scope"]
        if "max_new_tokens" not in values and "max_length" not in values:
            values["max_new_tokens"] = bundle.lengths["max_target_length"]
        self._stay_within_positions(values)
        if encoder.stop_token_ids and "eos_token_id" not in values:
            values["eos_token_id"] = list(encoder.stop_token_ids)
        self.settings = self._resolve(values)
        self.mask = self._vocabulary_mask()

    def _stay_within_positions(self, values: dict[str, Any]) -> None:
        """Limits of generation cut to the places that the model has, which a causal LM shares with the prompt."""
        causal = self.bundle.family == "causal"
        _, most = configuration.most_tokens(self.bundle.model, self.bundle.family)
        new = most - self.bundle.lengths["max_source_length"] if causal else most
        for name, room in (("max_new_tokens", new), ("max_length", most)):
            if values.get(name) is not None:
                values[name] = configuration.within(room, f"generation.{name}", values[name])

    def _resolve(self, values: dict[str, Any]) -> GenerationSettings:
        try:
            settings = GenerationSettings.resolve(
                values,
                model_generation_config=self.bundle.model.generation_config,
                is_encoder_decoder=self.bundle.family == "seq2seq",
            )
            settings.check_token_ids(self._vocabulary, values)
            if self.bundle.family == "seq2seq" and settings.extra.get("guidance_scale", 1) != 1:
                raise ValueError("generation.guidance_scale: transformers guides causal LMs only")
            return settings
        except ValueError as error:
            raise EngineError(
                "E2.36", str(error), "generation", "change that setting", safe="nothing was decoded"
            ) from error

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
        return (
            self.settings.describe()
            | {"batch_size": self.batch_size, "tokens_per_batch": self.tokens_per_batch}
            | self.fixes
        )

    def plan(self, features: Sequence[Feature]) -> list[list[int]]:
        """Batches of positions in `features`, longest first, so that too large a batch fails at once and not at the end."""
        order = sorted(range(len(features)), key=lambda i: (-len(features[i].input_ids), i))
        beams = self.settings.num_beams * (self.settings.max_new_tokens or 0)
        batches: list[list[int]] = []
        for position in order:
            cells = len(features[batches[-1][0] if batches else position].input_ids) + beams
            room = self.batch_size if self.tokens_per_batch is None else max(1, self.tokens_per_batch // cells)
            if not batches or len(batches[-1]) >= min(room, self.batch_size):
                batches.append([])
            batches[-1].append(position)
        return batches

    def summarize(
        self,
        model: nn.Module,
        features: Sequence[Feature],
        *,
        dialogues: Mapping[int, str] | None = None,
        skip: Collection[int] = (),
        rank: int = 0,
        world_size: int = 1,
        on_batch: Callable[[list[Summary]], None] | None = None,
    ) -> list[Summary]:
        """Decode this rank's batches; no collective. `Summary.index` is the feature's own index.

        Args:
            dialogues: texts by the features' indices; needed where `keep_source_words` is on.
            skip: indices that are decoded already. Batches are planned with them and decoded without, so the rest of an
                interrupted prediction meets the same neighbours.
        """
        done: list[Summary] = []
        planned = [[features[position] for position in batch] for batch in self.plan(features)]
        batches = [rows for batch in planned if (rows := [row for row in batch if row.index not in skip])]
        mine = batches[rank::world_size]
        steps = len(mine) * (self.settings.max_new_tokens or self.settings.max_length)
        with fast_linears(unwrap(model), steps):  # prepared once, not for each batch
            for rows in mine:
                summaries = self._decode(model, rows, self.masks(rows, dialogues))
                done.extend(summaries)
                if on_batch:
                    on_batch(summaries)
        return done

    def masks(self, rows: Sequence[Feature], dialogues: Mapping[int, str] | None) -> torch.Tensor | None:
        """The script rules' mask (V,), or (B, V) where each row may use the foreign words of its own dialogue."""
        if self.mask is None or not self.settings.keep_source_words:
            return self.mask
        if dialogues is None:
            raise ValueError("keep_source_words needs the dialogues")
        blocked = constraints.blocked_scripts(self.settings.block_scripts, self.settings.allow_scripts)
        texts = [dialogues[row.index] for row in rows]
        return constraints.keep_source_words(self.mask, self.bundle.tokenizer, texts, blocked)

    def _decode(self, model: nn.Module, rows: Sequence[Feature], mask: torch.Tensor | None) -> list[Summary]:
        hypotheses = generate_all(
            model,
            [row.input_ids for row in rows],
            self.settings,
            pad_token_id=self.bundle.tokenizer.pad_token_id,
            tokens_per_batch=_PLANNED,
            vocabulary_mask=mask,
            tokenizer=self.bundle.tokenizer,
        )
        return [self._summary(row.index, n_best) for row, n_best in zip(rows, hypotheses, strict=True)]

    def _summary(self, index: int, n_best: Sequence[Any]) -> Summary:
        fixed = [postprocess(self.encoder.decode(h.token_ids), **self.fixes, capped=not h.ended) for h in n_best]
        best = n_best[0]
        return Summary(
            index=index,
            texts=[text for text, _ in fixed],
            scores=[h.score for h in n_best],
            tokens=len(best.token_ids),
            ended=best.ended,
            fired=list(fixed[0][1]),
        )
