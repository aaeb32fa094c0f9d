"""Run folders for tests of `compare.py`: what a run leaves, written without training."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.recipe import yaml_subset
from engine.reporting.tracking import write_predictions
from engine.scoring import rouge

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart" / "dev.csv"


def quickstart_rows(count: int) -> list[dict[str, str]]:
    with QUICKSTART.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    return [{"id": row["fname"], "dialogue": row["dialogue"], "reference": row["summary"]} for row in rows]


def forgetful(share: float, seed: int) -> Callable[[str], str]:
    """A summariser that writes the reference with some words left out and some doubled."""
    rng = random.Random(seed)

    def write(reference: str) -> str:
        words = [word for word in reference.split() if rng.random() > share]
        return " ".join(f"{word} {word}" if rng.random() < share / 3 else word for word in words)

    return write


def write_run(
    folder: Path,
    rows: list[dict[str, str]],
    write: Callable[[str], str],
    *,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    tokenizer: str = "whitespace",
    updates: int = 40,
) -> Path:
    """A finished run whose summaries are `write(reference)`; `recipe` holds "section.key" values."""
    predictions = [row | {"prediction": write(row["reference"])} for row in rows]
    scores = rouge.rouge_rows(
        [row["prediction"] for row in predictions], [row["reference"] for row in predictions], tokenizer
    )
    values: dict[str, dict[str, Any]] = {}
    keys = {
        "experiment.name": folder.name,
        "evaluation.rouge_tokenizer": tokenizer,
        "data.id_column": "fname",
        "data.validation_file": str(QUICKSTART),
        "training.learning_rate": 1e-3,
    }
    for key, value in (keys | dict(recipe or {})).items():
        section, name = key.split(".", 1)
        values.setdefault(section, {})[name] = value
    (folder / "predictions").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml_subset.write(values), encoding="utf-8")
    means = rouge.mean_scores(scores, tokenizer)
    history = [
        {"split": "train", "step": step, "loss": 5 / step, "learning_rate": 1e-3 / step, "grad_norm": 1.0 + step % 3}
        | {"tokens_per_second": 900.0 + step}
        for step in range(1, updates + 1)
    ]
    floors = {"lead_rouge_mean": 20.0, "constant_rouge_mean": 30.0}
    history += [{"split": "dev", "step": step, "loss": 6 / step} | means | floors for step in (updates // 2, updates)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
    record = {"best_step": updates, "kind": "done"} | dict(results or {})
    (folder / "results.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    rows_of = [row | score for row, score in zip(predictions, scores, strict=True)]
    write_predictions(folder / "predictions" / f"dev-step{updates}.csv", rows_of)
    return folder
