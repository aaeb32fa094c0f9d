"""Where models come from: hub ids and folders turned into a checked local folder, before any file of it is loaded.

A model folder is somebody else's data. Nothing in it may run code here, so pickled adapters, custom code, odd adapter
types and shard indexes that point elsewhere are refused by name, before transformers or peft see the folder. Their own
switches (`use_safetensors`, `trust_remote_code`, `local_files_only`) are set as well, but of these four transformers
refuses only the pickles: it passes over custom code, and follows indexes and links out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import PICKLES
from engine.errors import EngineError
from engine.models import pickled
from engine.runtime import atomic
from engine.runtime.faults import blaming

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_PICKLED_FILES = ["pytorch_model*.bin"]  # fetched where a repository has no safetensors
_HUB_SKIPPED = ["*/*", "consolidated*", "*.msgpack.index.json"]  # subfolders hold other formats of the same weights
_HUB_TIMEOUT = 8  # seconds until the hub counts as unreachable
_ADAPTER_TASKS = {None, "CAUSAL_LM", "SEQ_2_SEQ_LM"}
# These keys import a module, or read files written by pickle, or belong to methods that need such files.
_CODE_IN_ADAPTER = ("auto_mapping", "corda_config", "eva_config", "lora_ga_config", "loftq_config", "megatron_config")

BASE_FILE = "base_model.json"  # beside an adapter: which model it belongs to
OWN_GENERATION_FILE = "own_generation_config.json"  # what a model says by itself, where a run has written over it


@dataclass(frozen=True)
class BaseIdentity:
    """Which model a run started from: checked again on resume and by the tools that need the base of an adapter."""

    name: str
    revision: str | None
    config_sha256: str
    weights_sha256: str | None = None  # of samples of every weight file; None for random weights

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """A model as it was named, and the checked folder it was found in; None where it is built from a recipe alone."""

    name: str
    revision: str | None
    folder: Path | None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; anything else is exit 4 with the file's name."""
    with blaming("E4.9", "unreadable model file", path, "download it again"):
        return atomic.read_json(path, strict=False)  # Mamba's configurations hold Infinity


def blaming_folder(where: str | Path | None) -> AbstractContextManager[None]:
    """The border around all use of a model folder: what no closer look has named is E4.16, with the folder's name; but for
    bugs of ours, which keep their traceback.

    Args:
        where: the folder or its name; None where a recipe's `model.config` alone describes the model.
    """
    next = "check the folder's JSON files, or download it again" if where else "check model.config"
    return blaming("E4.16", "the model cannot be used", where or "model.config", next, wide=True)


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def has_weights(folder: Path) -> bool:
    """Whether files that hold weights are there, also such as are refused."""
    return any(path.suffix in {".safetensors", *PICKLES} for path in folder.iterdir())


def resolve(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    use_safetensors: bool | None = None,
) -> Path:
    """The local folder of a model, tokenizer or adapter; hub ids are downloaded or found in the hub cache.

    Args:
        name: an existing folder, or a hub id.
        weights: False leaves the weights where they are: configuration and tokenizer files only.
        use_safetensors: True refuses pickled weights. None reads them where there are no others: the folder is then the
            safetensors copy of the one that was found.

    Raises:
        EngineError: E4.1 where it cannot be had, E4.2 to E4.5 where it may not be loaded.
    """
    check_remote_code_settings(trust_remote_code, revision)
    with blaming_folder(name):
        allowed = weights and use_safetensors is not True
        folder = find(name, revision, weights=weights, allow_pickled=allowed, code=trust_remote_code)
        if allowed and pickled.only_pickled(folder):
            check_pickled_folder(folder, trust_remote_code=trust_remote_code)
            folder = pickled.cached_copy(folder, code=trust_remote_code)
        check_folder(folder, trust_remote_code=trust_remote_code, weights=weights)
    return folder


