"""The last words of a run: what it has brought, where it lies, and the command that comes next."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.runtime.console import duration, from_here
from engine.runtime.resume_hint import COMMAND
from engine.runtime.run_log import RESULT
from engine.scoring.alike import ALIKE_LIMIT
from engine.scoring.floors import in_words, keys_of

if TYPE_CHECKING:
    from engine.recipe.schema import Recipe

_result = logging.getLogger(RESULT)
_PREDICT = Path(__file__).resolve().parents[1] / "predict.py"


def tell_results(record: Mapping[str, Any], run_dir: Path, recipe: Recipe) -> None:
    """Log the end block: to stdout and train.log, also without a terminal. `record` is what results.json holds."""
    for line in result_lines(record, run_dir):
        _result.info("%s", line)
    command = predict_command(run_dir, recipe)
    _result.info("predict with:")
    _result.info("%s", shlex.join(command), extra={"command": command})


def result_lines(record: Mapping[str, Any], run_dir: Path) -> list[str]:
    step, value, evaluating = record["best_step"], record["best_value"], record["evaluation_seconds"]
    took = duration(record["train_seconds"] + evaluating)
    why = "" if record["stop_reason"] == "done" else f"; stopped early, {record['stop_reason']}"
    share = f"{duration(evaluating)} of it evaluations ({record['evaluation_share']:.0%})"
    lines = [f"done: {record['last_step']} updates in {took}, {share}{why}"]
    if "profile" in record:
        longest = sorted(record["profile"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{phase} {share:.0%}" for phase, share in longest if share >= 0.005)
        lines.append(f"profile: {shares}; {from_here(run_dir / 'profile' / 'summary.txt')}")
    if value is not None:
        lines.append(f"best: step {step}, {record['best_metric']} {value:.4g}{_scores(record['metrics'])}")
        lines += _floors(record)
    if record["test_metrics"] and "rouge1" in record["test_metrics"]:
        lines.append(f"test: step {step}{_scores(record['test_metrics'])}")
    files = [run_dir / "predictions" / f"{split}-step{step}.csv" for split in ("test", "dev")]
    lines += [f"predictions: {from_here(path)}" for path in files if path.is_file()][:1]
    return [*lines, f"final model: {from_here(run_dir / 'final_model')}"]


def _scores(metrics: Mapping[str, Any] | None) -> str:
    metrics = metrics or {}
    if "rouge1" not in metrics:
        return ""
    scores = " / ".join(f"{metrics[key]:.2f}" for key in ("rouge1", "rouge2", "rougeL"))
    return f", ROUGE-1/2/L {scores} ({metrics['rouge_tokenizer']})"


def _floors(record: Mapping[str, Any]) -> list[str]:
    """What the best score is held against, and whether it is any better."""
    floors, metrics = record["baselines"].get("dev"), record["metrics"] or {}
    if not floors or "rouge_mean" not in metrics:
        return []
    above = metrics["rouge_mean"] > max(keys_of(floors).values())
    verdict = "" if above else f"; the model's {metrics['rouge_mean']:.2f} is not above both"
    alike = metrics.get("alike_share", 0.0)
    same = [f"warning: {alike:.0%} of its dev predictions are nearly the same text"] if alike >= ALIKE_LIMIT else []
    return [f"baselines: {in_words(floors)}{verdict}", *same]


def predict_command(run_dir: Path, recipe: Recipe) -> list[str]:
    """Works as it stands where the recipe names a file with dialogues to try it on."""
    source = recipe.data.test_file or recipe.data.validation_file or "FILE.csv"
    program = ["kodialogue", "predict"] if sys.argv[0] == COMMAND else ["python", from_here(_PREDICT)]
    return [*program, from_here(run_dir), "--input", source, "--output", "summaries.csv"]
