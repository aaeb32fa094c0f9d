"""How the ranks of a run hold the model: each a whole copy (DistributedDataParallel), or each a part (FSDP2)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.errors import EngineError
from engine.models import sharding
from engine.models.build import build_model
from engine.recipe.rules import sharding_obstacles
from engine.runtime.faults import first_line
from engine.training import memory

if TYPE_CHECKING:
    from engine.models.bundle import ModelBundle
    from engine.recipe.schema import Recipe
    from engine.runtime.process import Runtime

log = logging.getLogger("engine.train")


def sharded(recipe: Recipe, runtime: Runtime) -> bool:
    """Whether this run shards its model: where the recipe says so, or where `auto` finds that no copy would fit."""
    wanted = recipe.distributed.strategy
    if runtime.world_size == 1 or wanted == "ddp":
        if wanted == "fsdp":
            log.info("distributed.strategy is fsdp: one rank has nobody to share the model with")
        return False
    if wanted == "fsdp":
        return True
    if any(True for _ in sharding_obstacles(recipe)):
        return False
    tight = runtime.ranks.any_rank(_exceeds(recipe, runtime))
    if tight:
        log.info("distributed.strategy auto: a copy of the model would not fit on each device, so it is sharded")
    return tight


def _exceeds(recipe: Recipe, runtime: Runtime) -> bool:
    """Whether a whole copy is too much for this rank's device; no, where that cannot be known."""
    try:
        estimate = memory.estimate(
            recipe, precision=runtime.precision, device=runtime.device, world_size=runtime.world_size
        )
    except Exception as error:  # of a folder that building will refuse in better words, or a class of its own kind
        log.warning("distributed.strategy auto: no memory estimate (%s), so each rank gets a copy", first_line(error))
        return False
    return memory.exceeds(estimate, runtime.device)


def build(recipe: Recipe, runtime: Runtime, *, sharded: bool) -> ModelBundle:
    """The bundle on every rank; all of them draw the same numbers, so that new weights are equal everywhere.

    One to be sharded lies whole in rank 0's host memory only, and on no GPU: the others lay it out without content, which
    `shard` gets from rank 0. Where that gives another layout than rank 0 has, they too build it whole, and say so.
    """

    def built(place: str | torch.device) -> ModelBundle:
        return build_model(recipe, device=torch.device(place), precision=runtime.precision)

    with runtime.ranks.together("building the model"):
        if not sharded or runtime.is_main:
            bundle = built("cpu" if sharded else runtime.device)
        else:
            bundle = _laid_out(built)
    if not sharded:
        return bundle
    layouts = runtime.ranks.exchange("layouts", bundle and sharding.layout(bundle.model))
    if len(set(layouts)) > 1:
        log.warning("this model cannot be laid out without its weights: each rank builds it whole before it is sharded")
        with runtime.ranks.together("building the model whole"):
            bundle = bundle if runtime.is_main else built("cpu")
    return bundle


def _laid_out(built: Callable[[str], ModelBundle]) -> ModelBundle | None:
    try:
        return built("meta")
    except Exception as error:  # what is wrong with the model itself shows on rank 0, in better words
        log.debug("no layout without content: %s", first_line(error))
        return None


def shard(bundle: ModelBundle, recipe: Recipe, runtime: Runtime) -> None:
    """Spread the bundle's model over the ranks, in place.

    Raises: EngineError E4.21 for a model whose layers its class does not name.
    """
    settings = recipe.distributed
    layers = sharding.layers(bundle.model)
    if not layers:
        what = f"{type(bundle.model).__name__} does not say which of its modules are layers, so it cannot be sharded"
        raise EngineError("E4.21", what, "distributed.strategy", "set distributed.strategy: ddp")
    half = settings.param_dtype == "bf16" and runtime.precision == "bf16"
    dtype = torch.bfloat16 if half else None
    hollow = runtime.ranks.any_rank(any(parameter.is_meta for parameter in bundle.model.parameters()))
    sharding.shard(bundle.model, runtime.device, param_dtype=dtype, cpu_offload=settings.cpu_offload, from_first=hollow)
    bundle.report["device"] = str(runtime.device)
    log.info("the model's %d layers are sharded over %d ranks", len(layers), runtime.world_size)


def wrap(model: nn.Module, runtime: Runtime, *, irregular: bool) -> nn.Module:
    """The model as Accelerate prepares it for this rank; `irregular` is what `keep_out` returned, on any rank.

    Each rank drops layers of its own. Dropping none on several ranks would train another model than one rank does, so
    DistributedDataParallel looks at every backward pass for what it used. That search costs time: only these models pay it.

    Raises: EngineError E2.73 for such a model sharded: ranks would wait for each other at a layer that one of them drops.
    """
    irregular = runtime.ranks.any_rank(irregular)
    if sharding.is_sharded(model):
        if irregular:
            what = "this model drops layers or chooses experts now and then, which a sharded model cannot"
            raise EngineError("E2.73", what, "distributed.strategy", "set distributed.strategy: ddp")
        return model
    if irregular and runtime.world_size > 1:
        from accelerate import DistributedDataParallelKwargs

        runtime.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    return runtime.accelerator.prepare(model)
