"""Evaluation: loss, generation, gathering by row, ROUGE. Leaves the model's mode and the random streams as it found them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.errors import EngineError
from engine.prediction.summarizer import Summarizer, Summary
from engine.scoring import endings, rouge
from engine.training.losses import summed_cross_entropy, supervised_tokens

if TYPE_CHECKING:
    from engine.data.encode import Feature
    from engine.data.rows import Example
    from engine.runtime.process import Runtime

HIGHER_IS_BETTER = {
    "loss": False,
    "rouge1": True,
    "rouge2": True,
    "rougeL": True,
    "rouge_sum": True,
    "rouge_mean": True,
}


@dataclass(frozen=True)
class Split:
    """One data split, ready to be evaluated. `targets` is None where there are no references."""

    name: str
    examples: list[Example]
    prompts: list[Feature]
    targets: list[Feature] | None

    @property
    def dialogues(self) -> dict[int, str]:
        """Texts by the prompts' indices."""
        return {prompt.index: row.dialogue for prompt, row in zip(self.prompts, self.examples, strict=True)}

    def subset(self, count: int | None) -> Split:
        """A fixed, evenly spaced part of `count` rows; the whole split where count is None or no smaller."""
        if count is None or count >= len(self.examples):
            return self
        keep = [i * len(self.examples) // count for i in range(count)]
        targets = None if self.targets is None else [self.targets[i] for i in keep]
        return Split(self.name, [self.examples[i] for i in keep], [self.prompts[i] for i in keep], targets)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation and, on the main rank, one row per example in the order of the file."""

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]


def evaluate(
    model: nn.Module,
    split: Split,
    runtime: Runtime,
    *,
    collate: Callable[[list[Feature]], dict[str, torch.Tensor]],
    batch_size: int,
    summarizer: Summarizer | None,
    rouge_tokenizer: str,
) -> Evaluation:
    """Score `split`, sharded over ranks; every row is decoded once.

    Args:
        model: bare model, without DistributedDataParallel: ranks decode different numbers of batches.
        summarizer: None measures the loss only.

    Returns:
        The same metrics on every rank; rows on the main rank only.
    """
    started = time.perf_counter()
    metrics: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with evaluation_mode(model, runtime), torch.no_grad(), runtime.autocast():
        if split.targets is not None:
            metrics["loss"] = evaluation_loss(model, split.targets, runtime, collate=collate, batch_size=batch_size)
        if summarizer is not None:
            progress = runtime.progress(total=len(split.prompts), desc=f"decode {split.name}", unit="row")
            with progress as bar:
                mine = summarizer.summarize(
                    model,
                    split.prompts,
                    dialogues=split.dialogues,
                    rank=runtime.rank,
                    world_size=runtime.world_size,
                    on_batch=lambda summaries: bar.update(len(summaries) * runtime.world_size),
                )
            summaries = gather_summaries(mine, [feature.index for feature in split.prompts], runtime)
            metrics |= runtime.broadcast(score(split, summaries, rouge_tokenizer) if runtime.is_main else None)
            rows = prediction_rows(split, summaries)
    metrics["seconds"] = time.perf_counter() - started
    metrics["samples_per_second"] = len(split.examples) / metrics["seconds"]
    return Evaluation(metrics, rows)


class evaluation_mode:
    """Context: eval mode and the key/value cache on; every module's mode and every random stream restored afterwards."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self.model, self.runtime = model, runtime

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.random_state = self.runtime.random_state()
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        for module, training in self.modes.items():
            module.training = training
        self.runtime.restore_random_state(self.random_state)


def evaluation_loss(
    model: nn.Module,
    targets: Sequence[Feature],
    runtime: Runtime,
    *,
    collate: Callable[[list[Feature]], dict[str, torch.Tensor]],
    batch_size: int,
) -> float:
    """Cross-entropy per supervised token over all ranks' rows, without label smoothing."""
    order = sorted(range(len(targets)), key=lambda i: (targets[i].length, i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    totals = torch.zeros(2, dtype=torch.float64, device=runtime.device)  # [loss sum, tokens]
    for positions in batches[runtime.rank :: runtime.world_size]:
        batch = runtime.to_device(collate([targets[position] for position in positions]))
        totals[0] += summed_cross_entropy(model, batch).double()
        totals[1] += supervised_tokens(batch)
    runtime.wait_for_all("evaluation loss")
    totals = runtime.sum_across_ranks(totals)
    return float(totals[0] / totals[1])


def gather_summaries(mine: list[Summary], expected: Sequence[int], runtime: Runtime) -> list[Summary]:
    """All ranks' summaries in the order of `expected`, each row exactly once."""
    runtime.wait_for_all("decoding")  # ranks finish far apart; only then the collective, with nothing left to wait for
    everyone = [Summary(**record) for record in runtime.gather([asdict(summary) for summary in mine])]
    by_index = {summary.index: summary for summary in everyone}
    if len(by_index) != len(everyone) or set(by_index) != set(expected):
        raise EngineError(
            "E1.3",
            f"decoded {len(everyone)} rows for {len(expected)}; each must come back once",
            "evaluation",
            "please report this",
        )
    return [by_index[index] for index in expected]


def score(split: Split, summaries: Sequence[Summary], rouge_tokenizer: str) -> dict[str, Any]:
    """ROUGE where there are references, and how the decoded texts ended."""
    predictions = [summary.text for summary in summaries]
    references = [example.references for example in split.examples]
    metrics: dict[str, Any] = {}
    if split.targets is not None:
        try:
            metrics |= rouge.rouge(predictions, references, tokenizer=rouge_tokenizer)
        except ValueError as error:
            where = f"{split.name} split, evaluation.rouge_tokenizer={rouge_tokenizer}"
            raise EngineError(
                "E3.40", str(error), where, "choose another tokenizer", safe="checkpoints are untouched"
            ) from error
    metrics |= endings.ending_metrics(
        predictions, [summary.ended for summary in summaries], references if split.targets is not None else None
    )
    metrics["generated_tokens"] = sum(summary.tokens for summary in summaries)
    return metrics


def prediction_rows(split: Split, summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Rows of predictions/<split>-step<step>.csv; several references are joined by newlines."""
    return [
        {
            "id": example.id,
            "dialogue": example.dialogue,
            "reference": "\n".join(example.references),
            "prediction": summary.text,
        }
        for example, summary in zip(split.examples, summaries, strict=True)
    ]
