"""What a run records while it trains: metrics.jsonl, prediction files, and what TensorBoard and W&B show.

metrics.jsonl is the record of truth; the trackers show the same rows. After a crash both continue without showing a step
twice: rows past the resumed step are cut from the file, and TensorBoard purges them. A run is one run in TensorBoard, however
often it was resumed, with its hyperparameters and the scores of its best evaluation so far (`best/*`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.recipe.dump import without_secrets
from engine.runtime.atomic import append_text, fsync_file, remove_partials, write_text_atomically
from engine.scoring import extra

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter

    from engine.recipe.schema import Recipe

log = logging.getLogger("engine.train")
# W&B would take the command line along, and the repository's address: either may hold a token.
_WANDB = {"x_disable_meta": True, "disable_git": True}
_COMPARED = ("loss", "rouge1", "rouge2", "rougeL", "rouge_mean")
_LONGEST_CELL = 600  # letters of a text in the sample table
# Letters that Markdown or HTML would take for themselves.
_MARKUP = str.maketrans({letter: f"&#{ord(letter)};" for letter in "&<>|\\`*_[]~!"} | {"\n": "<br>", "\r": None})
_NOT_SCALARS = {"split", "step", "rouge_tokenizer", "rouge_tokenizer_version", "sample_ids_sha256"}


def strict_json(row: Mapping[str, Any]) -> str:
    """One line of strict JSON: a NaN or an infinity becomes null, and its name is listed under `non_finite`."""
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    clean = {key: None if key in bad else value for key, value in row.items()}
    if bad:
        clean["non_finite"] = bad
    return json.dumps(clean, ensure_ascii=False, allow_nan=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl. A last line that a crash cut short, and what else is no row, is left out."""
    return [row for row in _parse(path) if row is not None]


def _parse(path: Path) -> Iterator[dict[str, Any] | None]:
    """One item per finished line, None where something has damaged it."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was never finished
        try:
            row = json.loads(line)
            yield row if isinstance(row["step"], int) and isinstance(row["split"], str) else None
        except (ValueError, KeyError, TypeError):
            yield None


class Tracker:
    """Writes one run's rows; on ranks other than the main one every method does nothing.

    Args:
        run_dir: the run folder.
        accelerator: its trackers get the scalars, under `train/<key>` and `eval/<key>`, x axis = optimizer update.
        recipe: names the trackers and is shown as hyperparameters.
        resumed_step: last update that the resumed checkpoint contains; None for a fresh start.
        own: names of the user's metrics.
    """

    def __init__(
        self,
        run_dir: Path,
        accelerator: Accelerator,
        recipe: Recipe,
        resumed_step: int | None = None,
        own: Sequence[str] = (),
    ) -> None:
        self.run_dir, self.accelerator, self.is_main = run_dir, accelerator, accelerator.is_main_process
        self.metrics_path = run_dir / "metrics.jsonl"
        # Beside the hyperparameters, of the best evaluation so far.
        self.compared = dict.fromkeys([*_COMPARED, extra.key_of(recipe.evaluation.metric), *own])
        if not self.is_main:
            return
        if resumed_step is not None:
            self._forget_after(resumed_step, recipe.training.logging_steps)
        accelerator.log_with = self._trackers(recipe, resumed_step)
        accelerator.init_trackers(recipe.tracking.wandb_project)
        shown = _flat(without_secrets(recipe.model_dump(mode="json")))
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                _set_up_tensorboard(tracker.writer, shown, self.compared)
            else:
                tracker.store_init_configuration(shown)

    def _trackers(self, recipe: Recipe, resumed_step: int | None) -> list[Any]:
        # Built here because the run folder did not exist yet when the Accelerator was made.
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        trackers: list[Any] = []
        if "tensorboard" in recipe.tracking.report_to:
            # A start that is marked too: TensorBoard takes the first mark for one, and forgets steps from the second on.
            purge = 0 if resumed_step is None else resumed_step + 1
            trackers.append(TensorBoardTracker("", str(self.run_dir / "tensorboard"), purge_step=purge))
        if "wandb" in recipe.tracking.report_to:
            named = {"name": self.run_dir.name, "dir": str(self.run_dir), "resume": "allow", "id": self.run_dir.name}
            trackers.append(WandBTracker(recipe.tracking.wandb_project, **named, settings=_WANDB))
        return trackers

    def _forget_after(self, step: int, logging_steps: int) -> None:
        """Cut what the resumed checkpoint does not contain; warn of what it contains and the file has lost."""
        path = self.metrics_path
        found = list(_parse(path))
        if None in found:
            aside = path.with_name("metrics.damaged.jsonl")
            write_text_atomically(aside, path.read_bytes().decode("utf-8", "surrogateescape"), errors="surrogateescape")
            log.warning("%d lines of %s are no rows; the file as it was is kept in %s", found.count(None), path, aside)
        rows = [row for row in found if row is not None and row["step"] <= step]
        logged = [0, *sorted(row["step"] for row in rows if row["split"] == "train")]
        usual = max([logging_steps, *(after - before for before, after in itertools.pairwise(logged))])
        if step - logged[-1] >= usual:  # `logging_steps` may change from one attempt to the next
            log.warning(
                "%s has lost its rows from step %d on; the run goes on after step %d", path, logged[-1] + 1, step
            )
        write_text_atomically(path, "".join(strict_json(row) + "\n" for row in rows))

    def sync(self) -> None:
        """Force the rows to the disk, before a checkpoint that builds on them."""
        if self.is_main and self.metrics_path.exists():
            fsync_file(self.metrics_path)

    def log_row(self, row: Mapping[str, Any], *, best: bool = False) -> None:
        """`row` follows the contract's keys: `split` is "train" or names the data, `step` counts optimizer updates.

        Args:
            best: an evaluation that is the best so far.
        """
        if not self.is_main:
            return
        group = "eval" if row["split"] == "dev" else row["split"]
        append_text(self.metrics_path, strict_json(row) + "\n")
        scalars = {
            f"{group}/{key}": value
            for key, value in row.items()
            if key not in _NOT_SCALARS and isinstance(value, int | float) and math.isfinite(value)
        }
        if best:
            kept = [key for key in self.compared if f"{group}/{key}" in scalars]
            scalars |= {f"best/{key}": scalars[f"{group}/{key}"] for key in kept}
        self.accelerator.log(scalars, step=row["step"])

    def log_samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Show dialogue, reference and prediction of a few rows as a Markdown table, long dialogues without their middle."""
        if not (self.is_main and rows):
            return
        columns = ("id", "dialogue", "reference", "prediction")
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
        self.accelerator.log({"eval/samples": "\n".join(lines)}, step=step)

    def close(self) -> None:
        """Flush and close the trackers. Does not touch the process group."""
        if self.is_main:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers = []


