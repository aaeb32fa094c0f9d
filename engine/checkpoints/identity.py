"""What must not change between a checkpoint and its resume, and what may when the user says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.recipe.dump import without_secrets
from engine.recipe.schema import SECTIONS

if TYPE_CHECKING:
    from engine.recipe.schema import Recipe

# Keys that change no number of the training: a resume may change them freely. Data files are compared by content
# instead.
FREE = (
    "experiment.*",
    "tracking.*",
    "checkpoint.*",
    "data.*_file",
    "data.max_test_samples",
    "data.cache",
    "training.logging_steps",
    "evaluation.num_samples",
    "runtime.timeout_seconds",
    "runtime.profile",
    "model.use_safetensors",
)
# Keys that may change when the user says so: the run stays well defined, though no longer the same bit for bit.
ALLOWABLE = (
    "world_size",
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "data.tokens_per_batch",
    "training.num_train_epochs",
    "training.max_steps",
    "training.early_stopping_*",
    "training.on_nonfinite",
    "training.max_skipped_updates",
    "training.auto_batch_size",
    "training.gradient_checkpointing",
    "model.name_or_path",
    "model.attn_implementation",
    "evaluation.*",
    "generation.*",
    "runtime.*",
    "distributed.*",
)
# Another metric, other words, or other rows.
_SCALE = ("evaluation.metric", "evaluation.rouge_tokenizer", "evaluation.max_samples", "evaluation.bertscore_model")
_ROWS = ("world_size", "training.per_device_train_batch_size", "training.gradient_accumulation_steps")


def identity_of(recipe: Recipe, **facts: Any) -> dict[str, Any]:
    """What must not change between a checkpoint and its resume, as flat `section.key: value`.

    Args:
        facts: things that the recipe does not say: `data` and `tokenizer` fingerprints, `base` (the identity of the
            base model), `world_size`; and recipe keys whose value in force is another one, under their dotted names.
    """
    values = {
        f"{section}.{key}": value
        for section, keys in without_secrets(recipe.model_dump(mode="json")).items()
        for key, value in keys.items()
    }
    merged = values | json.loads(json.dumps(facts))
    return {key: value for key, value in sorted(merged.items()) if not _any_match(key, FREE)}


def _default(key: str, missing: object) -> object:
    """What a recipe says where it does not name the key; `missing` for facts that are no keys of a recipe."""
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields.get(name) if section in SECTIONS else None
    return missing if field is None else json.loads(json.dumps(field.get_default(call_default_factory=True)))


def _any_match(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def check_allowed(allowed: Sequence[str]) -> None:
    """Raises: EngineError E2 for a key that no flag makes safe to change."""
    for key in allowed:
        if not _any_match(key, ALLOWABLE):
            what = f"a resumed run cannot change {key}"
            raise EngineError("E2.34", what, "--allow-change", "start a new run instead")


def scale_of_scores(keys: Iterable[str]) -> list[str]:
    """Those of the keys without which an earlier score and a later one do not compare."""
    return [key for key in keys if key in _SCALE]


def changes(
    stored: Mapping[str, Any], current: Mapping[str, Any], allowed: Sequence[str], where: Path
) -> dict[str, str]:
    """Compare a checkpoint's identity with the present one; returns the allowed differences by key, as text for the log.

    Raises:
        EngineError: E5.5 naming every other difference, with both values.
    """
    missing = object()
    # A key that the checkpoint's version did not know stood at its default; and earlier versions kept secrets.
    unnamed = {key: value for key, value in current.items() if value == _default(key, missing)}
    stored = unnamed | without_secrets({key: value for key, value in stored.items() if not _any_match(key, FREE)})
    differing = {
        key: f"{key}: {_shown(stored.get(key, missing), missing)} -> {_shown(current.get(key, missing), missing)}"
        for key in sorted({*stored, *current})
        if stored.get(key, missing) != current.get(key, missing)
    }
    refused = {key: text for key, text in differing.items() if key not in allowed}
    if not refused and _rows(stored) != _rows(current):
        refused = {key: text for key, text in differing.items() if key in _ROWS}
        what = f"the rows of one update would change from {_rows(stored)} to {_rows(current)}: " + "; ".join(
            refused.values()
        )
        raise EngineError("E5.6", what, str(where), "keep ranks x batch size x accumulation as it was")
    if refused:
        flags = [f"--allow-change {key}" for key in refused if _any_match(key, ALLOWABLE)]
        step = (
            f"undo the change, or add {' '.join(flags)}"
            if len(flags) == len(refused)
            else "undo the change, or start a new run"
        )
        what = "this run differs from the checkpoint's: " + "; ".join(refused.values())
        raise EngineError("E5.5", what, str(where), step)
    return differing


def _rows(identity: Mapping[str, Any]) -> int | None:
    """Rows of one update over all ranks, where the identity says."""
    factors = [identity.get(key) for key in _ROWS]
    return factors[0] * factors[1] * factors[2] if all(isinstance(factor, int) for factor in factors) else None


def _shown(value: Any, missing: object) -> str:
    text = "(absent)" if value is missing else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
