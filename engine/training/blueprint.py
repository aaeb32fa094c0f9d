"""A model from its configuration and tokenizer alone: what a dry run needs where the weights are not there yet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from engine.models import configuration, hub, tokenization, weights
from engine.models.bundle import ModelBundle, describe, prompt_of
from engine.models.hub import BaseIdentity
from engine.training.memory import hollow_model

if TYPE_CHECKING:
    import torch

    from engine.recipe.schema import Recipe

log = logging.getLogger("engine.models")


def blueprint(recipe: Recipe, *, device: torch.device, precision: str) -> ModelBundle | None:
    """A bundle as `build_model` makes it, its tensors on the meta device; None where the weights can be loaded.

    Raises:
        EngineError: as `build_model`, for everything but missing weights.
    """
    folder = _folder_without_weights(recipe)
    if folder is None:
        return None
    log.warning("there are no weights in %s: enough for a dry run, not for training", folder)
    settings = recipe.model
    with weights.quiet_transformers():
        config = configuration.load_config(settings, folder)
        family = configuration.family(settings.family, config)
        configuration.check_combination(recipe, config, precision)
        tokenizer = tokenization.for_recipe(recipe, folder, family)
        before = len(tokenizer)
        tokenizer, _ = tokenization.with_added_tokens(tokenizer, recipe.tokenizer.added_tokens, config.model_type)
        configuration.align_config(config, tokenizer, family, settings)
        config.vocab_size = max(config.vocab_size, len(tokenizer))
        model = hollow_model(config, recipe, precision, len(tokenizer) - before)
    base = BaseIdentity(settings.name_or_path, settings.revision, hub.config_hash(config.to_dict()))
    report = describe(model, before, len(tokenizer), device, precision)
    return ModelBundle(model, tokenizer, family, base, report, *prompt_of(recipe))


def _folder_without_weights(recipe: Recipe) -> Path | None:
    """The folder of a pretrained model that lacks its weights. One with pickled weights is `build_model`'s to refuse."""
    settings = recipe.model
    if settings.name_or_path is None or settings.init != "pretrained":
        return None
    trusted = settings.trust_remote_code
    folder = hub.resolve(settings.name_or_path, revision=settings.revision, trust_remote_code=trusted, weights=False)
    if hub.is_adapter(folder) or not (folder / "config.json").is_file() or not tokenization.has_tokenizer(folder):
        return None
    return None if hub.has_weights(folder) else folder
