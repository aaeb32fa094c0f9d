"""The recipes that come with the package, and the quickstart's data: found by name from any folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
# Installed they lie inside the package, in a checkout beside it.
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
_DATA = ("train_file", "validation_file", "test_file")


def names() -> list[str]:
    """What a command line can call a recipe by: `kobart` for recipes/kobart.yaml."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find(path: Path, name: str = "") -> Path:
    """`path` where it is a file; else the shipped recipe of that name, where there is one; else `path` again.

    Args:
        name: what the user wrote, where `path` was made from it: `base/seq2seq.yaml` in somebody's folder.
    """
    name = name or str(path).removeprefix("recipes/")
    shipped = RECIPES / (name if name.endswith(".yaml") else f"{name}.yaml")
    return shipped if not os.path.isfile(path) and os.path.isfile(shipped) else path


def with_data(values: dict[str, Any], file: Path) -> None:
    """Let a shipped recipe find the data beside it: `recipes/quickstart/train.csv` is there in a checkout alone."""
    data = values.get("data")
    if not file.is_relative_to(RECIPES) or not isinstance(data, dict):
        return
    for key in _DATA:
        name = data.get(key)
        if isinstance(name, str) and name.startswith("recipes/") and not os.path.exists(name):
            beside = RECIPES.joinpath(name.removeprefix("recipes/"))
            data[key] = str(beside) if beside.is_file() else name