def write_predictions(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """`predictions/<split>-step<step>.csv`: id, dialogue, reference, prediction and, where scored, each row's ROUGE F1 x 100
    and those of the user's metrics that score by row.

    Newlines stay inside quoted cells.
    """
    path.parent.mkdir(exist_ok=True)
    remove_partials(path.parent)
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=rows[0] if rows else ["id", "dialogue", "reference", "prediction"])
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, table.getvalue(), durable=False)


def rows_sha256(rows: Sequence[Mapping[str, str]]) -> str:
    """Hash of what a prediction file says of the data: ids, dialogues and references, not predictions."""
    kept = [[row[key] for key in ("id", "dialogue", "reference")] for row in rows]
    return hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _cell(text: str) -> str:
    """A text as one cell shows it: to the letter, lines one below the other, without the middle of a long one."""
    half = _LONGEST_CELL // 2
    text = text if len(text) <= _LONGEST_CELL else f"{text[:half]} … {text[-half:]}"
    return text.translate(_MARKUP)


def _set_up_tensorboard(writer: SummaryWriter, shown: dict[str, Any], scores: Iterable[str]) -> None:
    """Its page of curves that belong together, and this run's row in its table of hyperparameters.

    Both lie in the run's own folder: Accelerate would make a run beside it for them, at each resume another.
    """
    from torch.utils.tensorboard.summary import hparams

    writer.add_custom_scalars(_layout([score for score in scores if score not in (*_COMPARED, "rouge_sum")]))
    experiment, session, _ = hparams(shown, {f"best/{score}": 0.0 for score in scores})
    for summary in (experiment, session):
        writer.file_writer.add_summary(summary)


def _layout(own: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Groups of charts; the tags are regular expressions."""
    charts = {
        "Quality": {
            "loss: train and dev": ["train/loss", "eval/loss"],
            "ROUGE on dev (F1 x 100)": ["eval/rouge1", "eval/rouge2", "eval/rougeL", "eval/rouge_mean"],
            "ROUGE mean and its baselines": ["eval/rouge_mean", "eval/lead_rouge_mean", "eval/constant_rouge_mean"],
            **{name: [f"eval/{name}"] for name in own},
        },
        "Training": {"learning rate": ["train/learning_rate"], "gradient norm": ["train/grad_norm"]},
        "Speed and memory": {
            "tokens a second": ["train/tokens_per_second"],
            "dev rows a second": ["eval/samples_per_second"],
            "peak memory (GiB)": ["train/peak_memory_gib"],
        },
    }
    return {
        group: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in shown.items()}
        for group, shown in charts.items()
    }


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Hyperparameters as TensorBoard takes them: one level, plain values."""
    plain = (int, float, str, bool)
    return {
        f"{section}.{key}": value if isinstance(value, plain) else str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }
