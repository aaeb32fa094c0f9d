"""How many weights a configuration asks for, and whether this machine holds them: known before anything is made."""

from __future__ import annotations

import copy
import os
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from engine import families
from engine.errors import EngineError
from engine.models import weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MOST_LAYERS = 1_000  # eight times the deepest model that there is


def check_depth(config: PreTrainedConfig) -> None:
    """Raises: EngineError E2.59 for more layers than any model has: making them would take minutes to find that out."""
    for key in families.of(config.model_type).depths:
        layers = getattr(config, key, None)
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            what = f"{key} is {layers:,}; at most {_MOST_LAYERS:,} layers are built"
            raise EngineError("E2.59", what, "model.config", f"lower model.config.{key}")


def check_weights_fit(config: PreTrainedConfig, device: torch.device, *, trust_remote_code: bool) -> None:
    """Refuse a new model before it is made, by its number of weights. Raises: EngineError E8.3, and E2.59 for its depth."""
    check_depth(config)

    def count(shallow: PreTrainedConfig) -> int:
        with torch.device("meta"):
            model = weights.auto_class(shallow).from_config(shallow, trust_remote_code=trust_remote_code)
            return sum(p.numel() for p in model.parameters())

    outside, layers = by_layers(config, count)
    depths = [getattr(config, key) for key in families.of(config.model_type).depths]
    total = outside + sum(cost * depth for cost, depth in zip(layers, depths, strict=True))
    if 4 * total > (most := device_bytes(device)):
        what = (
            f"{total:,} weights take {size_text(4 * total).strip()} in float32; {device} has {size_text(most).strip()}"
        )
        raise EngineError("E8.3", what, "model.config", "make the model smaller", safe="nothing was started")


def by_layers(config: PreTrainedConfig, measure: Callable[[PreTrainedConfig], int]) -> tuple[int, list[int]]:
    """What `measure` finds outside the layers, and in one layer of each stack: by models of one and of two layers."""
    keys = families.of(config.model_type).depths

    def measured(*layers: int) -> int:
        shallow = copy.deepcopy(config)
        for key, count in zip(keys, layers, strict=True):
            setattr(shallow, key, count)
        before, after = (getattr(one, "num_hidden_layers", None) for one in (config, shallow))
        for name, value in list(vars(shallow).items()):  # one entry per layer: layer types, LED's windows
            if isinstance(value, list) and len(value) == before:
                setattr(shallow, name, (value * after)[:after])
        return measure(shallow)

    base = measured(*[1] * len(keys))
    layers = [measured(*(2 if at == place else 1 for at in range(len(keys)))) - base for place in range(len(keys))]
    return base - sum(layers), layers


def device_bytes(device: torch.device) -> int:
    """All memory of the device: of the GPU, or of this machine, as far as this process may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine if most == resource.RLIM_INFINITY else min(machine, most)


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:8.2f} GiB" if count >= 2**29 else f"{count / 2**20:8.1f} MiB"
