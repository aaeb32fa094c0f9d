"""Models for training, built as a recipe describes them: from a folder, from random weights, or on from an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.errors import EngineError
from engine.models import adapters, configuration, hub, size, tokenization, trial, weights
from engine.models.bundle import ModelBundle, describe, prompt_of
from engine.models.hub import BaseIdentity, Source
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from engine.recipe.schema import Recipe


def build_model(recipe: Recipe, *, device: torch.device, precision: str) -> ModelBundle:
    """Model and tokenizer for training, as the recipe describes them. Deterministic under `training.seed`.

    Trainable weights are float32 under every precision; the frozen base of adapters is stored in the compute type.

    Args:
        device: where the weights go. On the meta device nothing is read or drawn: the layout without content.
        precision: fp32, bf16 or fp16, already resolved.

    Raises:
        EngineError: E2 for settings that do not go together, E4 for a model that cannot be had or must not be loaded.
    """
    where = hub.blaming_folder(recipe.model.name_or_path)
    with weights.quiet_transformers(), weights.seeded(recipe.training.seed), where:
        lora = adapters.enabled(recipe)
        source, adapter = _sources(recipe, lora)
        config = configuration.load_config(recipe.model, source.folder)
        family = configuration.family(recipe.model.family, config)
        configuration.check_combination(recipe, config, precision)

        # The tokenizer comes before the weights: random models take their vocabulary from it, others are resized to it.
        tokenizer = tokenization.for_recipe(recipe, adapter or source.folder, family)
        vocabulary_before = len(tokenizer)
        tokenizer, pieces = tokenization.with_added_tokens(tokenizer, recipe.tokenizer.added_tokens, config.model_type)
        configuration.align_config(config, tokenizer, family, recipe.model)

        dtype = adapters.DTYPES[precision] if lora else torch.float32
        if recipe.model.init == "random":
            model = _random_model(config, tokenizer, recipe, source.folder, dtype, device)
        else:
            model = _pretrained_model(config, recipe, source.folder, dtype, device, precision)
            weights.resize_embeddings(model, len(tokenizer), pieces, recipe.tokenizer.pad_to_multiple_of)
        configuration.align_generation_config(model, tokenizer, family)
        # After the weights, because the vocabulary of a random model is part of what identifies it.
        base = _identity(recipe, config, source)
        if lora:
            with weights.without_content(device):
                model = _with_adapters(model, recipe, source, adapter, list(pieces))
        if recipe.training.gradient_checkpointing:
            weights.recompute_activations(model, frozen_embeddings=lora)
        check_trainable_dtype(model)
        prompt, lengths = prompt_of(recipe)
        bundle = ModelBundle(
            model=model,
            tokenizer=tokenizer,
            family=family,
            base=base,
            report=describe(model, vocabulary_before, len(tokenizer), device, precision),
            prompt=prompt,
            lengths=lengths,
            quantization=recipe.quantization.model_dump() if recipe.quantization.load_in_4bit else None,
        )
        if device.type != "meta":
            trial.try_out(bundle)
    return bundle


def _sources(recipe: Recipe, lora: bool) -> tuple[Source, Path | None]:
    """Where configuration and weights come from (no folder: from the recipe alone), and the adapter to train on."""
    settings = recipe.model
    if settings.name_or_path is None:
        if settings.init == "pretrained" or not (settings.config or {}).get("model_type"):
            what = "no model: name_or_path is empty and config has no model_type"
            advice = "set model.name_or_path, or model.init=random with model.config.model_type"
            raise EngineError("E2.58", what, "model", advice)
        return Source(f"random {settings.config['model_type']}", settings.revision, None), None
    rules = {"trust_remote_code": settings.trust_remote_code, "use_safetensors": settings.use_safetensors}
    weights_too = settings.init == "pretrained"
    folder = hub.resolve(settings.name_or_path, revision=settings.revision, weights=weights_too, **rules)
    if not hub.is_adapter(folder):
        return Source(settings.name_or_path, settings.revision, folder), None
    if not lora or settings.init == "random":
        what = "the model folder is an adapter, which can only be trained on as one"
        advice = "set lora.enabled=true and model.init=pretrained, or merge it first with tools/merge_adapter.py"
        raise EngineError("E2.46", what, str(folder), advice)
    return hub.resolve_base(folder, **rules), folder


def _pretrained_model(
    config: PreTrainedConfig, recipe: Recipe, folder: Path, dtype: torch.dtype, device: torch.device, precision: str
) -> nn.Module:
    four_bit = recipe.quantization.load_in_4bit
    return weights.load_folder(
        folder,
        config,
        dtype=dtype,
        device=device,
        trust_remote_code=recipe.model.trust_remote_code,
        attn_implementation=recipe.model.attn_implementation,
        quantization=adapters.quantization_config(recipe.quantization, precision, device) if four_bit else None,
    )


def _random_model(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    folder: Path | None,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Random weights of the configuration's shapes, on the device."""
    multiple = recipe.tokenizer.pad_to_multiple_of or 1
    rows = -(-len(tokenizer) // multiple) * multiple
    fixed = recipe.model.name_or_path is not None or "vocab_size" in (recipe.model.config or {})
    # A benchmark at a model's real shape keeps that model's rows; otherwise the vocabulary decides.
    config.vocab_size = max(rows, config.vocab_size) if fixed else rows
    with (
        blaming("E4.9", "no model can be built", "model.config", "check model.config"),
        weights.without_content(device),
    ):
        trusted = recipe.model.trust_remote_code  # where it is not said, transformers asks on standard input
        size.check_weights_fit(config, device, trust_remote_code=trusted)
        attention = weights.attention(recipe.model.attn_implementation)
        model = weights.auto_class(config).from_config(
            config, trust_remote_code=trusted, dtype=torch.float32, **attention
        )
    if folder is not None and (own := configuration.own_generation_config(folder)) is not None:
        model.generation_config = own
    return weights.cast(model, dtype).to(device)


def _identity(recipe: Recipe, config: PreTrainedConfig, source: Source) -> BaseIdentity:
    """Name, commit and hashes of the model a run starts from; random weights follow from configuration and seed."""
    if recipe.model.init == "random":
        return BaseIdentity(source.name, source.revision, hub.config_hash(config.to_dict()))
    return hub.identify(source)


def _with_adapters(
    model: nn.Module, recipe: Recipe, source: Source, adapter: Path | None, new_ids: list[int]
) -> nn.Module:
    """New adapters on the base, or those of the adapter folder to be trained on, whose own LoRA settings then hold."""
    if adapter is not None:
        adapted = adapters.load(model, adapter, trainable=True)
        # peft reads token rows in the type of the base; training goes on from the exact ones.
        weights.load_weights(adapted, adapter)
        return adapted
    # A folder is named by its whole path, so that the adapter finds its base from any working directory.
    is_local = source.folder is not None and Path(source.name).expanduser().is_dir()
    name = str(source.folder.resolve()) if is_local else source.name
    return adapters.attach(model, recipe.lora, new_token_ids=new_ids, base_name=name, revision=source.revision)


def check_trainable_dtype(model: nn.Module) -> None:
    """Every trainable weight is float32: the optimizer's small steps vanish in 16 bits, and fp16 cannot be unscaled."""
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        raise EngineError(
            "E1.10", f"trainable weights not in float32: {', '.join(wrong[:3])}", "model", "please report this"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise EngineError("E2.52", "nothing is trainable", "model and lora", "check the lora section")
