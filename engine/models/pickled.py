"""Pickled weights (`pytorch_model*.bin`) as a safetensors copy of their model folder, made once.

Only torch's restricted reader sees the files. It builds tensors and plain containers and runs nothing; whatever holds more
than tensors by name is refused here. Everything after that reads the copy.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.runtime import atomic
from engine.runtime.lock import taking_turns
from engine.runtime.own_cache import cache_folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("engine.models")

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ORIGIN_FILE = "converted_from.json"  # in a copy: the hub commit and the files that it was made from
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's switch that opens pickle to code again
_SHARD = re.compile(r"pytorch_model[A-Za-z0-9._-]*\.bin")
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")


def only_pickled(folder: Path) -> bool:
    """Whether a model folder has pickled weights and no others. Adapters of that kind are not read."""
    adapter = (folder / "adapter_config.json").is_file()
    found = any((folder / name).is_file() for name in (SINGLE, INDEX))
    return found and not adapter and not any(folder.glob("*.safetensors"))


def cached_copy(folder: Path, *, code: bool = False) -> Path:
    """The safetensors copy of a checked folder, below the Hugging Face cache; made where it is not there yet.

    Args:
        code: copy the model's own Python files as well.

    Raises:
        EngineError: as `write_copy`; E6.6 where the cache cannot be written.
    """
    _refuse_unsafe()
    cache = cache_folder()
    copy = cache / _key(folder, code)
    if copy.is_dir():
        return copy
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with taking_turns(cache):
            _make_copy(folder, copy, code)
    except OSError as error:
        what = f"the safetensors copy of pickled weights could not be stored: {error}"
        raise EngineError("E6.6", what, str(cache), "free space or set HF_HOME", safe="nothing was loaded") from error
    return copy


def _make_copy(folder: Path, copy: Path, code: bool) -> None:
    if copy.is_dir():  # another process has made it meanwhile
        return
    with atomic.new_folder(copy) as partial:
        write_copy(folder, partial, code=code)
    log.info("%s has pickled weights: read by torch's restricted reader into %s, once", folder, copy)


def write_copy(folder: Path, output: Path, *, code: bool = False) -> None:
    """Write a folder's pickled weights to an empty folder as safetensors, beside its configuration and tokenizer.

    Types stay. A tensor that has several names is stored under each, so that every class finds the names it looks for.

    Raises:
        EngineError: E2.40 where a switch makes pickle unsafe; E4.3 for files that hold anything but tensors; E4.4 for an
            index that names other files than those beside it.
    """
    from safetensors.torch import save_file

    _refuse_unsafe()
    shards = _shards(folder)
    names: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        last = len(shards)
        name = "model.safetensors" if last == 1 else f"model-{number:05}-of-{last:05}.safetensors"
        tensors = {key: value.detach().clone().contiguous() for key, value in _read(shard).items()}
        try:
            save_file(tensors, output / name, metadata={"format": "pt"})
        except (ValueError, KeyError) as error:  # a type that safetensors does not have
            raise _unreadable(shard, f"{type(error).__name__}: {error}") from error
        names |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": names}
        atomic.write_json_atomically(output / "model.safetensors.index.json", index)
    for file in _companions(folder, code):
        shutil.copyfile(file, output / file.name)
    source = folder.resolve()
    commit = source.name if source.parent.name == "snapshots" else None
    record = {"commit": commit, "files": [shard.name for shard in shards]}
    atomic.write_json_atomically(output / ORIGIN_FILE, record)


def _refuse_unsafe() -> None:
    if os.environ.get(UNSAFE):
        what = f"{UNSAFE} is set, which lets pickle files run code"
        raise EngineError("E2.40", what, "environment", "unset it", safe="nothing was written")


def _shards(folder: Path) -> list[Path]:
    """The weight files, in order. Raises: EngineError E4.3 where there are none, E4.4 for an index that points elsewhere."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise EngineError("E4.3", f"the folder holds no {SINGLE}", str(folder), "check the path")
    try:
        names = atomic.read_json(index).get("weight_map")
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError("E4.9", f"unreadable model file: {error}", str(index), "download it again") from error
    shards = set(names.values()) if isinstance(names, dict) and names else {None}
    for name in sorted(map(str, shards)):
        if not _SHARD.fullmatch(name) or not (folder / name).is_file():
            what = f"the weight index names {name!r}, which is no weight file of this folder"
            raise EngineError("E4.4", what, str(index), "download the model again from a source you trust")
    return [folder / name for name in sorted(shards)]


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of one file by name, left on the disk until they are used where the file's format allows it."""
    import torch

    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are no archives
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle and torch raise what they like at a file they cannot or may not read
        raise _unreadable(path, next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
    if not isinstance(content, dict) or not content:
        raise _unreadable(path, f"a {type(content).__name__} in place of tensors by name")
    for name, value in content.items():
        # A view larger than its memory would let a small file fill the disk.
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain or value.nbytes > value.untyped_storage().nbytes():
            raise _unreadable(path, f"{str(name)[:80]!r} is no plain tensor but {type(value).__name__}")
    return content


def _unreadable(path: Path, why: str) -> EngineError:
    what, advice = f"the weights cannot be read safely: {why}", "take a model with safetensors from a source you trust"
    return EngineError("E4.3", what, str(path), advice, safe="nothing was written")


def _companions(folder: Path, code: bool) -> Iterator[Path]:
    """Configuration and tokenizer files, and the model's code where it may run."""
    patterns = (*_COPIED, "*.py") if code else _COPIED
    for file in sorted(folder.iterdir()):
        index = file.name.endswith(".index.json") or file.name == ORIGIN_FILE
        if file.is_file() and not index and any(file.match(pattern) for pattern in patterns):
            yield file


def _key(folder: Path, code: bool) -> str:
    """Names a copy by what it is made from: the small files, and size, time and samples of the weights."""
    digest = hashlib.sha256()
    for file in _companions(folder, code):
        digest.update(f"{file.name} {atomic.sha256_of(file)}\n".encode())
    for shard in _shards(folder):
        status = shard.stat()
        digest.update(f"{shard.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        atomic.add_samples(digest, shard)
    return digest.hexdigest()[:32]
