"""From a recipe to a job that is ready to train: data read and checked, model built, everything connected, state resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoints.identity import identity_of
from engine.checkpoints.store import CheckpointStore, EngineState
from engine.data import encode, rows
from engine.data.windows import WindowSampler
from engine.errors import EngineError
from engine.models import adapters, build, tokenization, weights
from engine.prediction.summarizer import Summarizer
from engine.recipe.dump import dump
from engine.training import optim
from engine.training.batch_size import with_fitting_batch
from engine.training.evaluation import Split
from engine.training.job import Job
from engine.training.state import TrainerState
from engine.training.tracking import Tracker

if TYPE_CHECKING:
    from engine.data.encode import Feature, TextEncoder
    from engine.data.rows import Example
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Recipe
    from engine.runtime.process import Runtime
    from engine.runtime.run_folder import RunFolder

log = logging.getLogger("engine.train")


@dataclass(frozen=True)
class Splits:
    """The rows of a run. Only the training split must be there."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


def read_splits(recipe: Recipe, runtime: Runtime) -> Splits:
    """Read and check every file of the recipe. Raises: EngineError E3 naming file and row."""
    settings = recipe.data
    if settings.train_file is None:
        raise EngineError("E2.21", "there is nothing to train on", "data.train_file", "set data.train_file")
    evaluating = settings.validation_file is not None and recipe.evaluation.strategy != "no"
    dev: list[Example] = []
    test: list[Example] = []
    with runtime.together("reading data"):
        train = rows.read_examples(
            settings.train_file, settings, require_summary=True, limit=settings.max_train_samples
        )
        if evaluating:
            limit = settings.max_validation_samples
            dev = rows.read_examples(settings.validation_file, settings, require_summary=True, limit=limit)
        if settings.test_file is not None:
            limit = settings.max_test_samples
            test = rows.read_examples(settings.test_file, settings, require_summary=False, limit=limit)
        if dev:
            rows.check_splits(train, dev, allow_overlap=settings.allow_overlap)
    return Splits(train, dev, test)


