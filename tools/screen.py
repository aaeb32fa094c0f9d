#!/usr/bin/env python3
"""Score untrained models zero-shot, to choose which one to train: each recipe's model, prompt and decoding as they are.

    python tools/screen.py recipes/qwen3_4b_qlora.yaml recipes/llama3b_qlora.yaml data.validation_file=dev.csv

Every model runs in a process of its own. One that fails (out of memory, no licence, killed, too slow) is recorded with the
reason and without scores, and the next starts clean. Written to --output: a log, predictions and a record per recipe, and
screen.csv. A second call runs only what is missing, has failed, or was changed.

Placeholders are not added to the vocabulary here: before training, a new token would only hide what the model knows.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402
from engine.runtime.atomic import without_links, write_text_atomically  # noqa: E402

if TYPE_CHECKING:
    from engine.recipe.schema import Recipe

SCORES = ("rouge1", "rouge2", "rougeL", "rouge_sum", "rouge_mean", "loss", "capped_rate")
FACTS = ("rouge_tokenizer", "rows", "parameters", "precision", "seconds", "samples_per_second", "peak_memory_gib")
COLUMNS = ("recipe", "model", "status", *SCORES, *FACTS, "reason")
_UNCHANGED = ("experiment", "training", "checkpoint", "tracking", "lora")  # sections that zero-shot scores do not see


# One model, in its own process


def screen_one(recipe: Recipe, folder: Path, name: str) -> dict[str, Any]:
    """Scores of the recipe's model on its validation split, before any training.

    Raises:
        EngineError: as training would, for recipe, data and model.
    """
    from engine.data.feature_cache import FeatureCache
    from engine.data.rows import read_examples
    from engine.evaluation.evaluate import Split, evaluate
    from engine.models import build, weights
    from engine.prediction.summarizer import Summarizer
    from engine.reporting.tracking import write_predictions
    from engine.runtime.peak_memory import measured_peak
    from engine.runtime.process import start

    data = recipe.data
    with start(recipe) as runtime:
        rows = read_examples(data.validation_file, data, require_summary=True, limit=data.max_validation_samples)
        bundle = build.build_model(recipe, device=runtime.device, precision=runtime.precision)
        if weights.is_adapted(bundle.model):
            bundle.model = bundle.model.unload()  # adapters start without effect and only cost time here
        encoder, settings = bundle.text_encoder(), recipe.evaluation
        split = Split.of("dev", rows, FeatureCache(encoder, keep=data.cache)).subset(settings.max_samples)
        batch_size = settings.per_device_eval_batch_size
        summarizer = Summarizer(bundle, encoder, recipe.generation, batch_size=batch_size)
        scores = evaluate(bundle, split, runtime, settings, summarizer)
        write_predictions(folder / f"{name}.predictions.csv", scores.rows)
        return scores.metrics | {
            "rows": len(split.examples),
            "parameters": bundle.report["parameters"],
            "precision": runtime.precision,
            "peak_memory_gib": measured_peak(runtime.device),
        }


def child(options: argparse.Namespace) -> int:
    name = Path(options.child).stem
    metrics = screen_one(read(options.child, options.overrides), options.output, name)
    write_json(options.output / f"{name}.metrics.json", metrics)
    return 0


def end_with_parent() -> None:
    """Stdin is a pipe whose other end the screening holds: it closes when that ends, in whatever way."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)  # the group that was made for this model


# All of them


def screen(
    recipes: Sequence[str], overrides: Sequence[str], folder: Path, timeout: float | None
) -> list[dict[str, Any]]:
    """Run what has no valid record yet; return one row per recipe, in the order given."""
    names = [Path(recipe).stem for recipe in recipes]
    if len(set(names)) < len(names):
        raise EngineError("E2.65", "two recipes have the same file name", ", ".join(names))
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for recipe, name in zip(recipes, names, strict=True):
        record = folder / f"{name}.json"
        row, print_ = finished(record, recipe, overrides), fingerprint(recipe, overrides)
        if row is None:
            print(f"{name} ...", flush=True)
            row = run_child(recipe, name, overrides, folder, timeout)
            write_json(record, {"fingerprint": print_, "row": row})
            print(f"{name}: {row['status']} {row.get('reason', '')}".rstrip(), flush=True)
        rows.append(row)
        write_csv(folder / "screen.csv", rows)
    return rows


def run_child(recipe: str, name: str, overrides: Sequence[str], folder: Path, timeout: float | None) -> dict[str, Any]:
    """Screen one recipe in a process of its own and say what came of it."""
    metrics = folder / f"{name}.metrics.json"
    metrics.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", recipe, "--output", str(folder), *overrides]
    started = time.perf_counter()
    with open(folder / f"{name}.log", "w", encoding="utf-8", opener=without_links) as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    row = {"recipe": name, "model": model_name(recipe, overrides), "wall_seconds": time.perf_counter() - started}
    if code == 0 and metrics.is_file():
        found = json.loads(metrics.read_text(encoding="utf-8"))
        metrics.unlink()
        return row | {"status": "ok"} | {key: found.get(key) for key in (*SCORES, *FACTS)}
    return row | {"status": "failed", "reason": reason(code, folder / f"{name}.log", timeout)}


