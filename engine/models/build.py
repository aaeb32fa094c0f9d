"""Build, reload, save: the one room that knows model families, special tokens and embedding sizes.

What differs between encoder-decoders and causal LMs leaves this room as data: `ModelBundle.family` and `.collate`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.models import adapters, configuration, hub, tokenization, weights
from engine.models.hub import BaseIdentity
from engine.models.weights import is_adapted, load_weights, unwrap

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

    from engine.data.encode import Feature, TextEncoder
    from engine.data.prompts import PromptSettings
    from engine.recipe.schema import Model, Recipe

log = logging.getLogger("engine.models")

PROMPT_FILE = "prompt_settings.json"


@dataclass
class ModelBundle:
    """A model and all that must stay with it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    family: str  # "seq2seq" or "causal"
    base: BaseIdentity
    report: dict[str, Any]
    prompt: PromptSettings
    lengths: dict[str, int]  # max_source_length, max_target_length
    quantization: dict[str, Any] | None = None  # settings of a 4-bit base
    prompt_is_known: bool = True  # False: a foreign folder, whose training prompt nobody told

    def __post_init__(self) -> None:
        self.set_lengths()

    def set_lengths(self, **changed: int) -> None:
        """Change `lengths`, as far as the model's position embeddings reach."""
        self.lengths = configuration.fit_lengths(self.lengths | changed, self.model, self.family)

    @property
    def generation_config(self) -> GenerationConfig:
        return self.model.generation_config

    @property
    def collate(self) -> Callable[[list[Feature]], dict[str, Tensor]]:
        """The family's collator: features -> padded batch (B, S), (B, T)."""
        from engine.data.collate import collate_causal, collate_seq2seq

        pad = self.tokenizer.pad_token_id
        if self.family == "causal":
            return partial(collate_causal, pad_token_id=pad)
        start = self.model.config.decoder_start_token_id
        return partial(collate_seq2seq, pad_token_id=pad, decoder_start_token_id=start)

    def text_encoder(self) -> TextEncoder:
        """Dialogues to token ids and back, with this model's prompt settings and lengths."""
        from engine.data.encode import TextEncoder

        return TextEncoder(tokenizer=self.tokenizer, family=self.family, settings=self.prompt, **self.lengths)

    def prompt_record(self) -> dict[str, Any]:
        """What PROMPT_FILE holds: the settings under which the model was trained, and their fingerprint."""
        return {
            "prompt": self.prompt.to_dict(),
            "data": self.lengths,
            "fingerprint": self.prompt.fingerprint(self.tokenizer.chat_template),
        }


# Building for training


def build_model(recipe: Recipe, *, device: torch.device, precision: str) -> ModelBundle:
    """Model and tokenizer for training, as the recipe describes them. Deterministic under `training.seed`.

    Trainable weights are float32 under every precision; the frozen base of adapters is stored in the compute type.

    Args:
        precision: fp32, bf16 or fp16, already resolved.

    Raises:
        EngineError: E2 for settings that do not go together, E4 for a model that cannot be had or must not be loaded.
    """
    with quiet_transformers(), _seeded(recipe.training.seed):
        return _build(recipe, device, precision)


