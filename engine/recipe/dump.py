"""Write a recipe out: resolved, standing alone, without secrets; on request with the origin of each value."""

from __future__ import annotations

import unicodedata
from typing import Any

from engine.errors import REDACTED, redact
from engine.recipe import yaml_subset
from engine.recipe.schema import Recipe

# Values under these keys of model.config reach no file, no tracker and no model folder.
SECRET_KEYS = {"token", "auth_token", "access_token", "use_auth_token", "hf_token", "password", "secret", "api_key"}


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that stands alone: no `base:`, every key, no secrets."""
    return _render(recipe, origins=False)


def print_recipe(recipe: Recipe) -> str:
    """As `dump`, with the origin of each value beside it: what --print-recipe prints."""
    return _render(recipe, origins=True)


def _render(recipe: Recipe, origins: bool) -> str:
    """YAML lines, section by section, with origins as comments in one column where the lines are short enough."""
    rows: list[tuple[str, str]] = []
    for section, values in recipe.model_dump().items():
        rows.append((f"{section}:", ""))
        for key, value in values.items():
            rows += _rows(recipe, (section, key), value)
    width = max(_columns(text) for text, _ in rows if _columns(text) <= 60)
    lines = [
        f"{text}{' ' * (width - _columns(text))}  # {where}" if origins and where else text for text, where in rows
    ]
    head = "# Resolved recipe; beside each value where it comes from.\n" if origins else "# Resolved recipe.\n"
    return head + "\n".join(lines) + "\n"


def _columns(text: str) -> int:
    """Width on a terminal, where Hangul takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def without_secrets(value: Any, key: str = "") -> Any:
    """A copy of a recipe's values, at any depth, that may be written and shown anywhere."""
    if isinstance(value, dict):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    return REDACTED if key.lower() in SECRET_KEYS else redact(value)


def _rows(recipe: Recipe, path: tuple[str, ...], value: Any) -> list[tuple[str, str]]:
    indent = "  " * (len(path) - 1) + yaml_subset.scalar(path[-1]) + ":"
    where = recipe.origin(".".join(path))
    value = without_secrets(value, path[-1])
    if isinstance(value, dict) and value:
        return [(indent, where), *(row for key in value for row in _rows(recipe, (*path, key), value[key]))]
    line = f"{indent} {yaml_subset.flow(value)}"
    if isinstance(value, list) and len(line) > 100:
        spaces = "  " * len(path)
        return [(indent, where), *((f"{spaces}- {yaml_subset.flow(item)}", "") for item in value)]
    return [(line, where)]
