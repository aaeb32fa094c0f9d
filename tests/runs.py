"""Small runs for tests: recipes over tiny folders, launched in this process, or by a launcher on one or two CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import yaml

ROOT = Path(__file__).resolve().parent.parent

# A metric as a user writes it in a module of his own.
LENGTH_ERROR = """
def length_error(predictions, references):
    return [abs(len(p) - len(r[0])) for p, r in zip(predictions, references)]
"""


def write_recipe(folder: Path, family: str = "bart", *, rows: int = 24, **changes: Any) -> Path:
    """A recipe that trains a tiny saved model on a few rows; `changes` are dotted keys with `__` for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").is_dir():
        tiny.save(family, folder / "model")
    recipe: dict[str, dict[str, Any]] = {
        "experiment": {"output_dir": str(folder / "run"), "output_root": str(folder / "experiments")},
        "model": {"name_or_path": str(folder / "model")},
        "tokenizer": {"added_tokens": tiny.ADDED},
        "data": {
            "train_file": str(tiny.write_rows(folder / "train.jsonl", rows)),
            "validation_file": str(tiny.write_rows(folder / "dev.jsonl", 6)),
            "allow_overlap": True,
            "max_source_length": 96,
            "max_target_length": 32,
        },
        "prompt": {"style": "instruction" if family in tiny.CAUSAL else "plain"},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "precision": "fp32",
        },
        "evaluation": {"num_samples": 1, "rouge_tokenizer": "whitespace"},
        "generation": {"num_beams": 2, "max_new_tokens": 6},
        "tracking": {"report_to": [], "progress": False},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        recipe.setdefault(section, {})[name] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def train(path: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Run a recipe in this process; what `results.json` holds."""
    from engine import load_recipe
    from engine.train import run

    return run(load_recipe(path, list(overrides)), **options)


def rows_of(run_dir: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for line in lines if (row := json.loads(line))["split"] == split]


def launch(script: str | Path, *arguments: str, ranks: int = 1, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a script under this interpreter, or under `accelerate launch` on two CPU ranks."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if ranks > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        command += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_machines",
            "1",
            "--main_process_port",
            "0",
        ]
        command += ["--num_processes", str(ranks), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
