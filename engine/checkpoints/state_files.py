"""Nested state (an optimizer's, a random generator's) as two files: a JSON tree, in which every tensor is a name, and one
safetensors file that holds the tensors under those names. Both together restore it bit for bit. Nothing here reads or writes
pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.runtime.atomic import read_json


def flatten_state(value: Any) -> tuple[Any, dict[str, Any]]:
    """A nested state as (JSON tree, tensors by name). The same tensor met twice is stored once.

    Dicts keep the type of their keys and tuples stay tuples, which optimizers insist on; floats survive exactly because
    JSON writes the shortest decimal that reads back as the same double.
    """
    tensors: dict[str, Any] = {}
    names: dict[tuple, str] = {}
    return _pack(value, tensors, names), tensors


def _pack(value: Any, tensors: dict[str, Any], names: dict[tuple, str]) -> Any:
    import numpy
    import torch

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value, tensors, names)
    if isinstance(value, numpy.ndarray):
        return {"array": _pack_tensor(torch.from_numpy(_signed(value)), tensors, names), "dtype": str(value.dtype)}
    if isinstance(value, numpy.generic):
        return _pack(value.item(), tensors, names)
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, tensors, names)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_pack(item, tensors, names) for item in value]}
    raise TypeError(f"cannot store a {type(value).__name__} in a checkpoint")


def _signed(array: Any) -> Any:
    # Same bits under a dtype that every torch and safetensors version knows.
    return (
        array.view(f"i{array.dtype.itemsize}").copy()
        if array.dtype.kind == "u" and array.dtype.itemsize > 1
        else array.copy()
    )


def _pack_tensor(tensor: Any, tensors: dict[str, Any], names: dict[tuple, str]) -> dict[str, str]:
    tensor = tensor.detach()
    identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if tensor.numel() == 0 or identity not in names:
        names[identity] = f"t{len(tensors)}"
        tensors[names[identity]] = tensor
    return {"tensor": names[identity]}


def restore_state(tree: Any, tensors: Mapping[str, Any]) -> Any:
    """Inverse of `flatten_state`. Raises ValueError or KeyError for a tree that it did not write."""
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("a bare list in a stored state")
        return tree
    if "dict" in tree:
        return {key: restore_state(item, tensors) for key, item in tree["dict"]}
    if "list" in tree:
        return [restore_state(item, tensors) for item in tree["list"]]
    if "tuple" in tree:
        return tuple(restore_state(item, tensors) for item in tree["tuple"])
    if "float" in tree:
        return float(tree["float"])
    if "array" in tree:
        return tensors[tree["array"]["tensor"]].numpy().view(tree["dtype"])
    return tensors[tree["tensor"]]


def write_state(folder: Path, name: str, tree: Any, tensors: Mapping[str, Any]) -> list[Path]:
    """Write `<name>.json` and, if there are tensors, `<name>.safetensors`; returns the paths written."""
    from safetensors.torch import save_file

    written = [folder / f"{name}.json"]
    written[0].write_text(json.dumps(tree, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    if tensors:
        written.append(folder / f"{name}.safetensors")
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, written[1])
    return written


def read_state(folder: Path, name: str) -> Any:
    """Inverse of `write_state` after `flatten_state`; tensors arrive on the CPU."""
    from safetensors.torch import load_file

    tensor_file = folder / f"{name}.safetensors"
    tensors = load_file(tensor_file) if tensor_file.exists() else {}
    return restore_state(read_json(folder / f"{name}.json"), tensors)


def check_alike(saved: Any, own: Any, at: str) -> None:
    """Hold a restored state against the one that it is to replace: the same names, kinds and lengths.

    Raises:
        ValueError: naming the first place that differs, before anything takes the state over.
    """
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping) or saved.keys() != own.keys():
            raise ValueError(f"{at} has other entries than {', '.join(map(str, own)) or 'none'}")
        for key in own:
            check_alike(saved[key], own[key], f"{at}.{key}")
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise ValueError(f"{at} does not have {len(own)} entries")
        for index, pair in enumerate(zip(saved, own, strict=True)):
            check_alike(*pair, f"{at}.{index}")
    elif isinstance(own, int | float) and not isinstance(own, bool):
        if not isinstance(saved, int | float) or isinstance(saved, bool) or not math.isfinite(saved):
            raise ValueError(f"{at} is no number")
    elif type(saved) is not type(own):
        raise ValueError(f"{at} is not of type {type(own).__name__}")
