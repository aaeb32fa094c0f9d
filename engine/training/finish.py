"""The end of a run: the best weights as `final_model/`, predictions of the test split, `results.json`, `results.csv`."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.feature_cache import FeatureCache
from engine.errors import EngineError
from engine.evaluation import evaluate
from engine.models import weights
from engine.prediction import export
from engine.prediction.card import card
from engine.recipe.dump import without_secrets
from engine.reporting import provenance
from engine.reporting.report import tell_results
from engine.reporting.tracking import read_rows, rows_sha256, strict_json, write_predictions
from engine.runtime.atomic import read_json, remove_partials, write_json_atomically, write_text_atomically
from engine.runtime.faults import blaming
from engine.runtime.lock import taking_turns
from engine.runtime.run_status import STATUS
from engine.scoring import floors
from engine.scoring.extra import key_of

if TYPE_CHECKING:
    from engine.data.rows import Example
    from engine.recipe.schema import Recipe
    from engine.runtime.process import Runtime
    from engine.training.job import Job

log = logging.getLogger("engine.train")
_NOT_MODEL = {"engine_state", "manifest.json"}


def write_results(job: Job, test: list[Example]) -> dict[str, Any]:
    """Everything after the last update; `test` may be empty. Returns the content of `results.json`."""
    job.progress.close()
    shares = job.time_shares()
    job.tell_saved()
    # Where nothing was evaluated, none is the best, and the last one is taken.
    wanted = job.state.best_step if job.state.best_step is not None else job.state.saved_step
    chosen = job.store.step_to_hand_on(wanted, job.recipe.evaluation.metric)
    checkpoint = job.run_dir / f"checkpoint-{chosen}"
    with job.runtime.ranks.together("writing final_model"):
        if job.runtime.is_main:
            write_final_model(checkpoint, job)
    tested = _predict_test(job, test, checkpoint, chosen)
    record = _record(job, chosen, test, tested) | ({"profile": shares} if shares else {})
    with job.runtime.ranks.together("writing results"):
        if job.runtime.is_main:
            append_result(Path(job.recipe.experiment.output_root) / "results.csv", _row(record, job.recipe))
            write_json_atomically(job.run_dir / "results.json", record)
            write_text_atomically(job.run_dir / "final_model" / "README.md", card(job.recipe, job.bundle, record))
    tell_results(record, job.run_dir, job.recipe)
    job.callbacks.call("on_end", record, job.state.step)
    job.end_if_failed("the results are written")
    return record


def write_final_model(checkpoint: Path, job: Job) -> None:
    """`final_model/`: the checkpoint's model files, the resolved recipe, and nothing that only a resume needs.

    Its generation_config.json holds the run's settings, so that other programs decode as this run did.
    """
    run_dir = job.run_dir
    final, partial = run_dir / "final_model", run_dir / ".tmp-final_model"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, ignore=lambda folder, names: _NOT_MODEL & set(names))
    shutil.copy2(run_dir / "recipe.yaml", partial / "recipe.yaml")
    try:
        export.write_generation_config(partial, job.bundle, job.recipe.generation)
    except EngineError as error:  # settings that nothing in this run has used; the training is done
        log.warning("final_model/generation_config.json stays the model's own: %s", error.what)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def _predict_test(job: Job, test: list[Example], checkpoint: Path, step: int) -> dict[str, Any]:
    """Predict the test split with the best weights; its scores, and the floors under them, where it has summaries.

    Returns {"metrics": ..., "interval": ..., "floors": ...}, empty without rows or without decoding.
    """
    if not test or job.summarizer is None:
        return {}
    weights.load_weights(job.bundle.model, checkpoint)
    cache = FeatureCache(job.bundle.text_encoder(), keep=job.recipe.data.cache)
    split = evaluate.Split.of("test", test, cache)
    job.progress.evaluating(step, split.name, len(test))
    result = evaluate.evaluate(
        job.bundle, split, job.runtime, job.recipe.evaluation, job.summarizer, job.extras.metrics
    )
    for problem in result.problems:
        log.warning("test, step %d: %s", step, problem)
    if job.runtime.is_main:
        write_predictions(job.run_dir / "predictions" / f"test-step{step}.csv", result.rows)
        log.info("step %d  %d test rows decoded in %.1f s", step, len(result.rows), result.metrics["seconds"])
        if warning := floors.alike_warning(result.rows):
            log.warning("test: %s", warning)
    tested: dict[str, Any] = {"metrics": result.metrics, "interval": provenance.interval(result.rows)}
    if job.runtime.is_main and job.dev is not None and split.targets is not None:
        tokenizer = job.recipe.evaluation.rouge_tokenizer
        tested["floors"] = floors.measure_again(job.floors, split.dialogues, split.references, tokenizer)
    return tested


def _record(job: Job, chosen: int, test: list[Example], tested: Mapping[str, Any]) -> dict[str, Any]:
    state, recipe = job.state, job.recipe
    logged = read_rows(job.run_dir / "metrics.jsonl")
    rows = [row for row in logged if row["split"] == "dev" and row["step"] == chosen]
    test_metrics = json.loads(strict_json(tested["metrics"])) if tested else None
    scored = job.runtime.is_main and rows and "rouge1" in rows[-1]
    dev = provenance.interval_of(job.run_dir / "predictions" / f"dev-step{chosen}.csv") if scored else None
    return {
        "run": job.run_dir.name,
        "final_model_path": str(job.run_dir / "final_model"),
        "best_step": chosen,
        "best_metric": recipe.evaluation.metric,
        "best_value": rows[-1].get(key_of(recipe.evaluation.metric)) if rows else state.best_value,
        "metrics": rows[-1] if rows else None,
        "test_metrics": test_metrics,
        "intervals": {"dev": dev, "test": tested.get("interval")},
        "baselines": _baselines(job, tested),
        "recipe": without_secrets({"name": recipe.experiment.name, "sha256": provenance.recipe_sha256(recipe)}),
        "data": _data(job, test),
        "kind": _kind(job),
        "last_step": state.step,
        "epochs": job.epoch,
        "skipped_updates": state.skipped,
        "stop_reason": state.stop_reason or "done",
        "train_seconds": state.train_seconds,
        "evaluation_seconds": state.evaluation_seconds,
        "evaluation_share": state.evaluation_share,
        "speeds": provenance.speeds(logged, test_metrics),
        "model": without_secrets(job.bundle.report | {"name_or_path": recipe.model.name_or_path}),
        "world_size": job.runtime.world_size,
        "code": job.code,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(job.runtime.device, job.runtime.world_size),
    }


def _baselines(job: Job, tested: Mapping[str, Any]) -> dict[str, Any]:
    """The floors of each split that was scored; none on other ranks than the main one."""
    if not (job.runtime.is_main and job.dev is not None and job.summarizer is not None):
        return {}
    return {"dev": job.floors} | ({"test": tested["floors"]} if "floors" in tested else {})


def _data(job: Job, test: list[Example]) -> dict[str, Any]:
    """What was trained and scored on; scores of two runs compare where `dev_sha256` is equal."""
    scored = [] if job.dev is None else job.dev.examples
    found: dict[str, Any] = {}
    for name, examples in (("train", job.examples), ("dev", scored), ("test", test)):
        found[f"{name}_rows"] = len(examples)
        found[f"{name}_sha256"] = rows_sha256(evaluate.reference_rows(examples)) if examples else None
    return found


def _kind(job: Job) -> str:
    """debug, stopped (before its recipe's end) or done."""
    if job.recipe.is_debug:
        return "debug"
    return "stopped" if job.state.stop_reason else "done"


def _row(record: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """One line of results.csv. Batch: rows of one update, over all devices."""
    metrics, training = record["metrics"] or {}, recipe.training
    keys = ("run", "best_step", "best_metric", "best_value", "last_step", "train_seconds", "evaluation_seconds")
    scores = {key: metrics.get(key) for key in ("loss", "rouge1", "rouge2", "rougeL", "rouge_mean", "rouge_tokenizer")}
    model = {"model": record["model"]["name_or_path"] or record["model"]["model_type"]}
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * record["world_size"]
    settings = {
        "epochs": record["epochs"],
        "learning_rate": training.learning_rate,
        "batch": batch,
        "seed": training.seed,
        "kind": record["kind"],
    }
    place = {"final_model_path": record["final_model_path"]}
    return {key: record[key] for key in keys} | scores | model | place | settings | record["data"]


def append_result(path: Path, row: Mapping[str, Any]) -> None:
    """Add one run to `results.csv`, the table of all runs under an output root, or replace that run's row.

    Columns grow as rows bring new ones. A table that somebody made unreadable is left alone, with a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with taking_turns(path.parent):
        remove_partials(path.parent, path.name)  # nobody else writes now
        try:
            known = _read_table(path)
        except ValueError as error:
            log.warning("%s is left alone (%s); this run's row stands in its results.json", path, error)
            return
        rows = [other for other in known if other.get("final_model_path") != row["final_model_path"]] + [row]
        table = io.StringIO()
        columns = dict.fromkeys(column for entry in rows for column in entry)
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomically(path, table.getvalue())


def _read_table(path: Path) -> list[Mapping[str, Any]]:
    """Raises: ValueError for what is no table of UTF-8 text."""
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} does not fit the header")
    return rows


def already_complete(run_dir: Path, runtime: Runtime) -> dict[str, Any]:
    """What the finished run left. Raises: EngineError E6.7 where that cannot be read any more."""
    path = run_dir / "results.json"
    what, safe = "the run is complete, but its results cannot be read", "model and checkpoints are untouched"
    next = f"remove {run_dir / STATUS}; then --resume auto writes the results again, from the last checkpoint"
    with blaming("E6.7", what, path, next, safe=safe):
        record = read_json(path)
    log.info("%s is already complete; nothing to do", run_dir)
    log.info("to train its model further, start another run with model.name_or_path=%s", run_dir / "final_model")
    return record
