"""A trained model, decoded and scored on rows with references: what the tuning and ensemble tools have in common."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.data.rows import read_examples
from engine.errors import EngineError
from engine.generation.modelstate import unwrap
from engine.prediction.predictor import Predictor, model_folder, recipe_of
from engine.prediction.summarizer import Summarizer, Summary
from engine.recipe.load import with_overrides
from engine.scoring import intervals, rouge

if TYPE_CHECKING:
    from engine.data.encode import Feature
    from engine.data.rows import Example
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Generation, Recipe

METRICS = (*rouge.METRICS, "rouge_sum", "rouge_mean")
NOTHING_DONE = "nothing was decoded"


@dataclass(frozen=True)
class Decoding:
    """Texts of all rows in order; `ended`: by an end token, not by the limit. Wall time in seconds."""

    texts: list[str]
    ended: list[bool]
    tokens: int
    seconds: float

    @classmethod
    def of(cls, rows: Sequence[Summary], seconds: float) -> Decoding:
        texts, ended = [row.text for row in rows], [row.ended for row in rows]
        return cls(texts, ended, sum(row.tokens for row in rows), seconds)


@dataclass(frozen=True)
class Subject:
    """A trained model with the recipe of its run and the rows to decode."""

    home: Path  # the run folder, or the model folder where there is no run
    folder: Path  # with the weights
    recipe: Recipe
    predictor: Predictor
    examples: list[Example]
    prompts: list[Feature]
    source: str  # name of the file with the rows

    @property
    def bundle(self) -> ModelBundle:
        return self.predictor.bundle

    @property
    def references(self) -> list[tuple[str, ...]]:
        return [example.references for example in self.examples]

    @property
    def dialogues(self) -> list[str]:
        return [example.dialogue for example in self.examples]

    @property
    def labelled(self) -> bool:
        return bool(self.examples) and all(example.references for example in self.examples)

    def generation(self, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Generation:
        """The run's generation section with some values changed. Raises EngineError E2 for a wrong key or value."""
        return with_overrides(self.recipe, overrides, ("generation",)).generation

    def summarizer(self, generation: Generation) -> Summarizer:
        """Raises EngineError E2 for settings that do not go together."""
        batch_size = self.recipe.evaluation.per_device_eval_batch_size
        return Summarizer(self.bundle, self.predictor.encoder, generation, batch_size=batch_size)

    def decode(self, summarizer: Summarizer, on_rows: Callable[[int], None] | None = None) -> Decoding:
        """Decode every row; `on_rows` hears how many more are done."""
        started = time.perf_counter()
        heard = (lambda batch: on_rows(len(batch))) if on_rows else None
        done = summarizer.summarize(self.bundle.model, self.prompts, self.dialogues, on_batch=heard)
        by_index = {summary.index: summary for summary in done}
        return Decoding.of([by_index[feature.index] for feature in self.prompts], time.perf_counter() - started)

    def score(self, texts: Sequence[str], tokenizer: str | None = None) -> list[dict[str, float]]:
        """ROUGE of each row. Raises EngineError E3 where the references cannot be scored."""
        tokenizer = tokenizer or self.recipe.evaluation.rouge_tokenizer
        try:
            return rouge.rouge_rows(texts, self.references, tokenizer)
        except ValueError as error:
            raise EngineError(
                "E3.40", str(error), self.source, "choose another tokenizer", safe=NOTHING_DONE
            ) from error


@dataclass(frozen=True)
class Scored:
    """Scores of one system, row by row, and the seconds that its predictions took (None: not known here)."""

    name: str
    rows: list[dict[str, float]]
    seconds: float | None = None


def comparison(combined: Scored, members: Sequence[Scored], metric: str, seed: int = 42) -> list[str]:
    """Lines that show what combining is worth: its score, and its gain over each member on the same rows."""
    width = max(len(system.name) for system in (combined, *members))
    own = [row[metric] for row in combined.rows]
    lines = [f"{'':{width}}  {metric:>10}  {'95 % interval':>17}  {'gain of combining':>25}  {'seconds':>8}"]
    for system in (*members, combined):
        values = [row[metric] for row in system.rows]
        mean, low, high = intervals.bootstrap_interval(values, seed)
        gain = f"{'':>25}"
        if system is not combined:
            d = intervals.paired_difference(own, values, seed)
            gain = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]".rjust(25)
        cost = "-" if system.seconds is None else f"{system.seconds:.1f}"
        interval = f"[{low:.2f}, {high:.2f}]"
        lines.append(f"{system.name:{width}}  {mean:>10.2f}  {interval:>17}  {gain}  {cost:>8}")
    return lines


