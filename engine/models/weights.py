"""Weights in and out of models: folders loaded whole or refused, embeddings resized, saved weights restored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine import families
from engine.errors import EngineError
from engine.generation.modelstate import bare
from engine.models import adapters, configuration, hub, sharding
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_USABLE_SHARE = 0.85  # of the free memory; the rest is for caches and activations


def auto_class(config: PreTrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def attention(implementation: str | None) -> dict[str, str]:
    return {} if implementation is None else {"attn_implementation": implementation}


def load_folder(
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    quantization: Any = None,
    attn_implementation: str | None = None,
    offload_folder: Path | None = None,
) -> nn.Module:
    """The model of a checked folder, on one device; never spread over devices unless `offload_folder` is given.

    Raises:
        EngineError: E4.8 where weights are missing or do not fit.
    """
    arguments: dict[str, Any] = attention(attn_implementation)
    if device.type == "meta":
        arguments |= {"device_map": {"": device}}
    if quantization is not None:
        arguments |= {"quantization_config": quantization, "device_map": {"": device}}
    if offload_folder is not None:
        arguments |= {"device_map": "auto", "offload_folder": str(offload_folder)}
    _check_depth(folder, config)
    with blaming("E4.8", "the weights cannot be loaded", folder, "check the folder, or download it again"):
        try:
            model, info = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
        except torch.OutOfMemoryError as error:
            what = "the device has too little memory for the weights alone"
            raise EngineError("E8.2", what, str(folder), "try quantization.load_in_4bit=true") from error
    if quantization is not None:
        adapters.keep_weights_as_loaded(model)
    missing = sorted(info["missing_keys"])
    if missing:
        names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        what = f"{len(missing)} weights are missing and would be random: the files lack {names}"
        raise EngineError("E4.8", what, str(folder), "use a checkpoint of the whole model with its output head")
    if (folder / hub.OWN_GENERATION_FILE).is_file():
        model.generation_config = configuration.own_generation_config(folder)
    if is_untied(model):
        # T5's configuration always says "tied"; believed, it would overwrite the output head at the next resize.
        model.config.tie_word_embeddings = False
    return model if "device_map" in arguments else model.to(device)


def _check_depth(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a configuration of more layers than the folder has weights, before all of them are made to find that out."""
    most = len(hub.weight_names(folder))
    for key in families.of(config.model_type).depths:
        layers = getattr(config, key, None)
        if isinstance(layers, int) and layers > most:
            what = f"config.json asks for {layers} layers ({key}), the folder holds {most} weights in all"
            raise EngineError("E4.8", what, str(folder), "restore config.json, or download the model again")


def without_content(device: torch.device) -> AbstractContextManager[Any]:
    """While open, new tensors are made on the meta device too, if that is where the model is."""
    return device if device.type == "meta" else nullcontext()


def too_large(folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model must be spread over GPU, host and disk: only in a single process, whose device map is its own."""
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return False
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(hub.stored_types(folder).values()) * dtype.itemsize
    return needed > _USABLE_SHARE * free


def is_untied(model: nn.Module) -> bool:
    """Whether the output head has weights of its own."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


@torch.no_grad()
def resize_embeddings(
    model: nn.Module, vocabulary: int, pieces: dict[int, list[int]], multiple: int | None = None
) -> None:
    """Make room for `vocabulary` tokens and start each new one from the mean of the pieces that spelled it before.

    That start is deterministic and close to where the token belongs. Rows are never removed: many models have more rows
    than their tokenizer has tokens.
    """
    old_rows = model.get_input_embeddings().weight.shape[0]
    multiple = multiple or 1
    rows = -(-max(vocabulary, old_rows) // multiple) * multiple
    if rows > old_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    matrices = {
        id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    }
    for matrix in matrices.values():
        mean = matrix[:old_rows].float().mean(0)
        matrix[old_rows:] = mean.to(matrix.dtype)
        for token, spelled in pieces.items():
            row = matrix[spelled].float().mean(0) if spelled else mean
            matrix[token] = row.to(matrix.dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights to `dtype`. Buffers stay: rotary frequencies lose their meaning in 16 bits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def recompute_activations(model: nn.Module, *, frozen_embeddings: bool) -> None:
    """Gradient checkpointing, non-reentrant: blocks keep their inputs only and are computed again in the backward pass.

    Args:
        frozen_embeddings: make their outputs require gradients, without which the first block would have none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a coming change of name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if frozen_embeddings:
        model.enable_input_require_grads()


def is_adapted(model: nn.Module) -> bool:
    return hasattr(bare(model), "peft_config")


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights that training changes, by name: the whole model, or the adapter without its base."""
    model = bare(model)
    return adapters.adapter_tensors(model) if is_adapted(model) else dict(model.state_dict())


def weights_of(model: nn.Module, keep: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The same weights as live tensors under the model's own names, which `save_pretrained` takes as its state dict.

    Of a sharded model, rank 0 gets the whole tensors, put where `keep` says (default: in host memory), and the others
    nothing; all ranks must call it.
    """
    if is_adapted(model):
        live = adapters.live_tensors(bare(model))
    else:
        live = model.state_dict()
    return sharding.gathered(live, keep) if sharding.is_sharded(model) else live


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy the weights of a saved folder into an existing model of the same shape, to the bit.

    Raises:
        EngineError: E5.10 where names or shapes differ.
    """
    from safetensors.torch import load_file

    model, folder = bare(model), Path(folder)
    hub.check_folder(folder)
    stored: dict[str, Tensor] = {}
    pattern = "adapter_model*.safetensors" if is_adapted(model) else "model*.safetensors"
    for path in sorted(folder.glob(pattern)):
        stored |= load_file(path)
    own = trainable_state(model)
    tied = _tied_names(own)
    missing = [name for name in own if name not in stored and not tied[name] & stored.keys()]
    unexpected = [name for name in stored if name not in own]
    shapes = [name for name in stored if name in own and stored[name].shape != own[name].shape]
    if missing or unexpected or shapes:
        what = (
            f"weights do not fit: {len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} of another shape"
        )
        first = (missing + unexpected + shapes)[0]
        advice = "use the checkpoint's own recipe"
        raise EngineError("E5.10", what, f"{folder}, first {first}", advice, safe="the model was not changed")
    for name, tensor in stored.items():
        own[name].copy_(sharding.part_of(tensor, like=own[name]))


def _tied_names(tensors: dict[str, Tensor]) -> dict[str, set[str]]:
    """For each name, all names of the same memory: tied weights are stored once."""
    by_memory: dict[tuple[Any, ...], set[str]] = {}
    places = {name: (sharding.address(tensor), tensor.shape, tensor.device) for name, tensor in tensors.items()}
    for name, place in places.items():
        by_memory.setdefault(place, set()).add(name)
    return {name: by_memory[place] for name, place in places.items()}


def default_precision(device: torch.device) -> str:
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if bf16 else "fp32"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
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
