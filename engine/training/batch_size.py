"""How many rows an update has and how they become micro-batches; the micro-batch that fits, found before the first update."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from engine.data.windows import WindowSampler
from engine.errors import EngineError
from engine.loss.cross_entropy import summed_cross_entropy
from engine.runtime.exits import classify

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from engine.data.encode import Feature
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Recipe
    from engine.runtime.process import Runtime

log = logging.getLogger("engine.train")


def window_sampler(recipe: Recipe, features: Iterable[Feature], *, world_size: int = 1, rank: int = 0) -> WindowSampler:
    """The recipe's windows over these features."""
    return WindowSampler(
        [feature.parts for feature in features],
        micro_batch_size=recipe.training.per_device_train_batch_size,
        accumulation_steps=recipe.training.gradient_accumulation_steps,
        world_size=world_size,
        rank=rank,
        seed=recipe.training.seed,
        strategy=recipe.data.batching,
        tokens_per_batch=token_budget(recipe),
    )


def token_budget(recipe: Recipe) -> int | None:
    """Most cells of one micro-batch on one device; None where micro-batches are of so many rows."""
    data = recipe.data
    if data.batching != "tokens":
        return None
    longest = data.max_source_length + data.max_target_length
    return data.tokens_per_batch or recipe.training.per_device_train_batch_size * longest


def longest_rows(recipe: Recipe) -> int:
    """Rows of greatest length that one micro-batch on one device holds."""
    training, budget = recipe.training, token_budget(recipe)
    if budget is None:
        return training.per_device_train_batch_size
    held = budget // (recipe.data.max_source_length + recipe.data.max_target_length)
    return max(1, min(held, training.per_device_train_batch_size * training.gradient_accumulation_steps))


def plan_line(sampler: WindowSampler) -> str:
    """Rows of an update and the padding of the first epoch, in words."""
    budget = sampler.tokens_per_batch
    cut = "" if budget is None else f", in micro-batches of at most {budget:,} tokens"
    shares = [f"{100 * share:.1f} %" for share in sampler.padding(0)]
    padding = shares[0] if len(shares) == 1 else "{} of source and {} of target tokens".format(*shares)
    return f"each update trains on {sampler.window_size:,} rows{cut}; padding: {padding}"


def with_fitting_batch(
    recipe: Recipe, model: nn.Module, bundle: ModelBundle, features: Sequence[Feature], runtime: Runtime
) -> Recipe:
    """The recipe with the largest micro-batch whose forward and backward pass fits, and the accumulation that keeps the
    effective batch. Tried on rows of which no others make a larger batch. All ranks agree at each try.

    Raises:
        EngineError: E8 where not even one row fits.
    """
    training = recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    micro = training.per_device_train_batch_size
    longest, single = _longest(features, micro)
    while not _fits(model, bundle, longest[:micro] if micro > 1 else [single], runtime, training.label_smoothing):
        if micro == 1:
            what = f"a single row of {single.length} tokens does not fit in memory"
            advice = "set training.gradient_checkpointing=true or lower data.max_source_length"
            raise EngineError("E8.2", what, "training.auto_batch_size", advice)
        micro = largest_divisor(rows, below=micro // 2 + 1)
        log.warning("out of memory: trying micro-batches of %d rows", micro)
    found = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    log.info("auto_batch_size: %d rows x %d accumulated", micro, rows // micro)
    # Recorded as plain settings: a rerun or a resume of this recipe trains the same updates without trying again.
    settings = training.model_copy(update=found | {"auto_batch_size": False})
    return recipe.model_copy(update={"training": settings})


def _longest(features: Sequence[Feature], count: int) -> tuple[list[Feature], Feature]:
    """`count` rows, and one alone, that are padded to no less than any others: source and target are padded apart, so
    the longest of each come first, and the one alone is made of both."""
    parts = np.array([feature.parts for feature in features])  # (N, P)
    widest, longest = parts.argmax(axis=0).tolist(), np.argsort(-parts.sum(axis=1), kind="stable").tolist()
    rows = [features[at] for at in list(dict.fromkeys([*widest, *longest]))[:count]]
    return rows, replace(features[widest[0]], labels=features[widest[-1]].labels)


def largest_divisor(number: int, *, below: int) -> int:
    """The largest divisor of `number` that is smaller than `below`."""
    return max(divisor for divisor in range(1, max(2, below)) if number % divisor == 0)


def _fits(model: nn.Module, bundle: ModelBundle, rows: list[Feature], runtime: Runtime, label_smoothing: float) -> bool:
    """Whether one micro-batch's forward and backward pass fits on every rank; leaves gradients and random streams alone."""
    random_state = runtime.random_state()
    failed = False
    try:
        with runtime.accelerator.no_sync(model):  # a rank that fails must not leave others waiting for its gradients
            with runtime.autocast():
                loss = summed_cross_entropy(
                    model, runtime.to_device(bundle.collate(rows)), label_smoothing=label_smoothing
                )
            loss.backward()
            del loss
    except (RuntimeError, MemoryError) as error:
        if classify(error).exit_code != 8:
            raise
        failed = True
    bundle.model.zero_grad(set_to_none=True)
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    runtime.restore_random_state(random_state)
    return not runtime.ranks.any_rank(failed)
