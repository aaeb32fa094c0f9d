"""Recipes written for tests."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from engine import load_recipe
from engine.errors import EngineError

GOOD = """\
model:
  name_or_path: some/model
data:
  train_file: train.csv
  validation_file: dev.csv
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def errors(*args, **kwargs) -> list[str]:
    """The lines a user would see."""
    with pytest.raises(EngineError) as caught:
        load_recipe(*args, **kwargs)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert lines and all(line.startswith(f"error {caught.value.code}: ") and len(line) < 500 for line in lines)
    return lines
