"""Evaluation: loss, generation, gathering by row, ROUGE. Leaves the model's mode and the random streams as it found them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import EngineError
from engine.generation.modelstate import evaluation_mode
from engine.loss.cross_entropy import summed_cross_entropy, supervised_tokens
from engine.models import sharding
from engine.prediction.summarizer import gather_summaries
from engine.reporting.tracking import rows_sha256
from engine.runtime.faults import at_line, first_line
from engine.scoring import endings, extra, rouge
from engine.scoring.alike import alike

if TYPE_CHECKING:
    from engine.data.encode import Feature
    from engine.data.feature_cache import FeatureCache
    from engine.data.rows import Example
    from engine.models.bundle import ModelBundle
    from engine.prediction.summarizer import Summarizer, Summary
    from engine.recipe.schema import Evaluation
    from engine.runtime.process import Runtime

NO_METRICS: Mapping[str, extra.Metric] = MappingProxyType({})


@dataclass(frozen=True)
class Split:
    """One data split, ready to be evaluated. `targets` is None where there are no references."""

    name: str
    examples: list[Example]
    prompts: Sequence[Feature]
    targets: Sequence[Feature] | None

    @classmethod
    def of(cls, name: str, examples: list[Example], cache: FeatureCache) -> Split:
        """Prompts of all rows, and targets if every row has a reference."""
        scored = all(row.references for row in examples)
        return cls(name, examples, cache.prompts(examples), cache.training(examples) if scored else None)

    @property
    def sha256(self) -> str:
        """Of ids, dialogues and references: scores compare where it is equal. The prediction file alone gives it too."""
        return rows_sha256(reference_rows(self.examples))

    @property
    def dialogues(self) -> list[str]:
        return [example.dialogue for example in self.examples]

    @property
    def references(self) -> list[tuple[str, ...]]:
        return [example.references for example in self.examples]

    def subset(self, count: int | None) -> Split:
        """A fixed, evenly spaced part of `count` rows; the whole split where count is None or no smaller."""
        if count is None or count >= len(self.examples):
            return self
        keep = [i * len(self.examples) // count for i in range(count)]
        targets = None if self.targets is None else [self.targets[i] for i in keep]
        return Split(self.name, [self.examples[i] for i in keep], [self.prompts[i] for i in keep], targets)


@dataclass(frozen=True)
class Scores:
    """Metrics of one evaluation and, on the main rank, one row per example in the order of the file.

    `problems` says, on the main rank too, which of the user's own metrics failed; those are NaN.
    """

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    problems: tuple[str, ...] = ()


def try_scoring(rouge_tokenizer: str) -> None:
    """Score one word, so that what scoring lacks is known before the first update or decoded row, not after the last.

    Raises:
        EngineError: E3.40 where the tokenizer or ROUGE itself cannot be used on this machine.
    """
    try:
        rouge.rouge(["시험"], ["시험"], tokenizer=rouge_tokenizer)
    except Exception as error:  # a dictionary, a cache, an import: each fails in its own way
        where = f"evaluation.rouge_tokenizer={rouge_tokenizer}"
        raise EngineError(
            "E3.40", f"ROUGE cannot be computed here: {error}", where, "choose another tokenizer"
        ) from error


def try_metrics(own: Mapping[str, extra.Metric], rows: Sequence[Example], runtime: Runtime) -> None:
    """Ask the user's metrics once, as `try_scoring`: about the first two rows, whose references stand for predictions.

    Raises:
        EngineError: E3.41 for one that fails; one that is NaN there may be a number for other texts.
    """
    split = Split("trial", list(rows[:2]), [], [])
    for name, metric in own.items():
        if not runtime.is_main:
            return
        with same_random_state(runtime):
            _, _, problem = _measured(name, metric, [row.references[0] for row in split.examples], split)
        if problem and " failed" in problem:
            where = "evaluation.extra_metrics or run(metrics=...)"
            raise EngineError("E3.41", f"{problem}; tried on two rows and their references", where, "correct it")


def evaluate(
    bundle: ModelBundle,
    split: Split,
    runtime: Runtime,
    settings: Evaluation,
    summarizer: Summarizer | None,
    own: Mapping[str, extra.Metric] = NO_METRICS,
) -> Scores:
    """Score `split`, sharded over ranks; every row is decoded once.

    Uses the bare model, without DistributedDataParallel: ranks decode different numbers of batches.

    Args:
        settings: the recipe's section, for the batch size and the tokenizer of ROUGE.
        summarizer: None measures the loss only.
        own: the user's metrics, by name; the main rank alone asks them.

    Returns:
        The same metrics on every rank; rows on the main rank only.
    """
    started = time.perf_counter()
    metrics: dict[str, Any] = {}
    scored = Scores({}, [])
    model = bundle.model
    with (
        same_random_state(runtime),
        sharding.whole(model),
        evaluation_mode(model),
        torch.no_grad(),
        runtime.autocast(),
    ):
        if split.targets is not None:
            metrics["loss"] = evaluation_loss(bundle, split.targets, runtime, settings.per_device_eval_batch_size)
        if summarizer is not None:
            summaries = decode(bundle, split, runtime, summarizer)
            if runtime.is_main:
                scored = score(split, summaries, settings.rouge_tokenizer, own)
            metrics |= runtime.ranks.broadcast(scored.metrics)
    metrics["seconds"] = time.perf_counter() - started
    metrics["samples_per_second"] = len(split.examples) / metrics["seconds"]
    return replace(scored, metrics=metrics)


@contextmanager
def same_random_state(runtime: Runtime) -> Iterator[None]:
    """Sampling in here moves no random stream of training: a run draws the same whether and when it is evaluated."""
    state = runtime.random_state()
    try:
        yield
    finally:
        runtime.restore_random_state(state)


def evaluation_loss(bundle: ModelBundle, targets: Sequence[Feature], runtime: Runtime, batch_size: int) -> float:
    """Cross-entropy per supervised token over all ranks' rows, without label smoothing."""
    order = sorted(range(len(targets)), key=lambda i: (targets[i].length, i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    totals = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # [loss sum, tokens]
    for positions in batches[runtime.rank :: runtime.world_size]:
        batch = runtime.to_device(bundle.collate([targets[position] for position in positions]))
        totals[0] += summed_cross_entropy(bundle.model, batch).double()
        totals[1] += supervised_tokens(batch)
    runtime.ranks.wait_for_all("evaluation loss")
    totals = runtime.ranks.sum_across_ranks(totals)
    return float(totals[0] / totals[1])


def decode(bundle: ModelBundle, split: Split, runtime: Runtime, summarizer: Summarizer) -> list[Summary]:
    """Summaries of all rows, decoded by all ranks."""
    with runtime.progress(total=len(split.prompts), desc=f"decode {split.name}", unit="row") as bar:
        mine = summarizer.summarize(
            bundle.model,
            split.prompts,
            split.dialogues,
            rank=runtime.rank,
            world_size=runtime.world_size,
            on_batch=lambda summaries: bar.update(len(summaries) * runtime.world_size),
        )
    return gather_summaries(mine, [prompt.index for prompt in split.prompts], runtime)


def score(
    split: Split, summaries: Sequence[Summary], rouge_tokenizer: str, own: Mapping[str, extra.Metric] = NO_METRICS
) -> Scores:
    """ROUGE and the user's metrics where there are references, how alike the decoded texts are and how they ended; rows as
    they are written."""
    predictions = [summary.text for summary in summaries]
    references = split.references
    metrics: dict[str, Any] = {}
    rows = prediction_rows(split, summaries)
    problems: list[str] = []
    if split.targets is not None:
        try:
            by_row = rouge.rouge_rows(predictions, references, tokenizer=rouge_tokenizer)
        except ValueError as error:
            where = f"{split.name} split, evaluation.rouge_tokenizer={rouge_tokenizer}"
            raise EngineError(
                "E3.40", str(error), where, "choose another tokenizer", safe="checkpoints are untouched"
            ) from error
        metrics |= rouge.mean_scores(by_row, rouge_tokenizer)
        rows = [row | {key: scores[key] for key in rouge.METRICS} for row, scores in zip(rows, by_row, strict=True)]
        for name, metric in own.items():
            metrics[name], values, problem = _measured(name, metric, predictions, split)
            rows = rows if values is None else [row | {name: x} for row, x in zip(rows, values, strict=True)]
            problems += [problem] if problem else []
    metrics |= endings.ending_metrics(
        predictions, [summary.ended for summary in summaries], references if split.targets is not None else None
    )
    metrics["alike_share"] = alike(predictions).share
    metrics["generated_tokens"] = sum(summary.tokens for summary in summaries)
    return Scores(metrics, rows, tuple(problems))


def _measured(
    name: str, metric: extra.Metric, predictions: Sequence[str], split: Split
) -> tuple[float, list[float] | None, str | None]:
    """Mean, scores by row where there are some, and what went wrong: a metric that fails costs its number, not the run."""
    try:
        value, rows = extra.measure(metric, predictions, split.references, split.dialogues)
    except Exception as error:  # code of the user's
        return math.nan, None, f"metric {name} failed{at_line(error)}: {first_line(error)}"
    return value, rows, None if math.isfinite(value) else f"metric {name} is {value}"


def prediction_rows(split: Split, summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Rows of predictions/<split>-step<step>.csv, but for their ROUGE; several references are joined by newlines."""
    return [
        row | {"prediction": summary.text}
        for row, summary in zip(reference_rows(split.examples), summaries, strict=True)
    ]


def reference_rows(examples: Sequence[Example]) -> list[dict[str, str]]:
    """What a prediction file says of the data itself."""
    return [
        {"id": example.id, "dialogue": example.dialogue, "reference": "\n".join(example.references)}
        for example in examples
    ]