def end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a model's process may stay on the device when the next one starts."""
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the group that was made for it
    except ProcessLookupError:
        pass
    process.wait()


def reason(code: int | None, log: Path, timeout: float | None) -> str:
    """Why a process ended badly: its own one-line error, the signal that killed it, or its last words."""
    if code is None:
        return f"not done after {timeout:g} s"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error E")]
    if errors:
        return errors[-1]
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"


def finished(record: Path, recipe: str, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The row of an earlier call, if it succeeded with the same recipe and data."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        same = known["fingerprint"] == fingerprint(recipe, overrides)
        return known["row"] if same and known["row"]["status"] == "ok" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fingerprint(recipe: str, overrides: Sequence[str]) -> str:
    """Of everything that decides a zero-shot score; of the text of a broken recipe."""
    digest = hashlib.sha256()
    try:
        loaded = read(recipe, overrides)
    except EngineError as error:
        return hashlib.sha256(str(error).encode()).hexdigest()
    values = {name: section for name, section in loaded.model_dump().items() if name not in _UNCHANGED}
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    if loaded.data.validation_file and Path(loaded.data.validation_file).is_file():
        digest.update(Path(loaded.data.validation_file).read_bytes())
    return digest.hexdigest()


def read(recipe: str, overrides: Sequence[str]) -> Recipe:
    """The recipe as it is screened.

    Raises:
        EngineError: E2 for a recipe that cannot be screened.
    """
    from engine.recipe.load import load_recipe

    given = [text for text in overrides if not text.startswith("data.train_file=")]
    loaded = load_recipe(recipe, [*given, "data.train_file=not-read", "tokenizer.added_tokens=[]"])
    if loaded.model.init == "random":
        raise EngineError("E2.66", "random weights have nothing to screen", f"{recipe}: model.init")
    if loaded.data.validation_file is None:
        raise EngineError("E2.67", "no rows to score", f"{recipe}: data.validation_file", "set it to a file")
    return loaded


def model_name(recipe: str, overrides: Sequence[str]) -> str:
    try:
        return read(recipe, overrides).model.name_or_path or ""
    except EngineError:
        return ""


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Empty cells where there is no score: a failure is not a score of 0."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, text.getvalue())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Best first; failures last, with their reasons."""

    def shown(row: dict[str, Any], key: str, form: str) -> str:
        return "" if row[key] is None else format(row[key], form)

    def place(row: dict[str, Any]) -> tuple[bool, float]:
        return row["rouge_sum"] is None, -(row["rouge_sum"] or 0.0)

    good = sorted((row for row in rows if row["status"] == "ok"), key=place)
    forms = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rouge_sum"), ".2f") | {"capped_rate": ".0%"}
    forms |= {"samples_per_second": ".2f", "peak_memory_gib": ".2f", "loss": ".3f"}
    heads = ("R-1", "R-2", "R-L", "sum", "capped", "rows/s", "GiB", "loss")
    lines = [" ".join([f"{'recipe':24}", *(f"{head:>7}" for head in heads)]) + "  model"]
    for row in good:
        cells = " ".join(f"{shown(row, key, form):>7}" for key, form in forms.items())
        lines.append(f"{row['recipe']:24} {cells}  {row['model']}")
    lines += [f"{row['recipe']:24} failed: {row['reason']}" for row in rows if row["status"] != "ok"]
    tokenizers = {row["rouge_tokenizer"] for row in good if row["rouge_tokenizer"]}
    return "\n".join(lines) + (f"\nROUGE F1 x 100, {', '.join(sorted(tokenizers))}" if tokenizers else "")


def main(arguments: Sequence[str] | None = None) -> int:
    from engine.recipe.flags import parse_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="RECIPE.yaml or section.key=value", help="models, and settings of all"
    )
    parser.add_argument("--output", type=Path, default=Path("experiments/screening"), help="folder for the results")
    parser.add_argument("--timeout", type=float, help="seconds that one model may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parse_options(parser, arguments)
    recipes = [text for text in options.overrides if "=" not in text]
    options.overrides = [text for text in options.overrides if "=" in text]
    if options.child:
        threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
        return child(options)
    if not recipes:
        parser.error("name at least one recipe")
    try:
        rows = screen(recipes, options.overrides, options.output, options.timeout)
    except EngineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(rows))
    print(f"written to {options.output / 'screen.csv'}")
    return 0 if all(row["status"] == "ok" for row in rows) else 4


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
