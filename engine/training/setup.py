"""From a recipe to a job that is ready to train: data read and checked, model built, everything connected, state resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoints.identity import identity_of
from engine.checkpoints.store import CheckpointStore, refusing
from engine.data import encode, rows
from engine.data.feature_cache import FeatureCache
from engine.errors import EngineError
from engine.evaluation.evaluate import NO_METRICS, Split, try_metrics, try_scoring
from engine.evaluation.extras import Extras
from engine.models import adapters, sharding, tokenization, weights
from engine.models.build import build_model
from engine.prediction.summarizer import Summarizer
from engine.recipe.dump import dump
from engine.reporting.tracking import Tracker
from engine.runtime.atomic import write_text_atomically
from engine.runtime.faults import first_line
from engine.training import distribution, memory, optim, unused
from engine.training.batch_size import plan_line, window_sampler, with_fitting_batch
from engine.training.blueprint import blueprint
from engine.training.job import Job, Learner, TrainingRows
from engine.training.profiling import ProfiledJob
from engine.training.state import TrainerState

if TYPE_CHECKING:
    from torch import nn

    from engine.data.encode import Feature, TextEncoder
    from engine.data.rows import Example
    from engine.data.windows import WindowSampler
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Recipe
    from engine.runtime.process import Runtime
    from engine.runtime.run_folder import RunFolder
    from engine.scoring.extra import Metric

log = logging.getLogger("engine.train")


@dataclass(frozen=True)
class Splits:
    """The rows of a run. Only the training split must be there."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


def read_splits(recipe: Recipe, runtime: Runtime, metrics: Mapping[str, Metric] = NO_METRICS) -> Splits:
    """Read and check every file of the recipe, and try the user's metrics. Raises: EngineError E3 naming file and row."""
    settings = recipe.data

    def read(file: str, limit: int | None, *, require_summary: bool = True) -> list[Example]:
        return rows.read_examples(file, settings, require_summary=require_summary, limit=limit)

    dev, test = [], []
    with runtime.ranks.together("reading data"):
        train = read(settings.train_file, settings.max_train_samples)
        if settings.validation_file is not None and recipe.evaluation.strategy != "no":
            dev = read(settings.validation_file, settings.max_validation_samples)
            rows.check_splits(train, dev, allow_overlap=settings.allow_overlap)
        if settings.test_file is not None:
            test = read(settings.test_file, settings.max_test_samples, require_summary=False)
        scored = dev or (test if all(row.references for row in test) else [])
        if scored and recipe.evaluation.generate:
            try_scoring(recipe.evaluation.rouge_tokenizer)
            try_metrics(metrics, scored, runtime)
    # The other splits are part of the identity, which is compared later.
    runtime.ranks.require_equal({"data.test_file": rows.rows_fingerprint(test)})
    return Splits(train, dev, test)


@contextmanager
def prepare(
    recipe: Recipe,
    runtime: Runtime,
    folder: RunFolder,
    splits: Splits,
    resume: str | None,
    allow_change: Sequence[str],
    extras: Extras,
) -> Iterator[Job]:
    """Build the job. Leaving the context joins background saves and closes the trackers, also after an error.

    What a run computes depends on the order of these steps; each says what it must come before or after.
    """
    sharded = distribution.sharded(recipe, runtime)
    bundle = distribution.build(recipe, runtime, sharded=sharded)
    encoder = bundle.text_encoder()
    with runtime.ranks.together("tokenising"):
        cache = FeatureCache(encoder, keep=recipe.data.cache)
        features = cache.training(splits.train, augment=recipe.data.instruction_augmentation)
        dev = Split.of("dev", splits.dev, cache).subset(recipe.evaluation.max_samples) if splits.dev else None
    bundle.model.train()  # from_pretrained returns it in eval mode, without dropout
    if sharded:
        distribution.shard(bundle, recipe, runtime)
    with runtime.ranks.together("trying one row"):
        irregular = unused.keep_out(bundle, features, runtime)
    model = distribution.wrap(bundle.model, runtime, irregular=irregular)

    # Sampler, the checkpoint's identity and recipe.yaml must all know the batch that is trained, so it is tried first.
    if recipe.training.auto_batch_size:
        recipe = with_fitting_batch(recipe, model, bundle, features, runtime)
    sampler = window_sampler(recipe, features, world_size=runtime.world_size, rank=runtime.rank)
    _log_plan(recipe, bundle, features, encoder, sampler)

    runtime.seed_ranks(recipe.training.seed)  # dropout may differ from rank to rank, now that the weights are drawn
    learner = _learner(recipe, runtime, bundle, model, sampler.updates_per_epoch)
    summarizer = _summarizer(recipe, bundle, encoder)
    with _store(recipe, runtime, folder.path, bundle, splits, allow_change) as store:
        # A checkpoint fills parts that must exist, and is only taken where their identity is the one it was saved under.
        found = store.find_resume(resume) if resume else None
        state, random_state = _load(store, found, bundle, learner) if found else (TrainerState(), None)
        # Only now: a resume that is refused leaves the recipe of the earlier attempt as it was.
        with runtime.ranks.together("writing recipe.yaml"):
            if runtime.is_main:
                write_text_atomically(folder.path / "recipe.yaml", dump(recipe))
        # An earlier attempt may have logged rows past the checkpoint, or before there was any: they are trained again.
        logged_until = state.step if found or folder.reused else None
        tracker = Tracker(folder.path, runtime.accelerator, recipe, logged_until, [*extras.metrics])
        parts = (recipe, runtime, bundle, learner, TrainingRows(splits.train, features, sampler), dev, summarizer)
        kind = ProfiledJob if recipe.runtime.profile and runtime.is_main else Job
        job = kind(*parts, store, tracker, state, test_rows=len(splits.test), extras=extras)
        if random_state is not None:
            with refusing(found):
                runtime.restore_random_state(random_state)  # last: nothing from here to the first update may draw
        runtime.signals.enter_loop()
        try:
            yield job
        finally:
            job.close()


