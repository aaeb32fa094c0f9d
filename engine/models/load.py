"""Trained models loaded for prediction: a final_model, a checkpoint, any Hugging Face model or PEFT adapter folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.data.prompts import PromptSettings
from engine.errors import EngineError
from engine.models import adapters, configuration, hub, tokenization, trial, weights
from engine.models.bundle import LENGTHS, PROMPT_FILE, ModelBundle, describe, prompt_of
from engine.recipe.load import load_recipe
from engine.recipe.schema import Model, Quantization, Recipe
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("engine.models")


def load_trained(
    path: str | Path,
    *,
    device: torch.device,
    precision: str | None = None,
    base: str | None = None,
    offload_folder: Path | None = None,
    four_bit: bool = True,
) -> ModelBundle:
    """A trained model in eval mode, with the tokenizer and the prompt settings it was trained with.

    Args:
        precision: type of the weights; None: bf16 where the GPU has it, else fp32.
        base: replaces the base that an adapter names.
        offload_folder: where weights go that do not fit on the GPU, if there is one process and they are too large.
        four_bit: False loads the base of an adapter that was trained on 4 bits in full.

    Raises:
        EngineError: E4 where the folder is unusable or its prompt settings were changed.
    """
    precision = precision or weights.default_precision(device)
    with weights.quiet_transformers(), weights.seeded(0), hub.blaming_folder(path):
        folder = hub.resolve(str(path))
        adapter = folder if hub.is_adapter(folder) else None
        source = hub.resolve_base(adapter, base) if adapter else hub.Source(str(folder), None, folder)
        config = configuration.load_config(Model(name_or_path=source.name), source.folder)
        family = configuration.family("auto", config)
        # An adapter saved here brings its own tokenizer, with the added tokens; a foreign one has only its base's.
        tokenizer = tokenization.load_tokenizer(folder if tokenization.has_tokenizer(folder) else source.folder)
        tokenization.ensure_end_and_pad(tokenizer, str(folder))

        quantization = hub.base_record(adapter).get("quantization") if adapter and four_bit else None
        settings = Quantization.model_validate(quantization) if quantization else None
        bits = adapters.quantization_config(settings, precision, device) if settings else None
        dtype = adapters.DTYPES[precision]
        spread = bits is None and weights.too_large(source.folder, dtype, device)
        places = {"device": device, "offload_folder": offload_folder if spread else None}
        model = weights.load_folder(source.folder, config, dtype=dtype, quantization=bits, **places)
        if adapter is None:
            _check_rows(model, tokenizer, folder)
        else:
            # The base has no rows for added tokens; what stands in them comes with the adapter.
            weights.resize_embeddings(model, len(tokenizer), {})
            model = adapters.load(model, adapter, trainable=False)
        configuration.align_generation_config(model, tokenizer, family)
        prompt, lengths = _read_prompt(folder, tokenizer)
        bundle = ModelBundle(
            model=model.eval(),
            tokenizer=tokenizer,
            family=family,
            base=hub.identify(source),
            report=describe(model, len(tokenizer), len(tokenizer), device, precision),
            prompt=prompt,
            lengths=lengths,
            quantization=quantization,
            prompt_is_known=any((folder / name).is_file() for name in (PROMPT_FILE, "recipe.yaml")),
        )
        trial.try_out(bundle)
    return bundle


def _check_rows(model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows for them"
        raise EngineError("E4.15", what, str(folder), "take model and tokenizer from one place")


def _read_prompt(folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[PromptSettings, dict[str, int]]:
    """Prompt settings stored with the model, else those of its recipe, else the defaults for a foreign folder."""
    path, recipe = folder / PROMPT_FILE, folder / "recipe.yaml"
    if not path.is_file():
        if not recipe.is_file():
            return prompt_of(Recipe())
        log.warning("%s is missing: the prompt is the one of %s", path, recipe)
        return prompt_of(load_recipe(recipe))
    record = hub.read_json(path)
    with blaming("E4.10", "prompt settings unreadable", path, "restore the file"):
        settings = PromptSettings.from_dict(record["prompt"])
        lengths = {name: record["data"][name] for name in LENGTHS}
        if not all(type(length) is int and length > 0 for length in lengths.values()):
            raise ValueError(f"lengths are {lengths}")
        fingerprint = record["fingerprint"]
    if fingerprint != settings.fingerprint(tokenizer.chat_template):
        what = "prompt settings or chat template were changed after training"
        advice = "restore the folder as it was saved; a model must be prompted the way it was trained"
        raise EngineError("E4.10", what, str(path), advice)
    return settings, lengths
