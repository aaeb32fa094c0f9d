"""One training run's parts, and what happens to them between two updates: data in, logs, evaluations and saves out."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.checkpoints.spool import Spool
from engine.checkpoints.state_files import check_alike
from engine.checkpoints.store import EngineState
from engine.data.collate import IGNORE_INDEX
from engine.evaluation import evaluate
from engine.evaluation.extras import Extras
from engine.loss.cross_entropy import supervised_positions
from engine.models import sharding
from engine.models.bundle import save_model
from engine.models.weights import weights_of
from engine.reporting.provenance import code_state
from engine.reporting.tracking import Tracker, write_predictions
from engine.runtime import signals
from engine.runtime.ahead import Ahead
from engine.runtime.peak_memory import measured_peak
from engine.scoring import extra, floors
from engine.training import nonfinite, optim
from engine.training.progress import Progress, Schedule
from engine.training.state import TrainerState, Update, Window

if TYPE_CHECKING:
    from engine.checkpoints.store import CheckpointStore
    from engine.data.encode import Feature
    from engine.data.rows import Example
    from engine.data.windows import WindowSampler
    from engine.models.bundle import ModelBundle
    from engine.prediction.summarizer import Summarizer
    from engine.recipe.schema import Recipe
    from engine.runtime.process import Runtime

log = logging.getLogger("engine.train")
_MOST_EVALUATION = 0.1  # share of the time above which a run is told
_SPARED = 10.0  # seconds of evaluations that nobody minds


class Learner(NamedTuple):
    """What an update moves."""

    model: nn.Module  # the bundle's: among several ranks wrapped by DistributedDataParallel, or sharded
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    def states(self, keep: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """All but the weights, under the names of `EngineState`; parts of a sharded model's moments gathered on rank 0.

        `keep` says where rank 0 puts them; see `sharding.gathered`.
        """
        parts = {"optimizer": self.optimizer, "scheduler": self.schedule, "scaler": self.scaler}
        return {name: sharding.gathered(part.state_dict(), keep) for name, part in parts.items()}

    def load_states(self, saved: EngineState) -> None:
        """The inverse. Raises: ValueError and others for states of other parts."""
        own = self.states()
        check_alike(saved.scheduler, own["scheduler"], "schedule")
        check_alike(saved.scaler, own["scaler"], "scaler")
        optimizer = optim.as_saved(self.optimizer, saved.optimizer)
        check_alike(optimizer["param_groups"], self.optimizer.state_dict()["param_groups"], "optimizer")
        optim.check_moments(self.optimizer, optimizer)
        self.optimizer.load_state_dict(sharding.parts_of_moments(self.optimizer, optimizer))
        self.schedule.load_state_dict(saved.scheduler)
        self.scaler.load_state_dict(saved.scaler)


class TrainingRows(NamedTuple):
    """What is trained on; `features[i].index` is the place of its row in `examples`."""

    examples: list[Example]
    features: Sequence[Feature]
    sampler: WindowSampler  # deals the features out


@dataclass
class Job:
    """The parts of one run, as `train()` uses them. `summarizer` is None where evaluations measure the loss only."""

    recipe: Recipe
    runtime: Runtime
    bundle: ModelBundle
    learner: Learner
    rows: TrainingRows
    dev: evaluate.Split | None
    summarizer: Summarizer | None
    store: CheckpointStore
    tracker: Tracker
    state: TrainerState
    test_rows: int = 0  # decoded after the last update, so they count in the time left
    extras: Extras = field(default_factory=Extras)  # the user's metrics and callbacks

    def __post_init__(self) -> None:
        self.model, self.optimizer, self.schedule, self.scaler = self.learner
        self.examples, self.features, self.sampler = self.rows
        self.sampler.order = self.state.row_order
        self.run_dir = self.tracker.run_dir
        # The windows of its epochs, or the updates to be made where max_steps gives their number.
        self.planned = optim.total_updates(self.recipe.training, self.sampler.updates_per_epoch)
        self.supervised = [sum(label != IGNORE_INDEX for label in feature.labels) for feature in self.features]
        schedule = Schedule.of(
            self.recipe.evaluation,
            updates=self.planned,
            per_epoch=self.sampler.updates_per_epoch,
            dev_rows=0 if self.dev is None else len(self.dev.examples),
            test_rows=0 if self.summarizer is None else self.test_rows,
            by_epochs=self.recipe.training.max_steps is None,
        )
        self.progress = Progress(self.runtime, schedule, done=self.state.step, windows=self.windows_done)
        computes_here = self.runtime.device.type == "cpu"  # then a second thread would only take its time
        self.ahead = None if computes_here else Ahead(self._make_window, self._following)
        self.code = code_state()  # as it is loaded: the checkout may be another one when the run ends
        self.clock = time.perf_counter()
        self.told_share = False
        self.callbacks = self.extras.callbacks
        self.saving: int | None = None  # step of the save that `on_save` has not been told of

    def close(self) -> None:
        """Leave no bar on the terminal, no thread and no open file behind."""
        self.progress.close()
        if self.ahead is not None:
            self.ahead.close()
        self.tracker.close()

    # Where we are

    @property
    def windows_done(self) -> int:
        return self.state.epoch * self.sampler.updates_per_epoch + self.state.window

    @property
    def epoch(self) -> float:
        return self.windows_done / self.sampler.updates_per_epoch

    @property
    def finished(self) -> bool:
        if self.state.stop_reason is not None:
            return True
        if self.recipe.training.max_steps is not None:
            return self.state.step >= self.recipe.training.max_steps
        return self.windows_done >= self.planned

    # Data

    def load_window(self, epoch: int, index: int) -> Window:
        """This rank's micro-batches of one update. Beside a GPU, those of the next are made while it computes these."""
        return (self.ahead or self._make_window)(epoch, index)

    def _following(self, epoch: int, index: int) -> tuple[int, int]:
        return (epoch, index + 1) if index + 1 < self.sampler.updates_per_epoch else (epoch + 1, 0)

    def _make_window(self, epoch: int, index: int) -> Window:
        """With the counts of the whole update: arithmetic, no collective."""
        rows = self.sampler.global_window(epoch, index)
        together = sharding.is_sharded(self.model)  # then each pass over a layer is a meeting of all ranks
        batches = [self._collate(micro, rows) for micro in self.sampler.window(epoch, index, same_count=together)]
        cells, real = self.sampler.cells(epoch, index), self.sampler.parts[rows].sum(axis=0)
        return Window(
            batches=batches,
            tokens=sum(self.supervised[row] for row in rows),
            all_tokens=int(real.sum()),
            ids=[self.examples[self.features[row].index].id for row in rows],
            cells=tuple(cells.tolist()),
            padding=tuple((cells - real).tolist()),
        )

    def _collate(self, micro: list[int], rows: list[int]) -> dict[str, Tensor]:
        batch = self.bundle.collate([self.features[row] for row in micro or rows[:1]])
        if not micro:
            # The last window had no row left for this rank, which must still take part in the gradients' exchange: a row
            # with nothing supervised adds zero.
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return batch | {"supervised": supervised_positions(batch)}  # here, because a GPU would make this process wait

    # Logs

    def log_update(self, window: Window, update: Update) -> None:
        """Add the update to the current interval; every `logging_steps` updates, write a row."""
        state, training = self.state, self.recipe.training
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        state.interval_seconds += seconds
        state.train_seconds += seconds
        nonfinite.check_skipping(state, self.scaler, training)
        self.progress.update(state.step, window, update, seconds)
        state.interval_all_tokens += window.all_tokens
        state.interval_samples += len(window.ids)
        state.count_cells(window)
        if not update.applied:
            return
        state.interval_loss += update.loss * window.tokens
        state.interval_tokens += window.tokens
        if state.step % training.logging_steps == 0 or self.finished:
            self._write_train_row(window, update)

    def _write_train_row(self, window: Window, update: Update) -> None:
        state = self.state
        seconds = max(state.interval_seconds, 1e-9)
        row = {
            "split": "train",
            "step": state.step,
            "epoch": self.epoch,
            "loss": state.interval_loss / state.interval_tokens,
            "learning_rate": update.learning_rate,
            "grad_norm": update.grad_norm,
            "tokens_per_second": state.interval_all_tokens / seconds,
            "samples_per_second": state.interval_samples / seconds,
            "seconds": state.interval_seconds,
            "skipped_updates": state.skipped,
            **state.padding_shares(),
            "peak_memory_gib": measured_peak(self.runtime.device),
            "sample_ids_sha256": hashlib.sha256("\n".join(window.ids).encode()).hexdigest(),
        }
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        self.tracker.log_row(row)
        self.callbacks.call("on_log", row, state.step)
        log.debug("step %d  loss %.4f  grad_norm %.3f", state.step, row["loss"], update.grad_norm)
        state.interval_loss = state.interval_seconds = 0.0
        state.interval_tokens = state.interval_all_tokens = state.interval_samples = 0
        state.interval_source_cells = state.interval_target_cells = 0
        state.interval_source_padding = state.interval_target_padding = 0

    # Evaluation

    def evaluation_due(self, update: Update) -> bool:
        settings, state = self.recipe.evaluation, self.state
        if self.dev is None or settings.strategy == "no" or state.evaluated_step == state.step:
            return False
        if self.finished or (settings.strategy == "epoch" and state.window == 0):
            return True
        return settings.strategy == "steps" and update.applied and state.step % settings.steps == 0

    def evaluate(self) -> None:
        """Score the dev split, remember whether it is the best so far, count towards early stopping."""
        state, settings = self.state, self.recipe.evaluation
        self.progress.evaluating(state.step, self.dev.name, len(self.dev.examples))
        result = evaluate.evaluate(self.bundle, self.dev, self.runtime, settings, self.summarizer, self.extras.metrics)
        state.evaluation_seconds += result.metrics["seconds"]
        self.progress.evaluated(len(self.dev.examples), result.metrics["seconds"])
        for problem in result.problems:
            log.warning("step %d: %s", state.step, problem)
        self._compare_with_best(result.metrics.get(extra.key_of(settings.metric)))
        self._log_evaluation(result)
        self._tell_share()
        nonfinite.check_evaluation(result.metrics.get("loss"), state.step, self.scaler, self.recipe.training)
        self.clock = time.perf_counter()

    def _compare_with_best(self, value: float | None) -> None:
        """Is it the best so far, and is it time to stop? A tie keeps the earlier; a missing or NaN value is never best."""
        state, training, metric = self.state, self.recipe.training, self.recipe.evaluation.metric
        state.evaluated_step, state.evaluated_value = state.step, value
        state.evaluations_without_gain += 1
        if value is None or not math.isfinite(value):
            log.warning("evaluation.metric %s is %s at step %d; it cannot be the best", metric, value, state.step)
        else:
            sign = -1.0 if extra.less_is_better(metric) else 1.0
            gain = math.inf if state.best_value is None else sign * (value - state.best_value)
            if gain > training.early_stopping_threshold:
                state.evaluations_without_gain = 0
            if gain > 0:
                state.best_step, state.best_value = state.step, value
        patience = training.early_stopping_patience
        if patience is not None and state.evaluations_without_gain >= patience and not self.finished:
            state.stop_reason = f"no better {metric} in {patience} evaluations"
            log.info("stopping early at step %d: %s", state.step, state.stop_reason)

    def _log_evaluation(self, result: evaluate.Scores) -> None:
        row = {"split": self.dev.name, "step": self.state.step, "epoch": self.epoch} | result.metrics
        scored = self.runtime.is_main and result.rows
        row |= floors.keys_of(self.floors) if scored else {}
        self.tracker.log_row(row, best=self.state.best_step == self.state.step)
        self.callbacks.call("on_evaluation", row, self.state.step)
        if not scored:
            log.info("step %d  dev loss %.4f", self.state.step, row["loss"])
            return
        count = self.recipe.evaluation.num_samples
        samples = result.rows[:: max(1, len(result.rows) // max(1, count))][:count]
        write_predictions(self.run_dir / "predictions" / f"{self.dev.name}-step{self.state.step}.csv", result.rows)
        self.tracker.log_samples(self.state.step, samples)
        best = "  best so far" if self.state.best_step == self.state.step else ""
        log.info(
            "step %(step)d  epoch %(epoch).2f  dev loss %(loss).4f  ROUGE-1/2/L %(rouge1).2f / %(rouge2).2f / %(rougeL).2f"
            " (%(rouge_tokenizer)s)  cut at the length limit %(capped).0f%%  %(seconds).1f s%(best)s",
            row | {"capped": 100 * row["capped_rate"], "best": best},
        )
        for sample in samples[:1]:
            log.info("  reference:  %s", sample["reference"])
            log.info("  prediction: %s", sample["prediction"])
        if warning := floors.alike_warning(result.rows):
            log.warning("step %d: %s", self.state.step, warning)

    def _tell_share(self) -> None:
        """Once, where evaluations take more of the time than they should; a run of seconds is spared."""
        state = self.state
        if self.told_share or state.evaluation_share <= _MOST_EVALUATION or state.evaluation_seconds < _SPARED:
            return
        self.told_share = True
        log.warning(
            "evaluations take %.0f%% of the time so far: evaluation.max_samples (rows), evaluation.strategy and "
            "evaluation.steps (how often), generation.num_beams and generation.max_new_tokens lower it",
            100 * state.evaluation_share,
        )

    def time_shares(self) -> dict[str, float] | None:
        """What the time of a profiled run went to, by phase, on the main rank; None of others."""
        return None

    @cached_property
    def floors(self) -> dict[str, Any]:
        """What the dev scores are held against; seconds of work, so on the main rank only, and once."""
        summaries = [text for example in self.examples for text in example.references]
        tokenizer = self.recipe.evaluation.rouge_tokenizer
        found = floors.measure(summaries, self.dev.dialogues, self.dev.references, tokenizer)
        constant = found["constant"]
        log.info("baselines on the %d dev rows: %s", len(self.dev.examples), floors.in_words(found))
        log.info("  that sentence, of %d from the training summaries: %s", constant["candidates"], constant["text"])
        return found

    # Saving

    def save_due(self, update: Update) -> bool:
        checkpoint, state = self.recipe.checkpoint, self.state
        if state.saved_step == state.step:
            return False
        if self.finished or state.best_step == state.step or (checkpoint.strategy == "epoch" and state.window == 0):
            return True
        return checkpoint.strategy == "steps" and update.applied and state.step % checkpoint.steps == 0

    def save(self) -> None:
        """Write checkpoint-<step>: the model as a plain folder, and everything a resume needs."""
        state, metric = self.state, self.recipe.evaluation.metric
        if state.saved_step == state.step:
            return
        self.tell_saved()
        nonfinite.check_weights(self.bundle.model, state.step)
        self.tracker.sync()
        state.saved_step = state.step
        known = state.best_step is not None
        scored = state.evaluated_step == state.step and state.evaluated_value is not None
        spool = Spool(self.run_dir)
        keep = spool.keep if sharding.is_sharded(self.model) else None

        def gather() -> dict[str, Tensor]:
            live = weights_of(self.bundle.model, keep)
            spool.check()
            return live

        self.store.save(
            state.step,
            EngineState(
                position=state.to_dict(),
                best={"step": state.best_step, "metric": metric, "value": state.best_value} if known else None,
                rng=self.runtime.random_state(),
                **self.learner.states(keep),
            ),
            weights=gather,
            write_model=lambda folder, weights: save_model(self.bundle, folder, state_dict=weights),
            metrics={metric: state.evaluated_value} if scored and math.isfinite(state.evaluated_value) else None,
        )
        self.saving = state.step
        self.clock = time.perf_counter()

    def tell_saved(self, *, wait: bool = True) -> None:
        """Tell callbacks of the save under way once it is whole. With `wait`, all ranks together join it first."""
        if wait:
            self.store.wait()
        whole = self.saving is not None and self.callbacks.objects
        if whole and (path := self.run_dir / f"checkpoint-{self.saving}").is_dir():
            step, self.saving = self.saving, None
            self.callbacks.call("on_save", path, step)

    # Signals

    def answer_signals(self) -> None:
        """Between two updates: SIGUSR1 saves and goes on; SIGTERM, SIGINT and a callback that failed save and stop. All ranks
        answer alike."""
        self.runtime.status.step = self.state.step
        self.tell_saved(wait=False)
        request = self.runtime.requests()
        if request == signals.NOTHING or self.finished:
            return
        self.save()
        if request == signals.STOP:
            saved = self.store.wait()
            self.tell_saved(wait=False)
            self.end_if_failed(
                f"checkpoint-{self.state.step} is saved" if saved else "earlier checkpoints are untouched"
            )
            self.runtime.stop(saved=saved)

    def end_if_failed(self, safe: str) -> None:
        """Raises: EngineError E2.85, on all ranks, where a callback has failed on the main one."""
        self.runtime.ranks.agree(self.callbacks.failed(safe), "callbacks")