def find(
    name: str, revision: str | None = None, *, weights: bool = True, allow_pickled: bool = False, code: bool = False
) -> Path:
    """A folder as it is, or the snapshot of a hub id; unchecked. Raises: EngineError E4.1 where it cannot be had."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(name):
        raise EngineError("E4.1", "no such model folder, and not a hub id either", name, "check the path")
    patterns = [pattern for pattern in _HUB_FILES if weights or pattern != "*.safetensors"] + ["*.py"] * code
    folder = _download(name, revision, patterns)
    if weights and allow_pickled and not is_adapter(folder) and not any(folder.glob("*.safetensors")):
        # At the commit just found: a branch may move between the two.
        commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
        folder = _download(name, commit, _PICKLED_FILES)
    return folder


def check_remote_code_settings(trust_remote_code: bool, revision: str | None) -> None:
    """Remote code only at a pinned commit: a branch or tag may hold other code tomorrow."""
    if trust_remote_code and not (revision and _COMMIT.fullmatch(revision)):
        what = "model.trust_remote_code runs code that came with the model and needs a pinned commit"
        advice = "set model.revision to the 40-digit commit that you have read, or drop trust_remote_code"
        raise EngineError("E2.54", what, f"model.revision={revision}", advice)


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        kept = {"allow_patterns": patterns, "ignore_patterns": _HUB_SKIPPED}
        return Path(snapshot_download(name, revision=revision, etag_timeout=_HUB_TIMEOUT, **kept))
    except Exception as error:  # the client raises many unrelated types; each means that the model cannot be had
        raise _unavailable(name, revision, error) from error


def _unavailable(name: str, revision: str | None, error: Exception) -> EngineError:
    where = f"{name}{'@' + revision if revision else ''}"
    kind = type(error).__name__
    if kind == "GatedRepoError":
        advice = "accept the model's licence on its hub page, log in with `hf auth login`, and run again"
        return EngineError("E4.1", "this model is gated and your account has no access", where, advice)
    if kind in {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        advice = "check the spelling and the revision; private models need `hf auth login`"
        return EngineError("E4.1", "the hub has no such model or revision, and there is no such folder", where, advice)
    if isinstance(error, OSError) and getattr(error, "errno", None) is not None:
        what = f"the download could not be stored: {error}"
        return EngineError("E6.6", what, where, "free space or set HF_HOME", safe="nothing was loaded")
    return EngineError(
        "E4.1",
        "the model is neither in the local hub cache nor can the hub be reached",
        where,
        f"on a machine with network run `hf download {name} --local-dir FOLDER`, copy FOLDER here and set "
        "model.name_or_path=FOLDER, or point HF_HOME to a cache that holds it",
    )


def check_folder(folder: Path, *, trust_remote_code: bool = False, weights: bool = True) -> None:
    """Refuse what could run code or read outside the folder. Cheap: JSON and file names only."""
    generation = ("generation_config.json", OWN_GENERATION_FILE)
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", *generation):
        if (folder / name).is_file():
            _check_no_custom_code(folder / name, trust_remote_code)
    if is_adapter(folder):
        check_adapter_config(folder)
    if weights:
        _check_weights(folder)


def check_pickled_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """As `check_folder`, for a folder whose weights are pickle files that the restricted reader will open."""
    check_folder(folder, trust_remote_code=trust_remote_code, weights=False)
    _check_links(folder, sorted(folder.glob("pytorch_model*.bin")))


def _check_no_custom_code(path: Path, trusted: bool) -> None:
    found = sorted({"auto_map", "custom_generate", "custom_pipelines"} & _non_empty_keys(read_json(path)))
    if found and not trusted:
        what = f"the model ships its own code ({', '.join(found)}), which is not run by default"
        advice = "read that code; then set model.trust_remote_code=true and model.revision to the commit you read"
        raise EngineError("E4.2", what, str(path), advice)


def _non_empty_keys(value: Any) -> set[str]:
    """Keys at any depth whose values are not empty: nested configs (text_config) may carry code references too."""
    if isinstance(value, dict):
        own = {key for key, inner in value.items() if inner}
        return own.union(*(_non_empty_keys(inner) for inner in value.values()))
    if isinstance(value, list):
        return set().union(*(_non_empty_keys(inner) for inner in value))
    return set()


def _check_weights(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors.index.json")):
        _check_shard_index(path)
    shards = sorted(folder.glob("*.safetensors"))
    _check_links(folder, shards)
    if not shards:
        what = "the folder holds no weights (*.safetensors)"
        if pickles := sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES):
            what = f"the weights are in pickle files only ({', '.join(pickles[:3])}), which can run code when they are read"
        advice = "leave model.use_safetensors empty: pytorch_model.bin then goes through a reader that runs nothing"
        raise EngineError("E4.3", what, str(folder), advice)


def _check_links(folder: Path, shards: list[Path]) -> None:
    inside = folder.resolve()
    # The hub cache links from snapshots/<commit>/ to blobs/ of the same repository, which is the boundary there.
    boundary = inside.parent.parent if inside.parent.name == "snapshots" else inside
    for shard in shards:
        if not shard.resolve().is_relative_to(boundary):
            what = "a weight file is a link that leaves the model folder"
            raise EngineError("E4.4", what, str(shard), "copy the file in")


def _check_shard_index(path: Path) -> None:
    names = read_json(path).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else {None}
    for name in sorted(map(str, names)):
        if not _SHARD.fullmatch(name) or not (path.parent / name).is_file():
            what = f"the weight index names {name!r}, which is no safetensors file of this folder"
            raise EngineError("E4.4", what, str(path), "download the model again from a source you trust")


def check_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings, if they are plain LoRA; every other kind of adapter is refused.

    Returns:
        adapter_config.json as a dict.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')!r} (only LORA)")
    if config.get("task_type") not in _ADAPTER_TASKS:
        problems.append(f"task_type {config.get('task_type')!r}")
    problems += [key for key in _CODE_IN_ADAPTER if config.get(key)]
    if (config.get("megatron_core") or "megatron.core") != "megatron.core":  # the value that peft always writes
        problems.append("megatron_core")
    if not isinstance(config.get("target_modules"), str | list | None):
        problems.append("target_modules")
    if problems:
        what = f"the adapter asks for what is not loaded here: {', '.join(problems)}"
        raise EngineError("E4.5", what, str(path), "use a plain LoRA adapter")
    return config


def config_hash(config: dict[str, Any]) -> str:
    """sha256 of a model configuration, without the entries that differ between copies of the same model."""
    ignored = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "quantization_config"}
    kept = {key: value for key, value in config.items() if key not in ignored}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def identify(source: Source) -> BaseIdentity:
    """Identity of a model in a folder. A hub download without a revision is known by the commit it resolved to."""
    revision, folder = source.revision, source.folder.resolve()
    if revision is None and folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        revision = folder.name
    elif revision is None and (folder / pickled.ORIGIN_FILE).is_file():
        revision = read_json(folder / pickled.ORIGIN_FILE).get("commit")
    return BaseIdentity(source.name, revision, config_hash(read_json(folder / "config.json")), weights_hash(folder))


def weights_hash(folder: Path) -> str | None:
    """sha256 over sizes and evenly spaced samples of the folder's weight files; None where there are none."""
    digest = hashlib.sha256()
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}".encode())
        atomic.add_samples(digest, shard)
    return digest.hexdigest() if shards else None