def _load(
    store: CheckpointStore, found: Path, bundle: ModelBundle, learner: Learner
) -> tuple[TrainerState, dict[str, Any] | None]:
    """Give model and learner their saved states back; the trainer's counters, and the random streams for later.

    Raises: EngineError E5.8 for states that these parts cannot have had.
    """
    saved = store.load_state(found)
    with refusing(found):
        weights.load_weights(bundle.model, found)
        learner.load_states(saved)
        state = TrainerState.from_dict(saved.position).with_best(saved.best)
    log.info("resumed at step %d from %s", state.step, found)
    return state, saved.rng


def _learner(
    recipe: Recipe, runtime: Runtime, bundle: ModelBundle, model: nn.Module, updates_per_epoch: int
) -> Learner:
    fused = optim.may_fuse(model, runtime.precision, runtime.device)
    optimizer = optim.build_optimizer(parameter_groups(recipe, bundle), recipe.training, runtime.device, fused=fused)
    total = optim.total_updates(recipe.training, updates_per_epoch)
    return Learner(model, optimizer, optim.build_schedule(optimizer, recipe.training, total), runtime.scaler())


def parameter_groups(recipe: Recipe, bundle: ModelBundle) -> list[dict[str, Any]]:
    if recipe.lora.loraplus_lr_ratio is None:
        return optim.parameter_groups(bundle.model, recipe.training.weight_decay)
    return adapters.loraplus_groups(
        bundle.model,
        learning_rate=recipe.training.learning_rate,
        weight_decay=recipe.training.weight_decay,
        loraplus_lr_ratio=recipe.lora.loraplus_lr_ratio,
    )


def _summarizer(recipe: Recipe, bundle: ModelBundle, encoder: TextEncoder) -> Summarizer | None:
    if not recipe.evaluation.generate:
        return None
    return Summarizer(bundle, encoder, recipe.generation, batch_size=recipe.evaluation.per_device_eval_batch_size)


def _store(
    recipe: Recipe, runtime: Runtime, run_dir: Path, bundle: ModelBundle, splits: Splits, allow_change: Sequence[str]
) -> CheckpointStore:
    facts = {"train": rows.rows_fingerprint(splits.train), "dev": rows.rows_fingerprint(splits.dev)}
    identity = identity_of(
        recipe,
        data=facts,
        tokenizer=tokenization.tokenizer_fingerprint(bundle.tokenizer),
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
        copied=sharding.is_sharded(bundle.model),
    )


def dry_run(recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    """Everything up to the first batch, and what the run would cost, printed and returned."""
    splits = read_splits(recipe, runtime)
    estimate = _estimate(recipe, runtime, sharded=distribution.sharded(recipe, runtime))
    if runtime.is_main and estimate is not None:
        print(memory.table(estimate, runtime.device), flush=True)  # before the model is loaded, which may not fit
    bundle = blueprint(recipe, device=runtime.device, precision=runtime.precision)
    bundle = bundle or build_model(recipe, device=runtime.device, precision=runtime.precision)
    encoder = bundle.text_encoder()
    features = encode.encode_all(encoder, splits.train, augment=recipe.data.instruction_augmentation)
    sampler = window_sampler(recipe, features, world_size=runtime.world_size, rank=runtime.rank)
    _log_plan(recipe, bundle, features, encoder, sampler)
    # Where there are more ranks than rows, one gets a row of another, as in training.
    micro = sampler.window(0, 0)[0] or sampler.global_window(0, 0)[:1]
    first = bundle.collate([features[row] for row in micro])
    counts = {
        "parameters": bundle.report["parameters"],
        "trainable_parameters": bundle.report["trainable_parameters"],
        "updates": optim.total_updates(recipe.training, sampler.updates_per_epoch),
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


def _estimate(recipe: Recipe, runtime: Runtime, *, sharded: bool) -> dict[str, Any] | None:
    """`memory.estimate`; None, with a line, for a model whose own code does not run on shapes alone."""
    ranks = {"device": runtime.device, "world_size": runtime.world_size, "sharded": sharded}
    try:
        return memory.estimate(recipe, precision=runtime.precision, **ranks)
    except Exception as error:
        if isinstance(error, EngineError) or not recipe.model.trust_remote_code:
            raise
        log.warning("no memory estimate: the model's own code does not run on shapes alone (%s)", first_line(error))
        return None


def _log_plan(
    recipe: Recipe, bundle: ModelBundle, features: Sequence[Feature], encoder: TextEncoder, sampler: WindowSampler
) -> None:
    report = bundle.report
    numbers = ("parameters", "trainable_parameters", "vocabulary_before", "vocabulary")
    log.info(
        "%s (%s): %s parameters, %s trainable; vocabulary %s -> %s; %s on %s",
        recipe.model.name_or_path or report["model_type"],
        bundle.family,
        *(f"{report[name]:,}" for name in numbers),
        report["precision"],
        report["device"],
    )
    for line in [*encode.length_report(features, encoder)["text"].splitlines(), plan_line(sampler)]:
        log.info("%s", line)