def _build(recipe: Recipe, device: torch.device, precision: str) -> ModelBundle:
    from transformers import GenerationConfig

    settings, lora = recipe.model, adapters.enabled(recipe)
    folder = _model_folder(settings)
    adapter = folder if folder is not None and hub.is_adapter(folder) else None
    if adapter is not None:
        folder, settings = _base_of_adapter(adapter, settings, lora)
    config = configuration.load_config(settings, folder)
    family = configuration.family(settings.family, config)
    configuration.check_combination(recipe, config, precision)

    tokenizer = tokenization.for_recipe(recipe, adapter or folder, family)
    vocabulary_before = len(tokenizer)
    spellings = tokenization.spellings_of_new_tokens(tokenizer, recipe.tokenizer.added_tokens)
    tokenizer = tokenization.prepare(
        tokenizer,
        recipe.tokenizer.added_tokens,
        name=tokenizer.name_or_path or "trained here",
        model_type=config.model_type,
    )
    pieces = {tokenizer.convert_tokens_to_ids(token): spelled for token, spelled in spellings.items()}
    configuration.align_config(config, tokenizer, family, settings)

    base_dtype = adapters.DTYPES[precision] if lora else torch.float32
    if settings.init == "random":
        model = _random_model(config, tokenizer, recipe, base_dtype).to(device)
        if folder is not None and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        four_bit = recipe.quantization.load_in_4bit
        model = weights.load_folder(
            folder,
            config,
            dtype=base_dtype,
            device=device,
            trust_remote_code=settings.trust_remote_code,
            attn_implementation=settings.attn_implementation,
            quantization=adapters.quantization_config(recipe.quantization, precision, device) if four_bit else None,
        )
        weights.resize_embeddings(model, len(tokenizer), pieces, recipe.tokenizer.pad_to_multiple_of)
    configuration.align_generation_config(model, tokenizer, family)
    base = identify(settings, config, folder)
    model = _with_adapters(model, recipe, adapter, list(pieces), base, folder) if lora else model
    if recipe.training.gradient_checkpointing:
        weights.recompute_activations(model, frozen_embeddings=lora)
    check_trainable_dtype(model)

    from engine.data.prompts import PromptSettings

    return ModelBundle(
        model=model,
        tokenizer=tokenizer,
        family=family,
        base=base,
        report=describe(model, vocabulary_before, len(tokenizer), device, precision),
        prompt=PromptSettings(**recipe.prompt.model_dump()),
        lengths={
            "max_source_length": recipe.data.max_source_length,
            "max_target_length": recipe.data.max_target_length,
        },
        quantization=recipe.quantization.model_dump() if recipe.quantization.load_in_4bit else None,
    )


def _model_folder(settings: Model) -> Path | None:
    if settings.name_or_path is None:
        if settings.init == "pretrained" or not (settings.config or {}).get("model_type"):
            raise EngineError(
                "E2.58",
                "no model: name_or_path is empty and config has no model_type",
                "model",
                "set model.name_or_path, or model.init=random with model.config.model_type",
            )
        return None
    return hub.resolve(
        settings.name_or_path,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        weights=settings.init == "pretrained",
    )


def _base_of_adapter(adapter: Path, settings: Model, lora: bool) -> tuple[Path, Model]:
    """An adapter folder as the model: its base is what to load. The adapter's own LoRA settings then hold."""
    if not lora or settings.init == "random":
        raise EngineError(
            "E2.46",
            "the model folder is an adapter, which can only be trained on as one",
            str(adapter),
            "set lora.enabled=true and model.init=pretrained, or merge it first with tools/merge_adapter.py",
        )
    name, revision = hub.base_of_adapter(adapter)
    base = settings.model_copy(update={"name_or_path": name, "revision": revision})
    folder = hub.resolve(name, revision=revision, trust_remote_code=settings.trust_remote_code)
    hub.check_base(adapter, folder)
    return folder, base


