"""Configurations of models: read, laid over by the recipe, held against it, and brought in line with the tokenizer."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from engine import families
from engine.errors import EngineError
from engine.recipe.dump import SECRET_KEYS
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from engine.recipe.schema import Model, Recipe

log = logging.getLogger("engine.models")
# Modules with a row of their own for each position: Bart's and its relatives', GPT-2's, and older models'.
_POSITION_TABLES = {"embed_positions", "wpe", "position_embeddings"}


def load_config(settings: Model, folder: Path | None) -> PreTrainedConfig:
    """The model's configuration with the recipe's values laid over it.

    Raises:
        EngineError: E4.9 for a type or value that transformers does not take.
    """
    from transformers import AutoConfig

    # A token among the values would be saved in every config.json of the run; the hub's own login serves its purpose.
    overlay = {key: value for key, value in (settings.config or {}).items() if key.lower() not in SECRET_KEYS}
    where = str(folder) if folder else "model.config"
    with blaming("E4.9", "model configuration refused", where, "check model.config and the model type"):
        if folder is None:
            config = AutoConfig.for_model(overlay.pop("model_type"), **overlay)
        else:
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=settings.trust_remote_code, local_files_only=True, **overlay
            )
    unknown = [key for key in overlay if not hasattr(config, key)]
    if unknown:
        raise EngineError("E2.47", f"model.config has no key {', '.join(unknown)}", where, "check the spelling")
    if settings.dropout is not None:
        for name in families.of(config.model_type).dropouts:
            if isinstance(getattr(config, name, None), int | float):
                setattr(config, name, settings.dropout)
    return config


def family(wanted: str, config: PreTrainedConfig) -> str:
    family = "seq2seq" if config.is_encoder_decoder else "causal"
    if wanted not in ("auto", family):
        what = f"model.family={wanted}, but a {config.model_type} model is {family}"
        raise EngineError("E2.48", what, "model.family", "set model.family=auto")
    return family


def check_combination(recipe: Recipe, config: PreTrainedConfig, precision: str) -> None:
    if precision == "fp16" and not families.of(config.model_type).fits_fp16:
        what = "T5 overflows in fp16: its activations exceed 65,504"
        raise EngineError("E2.53", what, "training.precision=fp16", "set training.precision=bf16 or fp32")
    if recipe.quantization.load_in_4bit and recipe.model.init == "random":
        what = "a model with random weights is not quantised: there is nothing to keep"
        advice = "train the base first and name its final_model folder in model.name_or_path"
        raise EngineError("E2.49", what, "quantization.load_in_4bit", advice)


def most_tokens(model: nn.Module, family: str) -> tuple[float, float]:
    """Most tokens that fit on the source and on the target side; a causal LM has both in the same places.

    Learned and tabulated positions end with their table: a token beyond it is an IndexError, on a GPU a failed assertion.
    Rotary and relative positions have no such end (infinity).
    """
    tables = {
        name: module.num_embeddings - getattr(module, "offset", 0)  # Bart's table begins with two unused rows
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES
    }
    if family == "causal":
        shared = min(tables.values(), default=math.inf)
        return shared, shared
    sides = [[rows for name, rows in tables.items() if f"{side}." in name] for side in ("encoder", "decoder")]
    return min(sides[0], default=math.inf), min(sides[1], default=math.inf)


def fit_lengths(lengths: dict[str, int], model: nn.Module, family: str) -> dict[str, int]:
    """`lengths` (max_source_length, max_target_length) cut to what the model has room for, with a warning for each cut."""
    source, target = most_tokens(model, family)
    if family == "causal" and sum(lengths.values()) > source:
        target = min(lengths["max_target_length"], source // 2)
        source -= target
    room = {"max_source_length": source, "max_target_length": target}
    return {name: within(room[name], f"data.{name}", length) for name, length in lengths.items()}


def within(room: float, name: str, asked: int) -> int:
    """`asked`, or `room` with a warning where that is less."""
    if asked <= room:
        return asked
    log.warning("%s is %d, the model has room for %d: longer texts are cut there", name, asked, room)
    return int(room)


def align_config(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, family: str, settings: Model) -> None:
    """Token ids of the configuration follow the tokenizer; the decoder's start token stays the model's own."""
    given = settings.config or {}
    fresh = settings.init == "random"
    config.pad_token_id = tokenizer.pad_token_id
    if fresh or _token(config, "eos") is None:
        config.eos_token_id = tokenizer.eos_token_id
    if (fresh or _token(config, "bos") is None) and tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
    if family == "causal":
        return
    own_tokenizer_trained = fresh and "decoder_start_token_id" not in given and settings.name_or_path is None
    if own_tokenizer_trained or _token(config, "decoder_start") is None:
        config.decoder_start_token_id = _usual_start(config, tokenizer)
    if fresh and settings.name_or_path is None and "forced_eos_token_id" not in given:
        _forget_forced_end(config)


def _token(config: PreTrainedConfig, role: str) -> int | list[int] | None:
    """The id of a role (eos, bos, ...), or None: configurations declare only the roles that their family had."""
    return getattr(config, f"{role}_token_id", None)


def _usual_start(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    with_pad = families.of(config.model_type).starts_with_pad
    return tokenizer.pad_token_id if with_pad else tokenizer.eos_token_id


def _forget_forced_end(config: PreTrainedConfig) -> None:
    """BART's default configuration forces token 2 at the length limit; in a new vocabulary that is another token."""
    if _token(config, "forced_eos") is not None:
        config.forced_eos_token_id = None


def align_generation_config(model: nn.Module, tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    generation = model.generation_config
    generation.pad_token_id = tokenizer.pad_token_id
    ends = generation.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if tokenizer.eos_token_id not in ends:
        generation.eos_token_id = [*ends, tokenizer.eos_token_id] if ends else tokenizer.eos_token_id
    if family == "seq2seq":
        if _token(model.config, "decoder_start") is None:
            model.config.decoder_start_token_id = _usual_start(model.config, tokenizer)
        generation.decoder_start_token_id = model.config.decoder_start_token_id
