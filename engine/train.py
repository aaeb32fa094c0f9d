"""Train: a recipe and its overrides in, a run folder out.

    accelerate launch engine/train.py recipes/kobart.yaml [section.key=value ...] [--resume auto|PATH]

`train()` and `train_step()` are the training loop of every model family, in full. What differs between families is data:
the collator and the model that `models.build` returns.

Words: a *window* is the micro-batches of one update; a *step* is an optimizer update that was really made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a script, Python puts engine/ itself on the path, where the package cannot be found.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from engine.recipe.schema import Recipe, Training
    from engine.runtime.process import Runtime
    from engine.scoring.extra import Metric
    from engine.training.job import Job
    from engine.training.state import Update, Window

_EXAMPLES = """\
examples:
  %(prog)s quickstart                                     a tiny model, from nothing to scores
  %(prog)s recipes/kobart.yaml --dry-run                  read the data, count updates and memory
  %(prog)s recipes/kobart.yaml training.learning_rate=5e-5
  %(prog)s recipes/kobart.yaml --resume auto experiment.output_dir=RUN
  accelerate launch engine/train.py recipes/kobart.yaml   on several GPUs

Writes experiments/<day>/<time>_<name>/, or experiment.output_dir: checkpoints, metrics, predictions, final_model/.
SIGTERM and Ctrl-C save and end with 75, SIGUSR1 saves and goes on. Other exit codes: README.md."""


def train(job: Job) -> None:
    """Run windows until the recipe's end, evaluating, saving and logging on the way."""
    state, recipe = job.state, job.recipe
    while not job.finished:
        window = job.load_window(state.epoch, state.window)
        update = train_step(job.model, window, job.optimizer, job.schedule, job.scaler, job.runtime, recipe.training)
        state.advance(window, update, updates_per_epoch=job.sampler.updates_per_epoch)
        job.log_update(window, update)

        if job.evaluation_due(update):
            job.evaluate()
        if job.save_due(update):
            job.save()
        job.answer_signals()


def train_step(
    model: nn.Module,
    window: Window,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    runtime: Runtime,
    training: Training,
) -> Update:
    """One optimizer update: forward and backward over the window's micro-batches, clip, check, step.

    The summed loss is divided by the supervised tokens of the whole window over all ranks, so the gradient does not depend
    on how the window was cut into micro-batches and ranks. Under fp16 the scaler skips an update whose gradients overflowed
    and the schedule stands still; under fp32 and bf16 the scaler is disabled and passes everything through.
    """
    import torch

    from engine.loss.cross_entropy import summed_cross_entropy
    from engine.models.sharding import full
    from engine.training.nonfinite import check_finite
    from engine.training.state import Update

    loss_sum = torch.zeros((), device=runtime.device)
    for micro_step, batch in enumerate(window.batches, start=1):
        last = micro_step == len(window.batches)
        with nullcontext() if last else runtime.accelerator.no_sync(model):
            with runtime.autocast():
                micro_loss = summed_cross_entropy(
                    model, runtime.to_device(batch), label_smoothing=training.label_smoothing
                )
            # Ranks average their gradients, sharded or not; the world size turns the average back into a sum.
            scaler.scale(micro_loss * (runtime.world_size / max(1, window.tokens))).backward()
        loss_sum += micro_loss.detach()

    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = full(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or float("inf")))
    loss = runtime.ranks.sum_across_ranks(loss_sum) / max(1, window.tokens)
    # The one wait for the device in an update: both numbers decide whether the weights may be touched at all. The norm of
    # gradients that are offloaded is on the host.
    loss, norm = torch.stack((loss.float(), grad_norm.float().to(loss.device))).tolist()

    sound = check_finite(loss, norm, window, scaler, training)
    learning_rate = schedule.get_last_lr()[0]
    scale = scaler.get_scale()
    if sound:
        scaler.step(optimizer)
    scaler.update()
    applied = sound and scaler.get_scale() >= scale  # the scale falls exactly when the scaler met an overflow
    if applied:
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(loss, norm, learning_rate, applied)


def run(
    recipe: Recipe,
    *,
    resume: str | None = None,
    allow_change: Sequence[str] = (),
    dry_run: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Any] = (),
    allow_code: bool = False,
) -> dict[str, Any]:
    """Train as the recipe says and return what `results.json` holds.

    Args:
        resume: "auto" continues the run folder's newest valid checkpoint, if there is one; a path names one.
        allow_change: recipe keys (or `world_size`) that may differ from the checkpoint's.
        dry_run: stop after the first batch and return the plan: updates, tokens, parameters, memory. Writes nothing.
        metrics: scores of your own by name, as engine/scoring/extra.py describes them; `evaluation.metric: max:NAME` or
            `min:NAME` lets one choose the best checkpoint.
        callbacks: objects with some of the methods on_log(row), on_evaluation(row), on_save(path) and on_end(results); called
            on the main rank only.
        allow_code: import what the recipe's `evaluation.extra_metrics` names.

    Raises:
        EngineError: with the exit code of the command line in `.exit_code`.
    """
    from engine.evaluation.extras import Extras
    from engine.runtime.process import start
    from engine.training import finish, setup

    with start(recipe) as runtime:
        extras = Extras.of(recipe, runtime, metrics or {}, callbacks, allow_code=allow_code)
        if dry_run:
            return setup.dry_run(recipe, runtime)
        folder = runtime.open_run(recipe, resume)
        if folder.finished:
            return finish.already_complete(folder.path, runtime)
        # Bad rows and metrics are told before minutes go into loading a model.
        splits = setup.read_splits(recipe, runtime, extras.metrics)
        with setup.prepare(recipe, runtime, folder, splits, resume, allow_change, extras) as job:
            train(job)
            return finish.write_results(job, splits.test)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see README.md for what it prints and its exit codes."""
    options = parse(arguments)

    from engine.recipe.dump import print_recipe
    from engine.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, debug=options.debug)
    if options.print_recipe:
        print(print_recipe(recipe), end="")
        return 0
    names = ("resume", "allow_change", "dry_run", "allow_code")
    run(recipe, **{name: getattr(options, name) for name in names})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from engine.recipe.flags import parse_options

    parser = argparse.ArgumentParser(
        prog="engine/train.py",
        description="Fine-tune a Korean dialogue summariser as a recipe describes it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a file, or the name of a recipe in recipes/: kobart")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that win over the recipe's"
    )
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="continue a run: its newest valid checkpoint, or that one"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="with --resume: a key that may differ from the checkpoint's",
    )
    parser.add_argument(
        "--debug", action="store_true", help="lay recipes/base/debug.yaml over the recipe: minutes, not hours"
    )
    parser.add_argument("--dry-run", action="store_true", help="stop before the first update; print the plan")
    parser.add_argument(
        "--print-recipe", action="store_true", help="print the resolved recipe with each value's origin"
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="import the functions that evaluation.extra_metrics names"
    )
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    return parse_options(parser, arguments)


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