def _random_model(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, dtype: torch.dtype
) -> nn.Module:
    multiple = recipe.tokenizer.pad_to_multiple_of or 1
    rows = -(-len(tokenizer) // multiple) * multiple
    fixed = recipe.model.name_or_path is not None or "vocab_size" in (recipe.model.config or {})
    # A benchmark at a model's real shape keeps that model's rows; otherwise the vocabulary decides.
    config.vocab_size = max(rows, config.vocab_size) if fixed else rows
    try:
        model = weights.auto_class(config).from_config(
            config, **weights.attention(recipe.model.attn_implementation), dtype=torch.float32
        )
    except Exception as error:  # shapes that do not fit together surface as many types
        raise EngineError("E4.9", f"no model can be built: {error}", "model.config", "check model.config") from error
    return weights.cast(model, dtype)


def _with_adapters(
    model: nn.Module, recipe: Recipe, adapter: Path | None, new_ids: list[int], base: BaseIdentity, folder: Path | None
) -> nn.Module:
    if adapter is not None:
        adapted = adapters.load(model, adapter, trainable=True)
        load_weights(adapted, adapter)  # peft reads token rows in the base's type; training goes on from the exact ones
        return adapted
    name = str(folder.resolve()) if folder is not None and Path(base.name).expanduser().is_dir() else base.name
    return adapters.attach(model, recipe.lora, new_token_ids=new_ids, base_name=name, revision=base.revision)


def identify(settings: Model, config: PreTrainedConfig, folder: Path | None) -> BaseIdentity:
    """Name, commit and hashes of the model a run starts from."""
    name = settings.name_or_path or f"random {config.model_type}"
    if folder is None or settings.init == "random":
        return BaseIdentity(name, settings.revision, hub.config_hash(config.to_dict()), None)
    return hub.identify(name, settings.revision, folder)


def check_trainable_dtype(model: nn.Module) -> None:
    """Every trainable weight is float32: the optimizer's small steps vanish in 16 bits, and fp16 cannot be unscaled."""
    wrong = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong:
        raise EngineError(
            "E1.10", f"trainable weights not in float32: {', '.join(wrong[:3])}", "model", "please report this"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise EngineError("E2.52", "nothing is trainable", "model and lora", "check the lora section")


def describe(
    model: nn.Module, vocabulary_before: int, vocabulary: int, device: torch.device, precision: str
) -> dict[str, Any]:
    """The start-up report: parameters, vocabulary, device and precision."""
    parameters = list(model.parameters())
    return {
        "model_type": model.config.model_type,
        "parameters": sum(_count(p) for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "vocabulary_before": vocabulary_before,
        "vocabulary": vocabulary,
        "embedding_rows": model.get_input_embeddings().weight.shape[0],
        "device": str(device),
        "precision": precision,
        "quantized": adapters.is_4bit(model),
    }


def _count(parameter: nn.Parameter) -> int:
    """Weights of a parameter; two 4-bit weights share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights by `seed` on every rank, with the caller's random stream untouched."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' advice and bars while loading are not for users of this program; its errors stay."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


# Reloading


def load_trained(
    path: str | Path,
    *,
    device: torch.device,
    precision: str | None = None,
    base: str | None = None,
    offload_folder: Path | None = None,
    four_bit: bool = True,
) -> ModelBundle:
    """A trained model for prediction: final_model, a checkpoint, any Hugging Face model or PEFT adapter folder.

    Args:
        precision: type of the weights; None: bf16 where the GPU has it, else fp32.
        base: replaces the base that an adapter names.
        offload_folder: where weights go that do not fit on the GPU, if there is one process and they are too large.
        four_bit: False loads the base of an adapter that was trained on 4 bits in full.

    Raises:
        EngineError: E4 where the folder is unusable or its prompt settings were changed.
    """
    with quiet_transformers(), _seeded(0):
        return _load_trained(
            Path(path), device, precision or default_precision(device), base, offload_folder, four_bit=four_bit
        )


def default_precision(device: torch.device) -> str:
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


def _load_trained(
    folder: Path, device: torch.device, precision: str, base: str | None, offload_folder: Path | None, *, four_bit: bool
) -> ModelBundle:
    from engine.recipe.schema import Model, Quantization

    folder = hub.resolve(str(folder))
    adapter = folder if hub.is_adapter(folder) else None
    record = hub.read_json(folder / hub.BASE_FILE) if adapter and (folder / hub.BASE_FILE).is_file() else {}
    if adapter is None:
        settings, base_folder = Model(name_or_path=str(folder)), folder
    else:
        name, revision = (base, None) if base else hub.base_of_adapter(adapter)
        settings = Model(name_or_path=name, revision=revision)
        base_folder = hub.resolve(name, revision=revision)
        hub.check_base(adapter, base_folder)
    config = configuration.load_config(settings, base_folder)
    family = configuration.family("auto", config)
    tokenizer = tokenization.load_tokenizer(folder if tokenization.has_tokenizer(folder) else base_folder)
    tokenization.ensure_end_and_pad(tokenizer, str(folder))

    quantization = record.get("quantization") if four_bit else None
    bits = adapters.quantization_config(Quantization(**quantization), precision, device) if quantization else None
    spread = bits is None and weights.too_large(base_folder, adapters.DTYPES[precision], device)
    model = weights.load_folder(
        base_folder,
        config,
        dtype=adapters.DTYPES[precision],
        device=device,
        quantization=bits,
        offload_folder=offload_folder if spread else None,
    )
    if adapter is None:
        _check_rows(model, tokenizer, folder)
    else:
        weights.resize_embeddings(model, len(tokenizer), {}, None)
        model = adapters.load(model, adapter, trainable=False)
    configuration.align_generation_config(model, tokenizer, family)
    prompt, lengths = _read_prompt(folder, tokenizer)
    return ModelBundle(
        model=model.eval(),
        tokenizer=tokenizer,
        family=family,
        base=hub.identify(settings.name_or_path, settings.revision, base_folder),
        report=describe(model, len(tokenizer), len(tokenizer), device, precision),
        prompt=prompt,
        lengths=lengths,
        quantization=quantization,
        prompt_is_known=any((folder / name).is_file() for name in (PROMPT_FILE, "recipe.yaml")),
    )


def _check_rows(model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        what = f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} rows for them"
        raise EngineError("E4.15", what, str(folder), "take model and tokenizer from one place")


def _read_prompt(folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[PromptSettings, dict[str, int]]:
    """Prompt settings stored with the model, else those of its recipe, else the defaults for a foreign folder."""
    from engine.data.prompts import PromptSettings
    from engine.recipe.load import load_recipe
    from engine.recipe.schema import Recipe

    path, recipe = folder / PROMPT_FILE, folder / "recipe.yaml"
    if not path.is_file():
        trained = load_recipe(recipe) if recipe.is_file() else Recipe()
        if recipe.is_file():
            log.warning("%s is missing: the prompt is the one of %s", path, recipe)
        lengths = {name: getattr(trained.data, name) for name in ("max_source_length", "max_target_length")}
        return PromptSettings(**trained.prompt.model_dump()), lengths
    record = hub.read_json(path)
    try:
        settings = PromptSettings.from_dict(record["prompt"])
        lengths = {key: int(record["data"][key]) for key in ("max_source_length", "max_target_length")}
        fingerprint = record["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError("E4.10", f"prompt settings unreadable: {error}", str(path), "restore the file") from error
    if fingerprint != settings.fingerprint(tokenizer.chat_template):
        raise EngineError(
            "E4.10",
            "prompt settings or chat template were changed after training",
            str(path),
            "restore the folder as it was saved; a model must be prompted the way it was trained",
        )
    return settings, lengths


# Saving and restoring weights


def save_model(bundle: ModelBundle, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a model or PEFT adapter folder that Hugging Face classes load without this package. safetensors only.

    Args:
        state_dict: weights to write in place of the live ones, which may be moving on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        save_weights(bundle, folder, state_dict)
        bundle.tokenizer.save_pretrained(folder)
    _write_json(folder / PROMPT_FILE, bundle.prompt_record())


def save_weights(bundle: ModelBundle, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    model = unwrap(bundle.model)
    if is_adapted(model):
        if state_dict is not None:
            state_dict = adapters.frozen_rows(model) | dict(state_dict)
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state_dict)
        (folder / "README.md").unlink(missing_ok=True)  # peft's model card has no content of its own
        model.generation_config.save_pretrained(folder)
        _write_json(folder / hub.BASE_FILE, bundle.base.to_dict() | {"quantization": bundle.quantization})
    else:
        model.save_pretrained(folder, state_dict=state_dict)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