def open_subject(
    path: str | Path,
    *,
    input_file: str | None = None,
    device: str = "auto",
    limit: int | None = None,
    labelled: bool = True,
) -> Subject:
    """Load a run folder's final model, a checkpoint, or a model folder, with rows to decode.

    Args:
        input_file: rows to decode; None: the validation file of the run's recipe.
        device: auto, cpu or cuda.
        limit: only the first rows.
        labelled: the rows must have summaries.

    Raises:
        EngineError: E2 without a recipe or file, E3 for bad rows, E4 for a model that cannot be loaded.
    """
    folder = model_folder(Path(path))
    home = folder.parent if (folder.parent / "recipe.yaml").is_file() else folder
    recipe = recipe_of(folder)
    source = input_file or recipe.data.validation_file
    if source is None:
        what = "no rows to decode: the model's recipe names no validation file"
        raise EngineError("E2.60", what, str(path), "give --input", safe=NOTHING_DONE)
    examples = read_examples(source, recipe.data, require_summary=labelled, limit=limit)
    if recipe.runtime.num_threads is not None:
        torch.set_num_threads(recipe.runtime.num_threads)
    predictor = Predictor.from_run(folder, device=device)
    return Subject(home, folder, recipe, predictor, examples, predictor.features(examples), Path(source).name)


def refuse_other_rows(
    examples: Sequence[Example], name: str | Path, others: Sequence[Example], first: str | Path
) -> None:
    """What is decoded together or compared is row for row the same dialogue, as each recipe reads the file.

    Raises: EngineError E3.53 naming the first id that is not where it is in `first`.
    """
    pairs = zip_longest(*([(row.id, row.dialogue) for row in rows] for rows in (others, examples)))
    if odd := [other or own for other, own in pairs if other != own]:
        what = f"its rows differ from those of {first}: {len(odd)}, such as {odd[0][0]}"
        raise EngineError("E3.53", what, str(name), "give --input, and models that read it alike (data.*)")


@contextmanager
def encoder_remembered(model: torch.nn.Module, most_bytes: int = 4 << 30) -> Iterator[None]:
    """Run an encoder-decoder's encoder once per source, however often the rows are decoded in this block.

    What is kept are the states of each row's real tokens `[S, D]`, up to `most_bytes`, on the model's device. States
    that come back in a batch of other rows carry the rounding of the batch in which they were made (1e-6 in float32).
    Causal models pass through unchanged: they have no encoder.
    """
    base = unwrap(model)
    if not base.config.is_encoder_decoder:
        yield
        return
    encoder = base.get_encoder()
    memory = _EncoderMemory(encoder.forward, most_bytes)
    encoder.forward = functools.wraps(encoder.forward)(memory)
    try:
        yield
    finally:
        del encoder.forward  # the class's own method shows again


class _EncoderMemory:
    """A forward function that answers from memory where it knows every row of the batch."""

    def __init__(self, forward: Callable[..., Any], most_bytes: int) -> None:
        self.forward, self.room = forward, most_bytes
        self.states: dict[tuple[int, ...], torch.Tensor] = {}
        self.calls = self.answered = 0

    def __call__(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **more: Any
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        self.calls += 1
        if input_ids is None or attention_mask is None:
            return self.forward(input_ids=input_ids, attention_mask=attention_mask, **more)
        lengths = attention_mask.sum(dim=1).tolist()
        rows = [tuple(ids[:length]) for ids, length in zip(input_ids.tolist(), lengths, strict=True)]
        if all(row in self.states for row in rows):
            self.answered += 1
            padded = torch.nn.utils.rnn.pad_sequence([self.states[row] for row in rows], batch_first=True)
            missing = input_ids.shape[1] - padded.shape[1]
            return BaseModelOutput(last_hidden_state=torch.nn.functional.pad(padded, (0, 0, 0, missing)))
        output = self.forward(input_ids=input_ids, attention_mask=attention_mask, **more)
        for row, states in zip(rows, output[0], strict=True):
            size = states[: len(row)].nbytes
            if row not in self.states and size <= self.room:
                self.states[row] = states[: len(row)].clone()
                self.room -= size
        return output