def stored_types(folder: Path) -> dict[str, int]:
    """Number of the folder's weights by safetensors type (F32, BF16, F16, ...)."""
    found: dict[str, int] = {}
    for _, kind, size in _stored(folder):
        found[kind] = found.get(kind, 0) + size
    return found


def weight_names(folder: Path) -> set[str]:
    """Names of all weights in the folder's safetensors files."""
    return {name for name, _, _ in _stored(folder)}


def _stored(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Name, type and size of each stored weight, by the files' headers. Raises: EngineError E4.8 for a damaged file."""
    from safetensors import safe_open

    for shard in sorted(folder.glob("*.safetensors")):
        with (
            blaming("E4.8", "unreadable weight file", shard, "download it again"),
            safe_open(shard, framework="pt") as file,
        ):
            parts = {key: file.get_slice(key) for key in file.keys()}
            yield from ((key, part.get_dtype(), math.prod(part.get_shape())) for key, part in parts.items())


# Bases of adapters


def base_record(adapter: Path) -> dict[str, Any]:
    """Our own record of an adapter's base: its identity and `quantization`; empty beside an adapter made elsewhere."""
    return read_json(adapter / BASE_FILE) if (adapter / BASE_FILE).is_file() else {}


def resolve_base(
    adapter: Path,
    name: str | None = None,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
    use_safetensors: bool | None = None,
) -> Source:
    """The base of a checked adapter folder, found and held against the hashes that were kept with the adapter.

    Args:
        name: a base to take in place of the one that the adapter names.

    Raises:
        EngineError: E4.11 where the adapter names no base, or was trained on another one.
    """
    revision = None
    if name is None:
        name, revision = _base_of_adapter(adapter)
    rules = {"trust_remote_code": trust_remote_code, "use_safetensors": use_safetensors}
    folder = resolve(name, revision=revision, weights=weights, **rules)
    source = Source(name, revision, folder)
    if weights:
        _check_base(adapter, source)
    return source


def _base_of_adapter(adapter: Path) -> tuple[str, str | None]:
    """(name, revision) of the base an adapter was trained on: peft's record first, then our own."""
    recorded = base_record(adapter).get("name")
    config = check_adapter_config(adapter)
    name = config.get("base_model_name_or_path") or recorded
    if not name:
        raise EngineError("E4.11", "the adapter does not say which base it belongs to", str(adapter), "name the base")
    if recorded and not Path(name).is_dir() and Path(recorded).is_dir():
        name = recorded  # the folder was moved together with the project: its relative name still holds
    return name, config.get("revision")


def _check_base(adapter: Path, source: Source) -> None:
    wanted = base_record(adapter)
    found = identify(source).to_dict() if wanted else {}
    for key in ("config_sha256", "weights_sha256"):
        if wanted.get(key) is not None and wanted[key] != found[key]:
            what = f"the adapter was trained on another model than this one ({key} differs)"
            advice = f"give it the base it was trained on: {wanted.get('name')}"
            raise EngineError("E4.11", what, f"{adapter} on {source.folder}", advice)
