"""Weights that no gradient ever reaches, found by one backward pass and kept out of training.

Sinusoidal tables that are parameters (Pegasus, Marian), or projections for a kind of attention that these batches do not ask
for (LED's global one). On one rank they would only be carried along; DistributedDataParallel waits for their gradients and
ends the run at the second update. They are kept out on one rank too, so that optimizer and checkpoints are the same
however many ranks there are.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.errors import EngineError
from engine.loss.cross_entropy import summed_cross_entropy
from engine.runtime.exits import classify

if TYPE_CHECKING:
    from engine.data.encode import Feature
    from engine.models.bundle import ModelBundle
    from engine.runtime.process import Runtime

log = logging.getLogger("engine.train")
# A weight of one expert among modules of their own; where all of them are one tensor, it always has a gradient.
_ONE_EXPERT = re.compile(r"\bexperts\.\w*\d+\.")


def keep_out(bundle: ModelBundle, features: Sequence[Feature], runtime: Runtime) -> bool:
    """Freeze the trainable weights that no gradient reaches; gradients and random streams are left as they were.

    Returns:
        Whether some of the others get a gradient now and then only: layers that are dropped, experts that are chosen.

    Raises:
        EngineError: E4.19 where the model cannot take a batch of text and labels, E8 where not even one row fits.
    """
    model = bundle.model
    without = _without_gradient(bundle, features, runtime)
    # Another row may choose an expert that this one did not: those keep their chance.
    frozen = {name: parameter for name, parameter in without.items() if not _ONE_EXPERT.search(name)}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    if frozen:
        bundle.report["trainable_parameters"] -= sum(parameter.numel() for parameter in frozen.values())
        log.info("kept out of training, as no gradient reaches them: %s", ", ".join(frozen))
    chosen = any(_ONE_EXPERT.search(name) for name, p in model.named_parameters() if p.requires_grad)
    return chosen or any(getattr(module, "layerdrop", 0.0) for module in model.modules())


def _without_gradient(bundle: ModelBundle, features: Sequence[Feature], runtime: Runtime) -> dict[str, nn.Parameter]:
    """Trainable parameters without a gradient after the backward pass of one row.

    The longest row: a short one would take some models another way for good (BigBird leaves its sparse attention), and
    training needs the memory for this one in any case.
    """
    row = max(features, key=lambda feature: feature.length)
    random_state = runtime.random_state()
    try:
        with _every_layer(bundle.model), runtime.autocast():
            loss = summed_cross_entropy(bundle.model, runtime.to_device(bundle.collate([row])))
        loss.backward()
        del loss
        named = bundle.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad and p.grad is None}
    except Exception as error:  # a model that takes other inputs, or another head, fails in many ways
        raise _refusal(error, bundle, row, runtime) from error
    finally:
        bundle.model.zero_grad(set_to_none=True)
        runtime.shapes = None
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        runtime.restore_random_state(random_state)


def _refusal(error: Exception, bundle: ModelBundle, row: Feature, runtime: Runtime) -> EngineError:
    known = classify(error, runtime.shapes)
    if known.exit_code == 8:
        what = f"a single row of {row.length} tokens does not fit in memory"
        advice = "set training.gradient_checkpointing=true or lower data.max_source_length"
        return EngineError("E8.2", what, "training", advice)
    if known.exit_code != 1:
        return known
    what = (
        f"a {bundle.report['model_type']} model cannot be trained here, its first pass over a row fails: {known.what}"
    )
    advice = "choose a model that summarises text, or see --traceback"
    return EngineError("E4.19", what, "model.name_or_path", advice, safe="nothing was trained")


@contextmanager
def _every_layer(model: nn.Module) -> Iterator[None]:
    """While open, no layer is dropped. Other modules stay in training mode, which gradient checkpointing asks for."""
    droppers = [module for module in model.modules() if hasattr(module, "layerdrop") and module.training]
    for module in droppers:
        module.training = False
    try:
        yield
    finally:
        for module in droppers:
            module.training = True
