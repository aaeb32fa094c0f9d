"""Write a recipe out: resolved, standing alone, without secrets; on request with the origin of each value."""

from __future__ import annotations

from typing import Any

from engine.errors import REDACTED, redact
from engine.recipe import yaml_subset
from engine.recipe.schema import Recipe

# Values under these keys of model.config reach no file, no tracker and no model folder.
SECRET_KEYS = {"token", "auth_token", "access_token", "use_auth_token", "hf_token", "password", "secret", "api_key"}


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that stands alone: no `base:`, every key, no secrets."""
    return "# Resolved recipe.\n" + yaml_subset.write(without_secrets(recipe.model_dump()))


def print_recipe(recipe: Recipe) -> str:
    """As `dump`, with the origin of each value beside it: what --print-recipe prints."""
    text = yaml_subset.write(without_secrets(recipe.model_dump()))
    lines = text.splitlines()
    # The comments stand in one column beside the lines that allow it: short ones, without Hangul of double width.
    column = max(len(line) for line in lines if len(line) <= 60 and line.isascii())
    keys = {number: path for path, number in reversed(yaml_subset.parse(text).lines.items())}  # a line's outermost key
    for number, path in keys.items():
        line = lines[number - 1]
        if len(path) > 1:
            lines[number - 1] = f"{line:<{column if line.isascii() else 0}}  # {recipe.origin('.'.join(path))}"
    return "# Resolved recipe; beside each value where it comes from.\n" + "\n".join(lines) + "\n"


def without_secrets(value: Any, key: str = "") -> Any:
    """A copy of a recipe's values, at any depth, that may be written and shown anywhere."""
    if isinstance(value, dict):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    return REDACTED if key.lower() in SECRET_KEYS else redact(value)