@contextmanager
def prepare(
    recipe: Recipe, runtime: Runtime, folder: RunFolder, splits: Splits, resume: str | None, allow_change: Sequence[str]
) -> Iterator[Job]:
    """Build the job. Leaving the context joins background saves and closes the trackers, also after an error."""
    with runtime.together("building the model"):
        bundle = build.build_model(recipe, device=runtime.device, precision=runtime.precision)
    encoder = bundle.text_encoder()
    with runtime.together("tokenising"):
        features = encode.encode_all(encoder, splits.train, augment=recipe.data.instruction_augmentation)
        dev = split_of("dev", splits.dev, encoder) if splits.dev else None
    model = runtime.accelerator.prepare(bundle.model.train())  # from_pretrained hands out eval mode: no dropout
    if recipe.training.auto_batch_size:
        recipe = with_fitting_batch(recipe, model, bundle, features, runtime)
    if runtime.is_main:
        (folder.path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    _report(recipe, bundle, features, encoder)
    runtime.seed_ranks(recipe.training.seed)

    sampler = _sampler(recipe, runtime, features)
    total = total_windows(recipe, sampler.updates_per_epoch)
    optimizer = optim.build_optimizer(parameter_groups(recipe, bundle), recipe.training, runtime.device)
    schedule = optim.build_schedule(optimizer, recipe.training, total)
    scaler = runtime.scaler()
    store = _store(recipe, runtime, folder.path, bundle, splits, allow_change)
    state, random_state = TrainerState(), None
    with store:
        found = store.find_resume(resume) if resume else None
        if found is not None:
            saved = store.load_state(found)
            weights.load_weights(bundle.model, found)
            state, random_state = _restore(saved, found, optimizer, schedule, scaler), saved.rng
            log.info("resumed at step %d from %s", state.step, found)
        tracker = Tracker(folder.path, runtime.accelerator, recipe, _resumed_step(found, state, folder))
        job = Job(
            recipe=recipe,
            runtime=runtime,
            run_dir=folder.path,
            bundle=bundle,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            scaler=scaler,
            sampler=sampler,
            examples=splits.train,
            features=features,
            dev=None if dev is None else dev.subset(recipe.evaluation.max_samples),
            summarizer=summarizer_of(recipe, bundle, encoder) if recipe.evaluation.generate else None,
            store=store,
            tracker=tracker,
            total_windows=total,
            state=state,
        )
        if random_state is not None:
            runtime.restore_random_state(random_state)  # last: nothing between here and the first update may draw
        runtime.signals.enter_loop()
        try:
            yield job
        finally:
            job.progress.close()
            tracker.close()


def _restore(saved: EngineState, found: Path, optimizer: Any, schedule: Any, scaler: Any) -> TrainerState:
    """Give the parts their saved states back. Raises: EngineError E5.8 for states that these parts cannot have had."""
    try:
        optimizer.load_state_dict(saved.optimizer)
        schedule.load_state_dict(saved.scheduler)
        scaler.load_state_dict(saved.scaler)
        return TrainerState.from_dict(saved.position)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        what = f"the saved state does not fit this run: {error}"
        raise EngineError("E5.8", what, str(found), "resume with the recipe it was saved by") from error


def split_of(name: str, examples: list[Example], encoder: TextEncoder) -> Split:
    """A split for evaluation: prompts to decode, and targets where every row has a reference."""
    prompts = [encoder.prompt_feature(example, index) for index, example in enumerate(examples)]
    scored = all(example.references for example in examples)
    targets = [encoder.training_feature(example, index) for index, example in enumerate(examples)] if scored else None
    return Split(name, examples, prompts, targets)


def summarizer_of(recipe: Recipe, bundle: ModelBundle, encoder: TextEncoder) -> Summarizer:
    return Summarizer(
        bundle,
        encoder,
        recipe.generation,
        batch_size=recipe.evaluation.per_device_eval_batch_size,
    )


def parameter_groups(recipe: Recipe, bundle: ModelBundle) -> list[dict[str, Any]]:
    if recipe.lora.loraplus_lr_ratio is None:
        return optim.parameter_groups(bundle.model, recipe.training.weight_decay)
    return adapters.loraplus_groups(
        bundle.model,
        learning_rate=recipe.training.learning_rate,
        weight_decay=recipe.training.weight_decay,
        loraplus_lr_ratio=recipe.lora.loraplus_lr_ratio,
    )


def total_windows(recipe: Recipe, updates_per_epoch: int) -> int:
    """Updates the schedule is laid out for: `max_steps`, or the epochs' windows."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    return max(1, math.ceil(recipe.training.num_train_epochs * updates_per_epoch))


def _sampler(recipe: Recipe, runtime: Runtime, features: list[Feature]) -> WindowSampler:
    training = recipe.training
    return WindowSampler(
        [feature.length for feature in features],
        micro_batch_size=training.per_device_train_batch_size,
        accumulation_steps=training.gradient_accumulation_steps,
        world_size=runtime.world_size,
        rank=runtime.rank,
        seed=training.seed,
        strategy=recipe.data.batching,
    )


def _store(
    recipe: Recipe, runtime: Runtime, run_dir: Path, bundle: ModelBundle, splits: Splits, allow_change: Sequence[str]
) -> CheckpointStore:
    facts = {"train": rows.fingerprint(splits.train), "dev": rows.fingerprint(splits.dev)}
    identity = identity_of(
        recipe,
        data=facts,
        tokenizer=tokenization.fingerprint(bundle.tokenizer),
        base=bundle.base.to_dict(),
        world_size=runtime.world_size,
    )
    runtime.ranks.require_equal(identity)
    return CheckpointStore(
        run_dir,
        runtime,
        save_total_limit=recipe.checkpoint.save_total_limit,
        sync=recipe.checkpoint.sync,
        on_error=recipe.checkpoint.on_save_error,
        identity=identity,
        allow_change=tuple(allow_change),
    )


def _resumed_step(found: Path | None, state: TrainerState, folder: RunFolder) -> int | None:
    if found is not None:
        return state.step
    return 0 if folder.reused else None


def plan(recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    """The dry run: everything up to the first batch, and what the run would cost, printed and returned."""
    from engine.models import memory

    splits = read_splits(recipe, runtime)
    estimate = memory.estimate(
        recipe, precision=runtime.precision, device=runtime.device, world_size=runtime.world_size
    )
    if runtime.is_main:
        print(memory.table(estimate, runtime.device), flush=True)  # before the model is loaded, which may not fit
    bundle = build.build_model(recipe, device=runtime.device, precision=runtime.precision)
    encoder = bundle.text_encoder()
    features = encode.encode_all(encoder, splits.train, augment=recipe.data.instruction_augmentation)
    sampler = _sampler(recipe, runtime, features)
    _report(recipe, bundle, features, encoder)
    first = bundle.collate([features[row] for row in sampler.window(0, 0)[0]])
    counts = {
        "parameters": bundle.report["parameters"],
        "trainable_parameters": bundle.report["trainable_parameters"],
        "updates": total_windows(recipe, sampler.updates_per_epoch),
        "updates_per_epoch": sampler.updates_per_epoch,
        "tokens_per_epoch": sum(feature.length for feature in features),
    }
    shapes = {name: list(tensor.shape) for name, tensor in first.items()}
    if runtime.is_main:
        for key, value in counts.items():
            print(f"{key.replace('_', ' ')}: {value:,}")
        print("first batch:", ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()))
        print("dry run: nothing was trained or written")
    return counts | {"first_batch": shapes, "memory": estimate}


def _report(recipe: Recipe, bundle: ModelBundle, features: list[Feature], encoder: TextEncoder) -> None:
    report = bundle.report
    log.info(
        "%s (%s): %s parameters, %s trainable; vocabulary %s -> %s; %s on %s",
        recipe.model.name_or_path or report["model_type"],
        bundle.family,
        f"{report['parameters']:,}",
        f"{report['trainable_parameters']:,}",
        f"{report['vocabulary_before']:,}",
        f"{report['vocabulary']:,}",
        report["precision"],
        report["device"],
    )
    for line in encode.length_report(features, encoder)["text"].splitlines():
        log.info("%s", line)
