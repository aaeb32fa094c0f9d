"""Recipes written out: they are recipes again, name every origin and hold no secret."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from written import errors, write

from engine import load_recipe
from engine.recipe.dump import dump, print_recipe
from engine.recipe.schema import SECTIONS

ODD = '1e5 no null ~ - 0x1f 12:30 2024-01-01 << = [ " \\ é😀 y true 1_000 010 +1 .5 *a &a !x % @ ` # : , {'.split()
ODD += ["", " x", "x ", "a: b", "# c", "\t", "줄\n바꿈", "\u2028", "\x85", "\ufeff", "\x7f"]


def test_dump_and_print_are_recipes_again(good: Path, tmp_path: Path) -> None:
    config = {
        "d_model": 64,
        "empty": {},
        "items": [1, 2.5e-7, None, True, [], {"k": "v"}],
        "odd": dict(zip(map(str, range(99)), ODD, strict=False)),
    }
    recipe = load_recipe(
        good,
        {
            "model.config": config,
            "training.learning_rate": 1e-7,
            "experiment.notes": "".join(ODD),
            "lora.target_modules": ODD[:4],
        },
    )
    for text in (dump(recipe), print_recipe(recipe)):
        again = load_recipe(write(tmp_path, text, "again.yaml"))
        assert again == recipe and again.model_dump() == recipe.model_dump()
        assert yaml.safe_load(text) == recipe.model_dump(), "a YAML 1.1 reader sees the same values"
        assert dump(again) == dump(recipe)


@pytest.mark.parametrize("text", ODD)
def test_odd_text_survives(good: Path, tmp_path: Path, text: str) -> None:
    recipe = load_recipe(good, {"experiment.notes": text, f"model.config.{'k'}": {text: text}})
    again = load_recipe(write(tmp_path, dump(recipe), "again.yaml"))
    assert again.experiment.notes == text and again.model.config == {"k": {text: text}}


def test_print_recipe_names_every_origin(good: Path) -> None:
    text = print_recipe(load_recipe(good, ["training.seed=5"]))
    rows = {line.split(":")[0].strip(): line for line in text.splitlines() if "  # " in line}
    assert rows["seed"].endswith("  # command line") and rows["train_file"].endswith("  # r.yaml:4")
    keys = sum(len(section.model_fields) for section in SECTIONS.values())
    assert len([line for line in text.splitlines() if "  # " in line]) == keys
    columns = {line.index("  # ") for line in text.splitlines() if "  # " in line and line.isascii() and len(line) < 80}
    assert len(columns) == 1, "comments stand in one column"


def test_secrets_are_kept_out_of_dumps_and_errors(good: Path) -> None:
    secret = "hf_" + "a1B2c3D4" * 4
    recipe = load_recipe(
        good, {"experiment.notes": f"{secret} https://me:pass@host/x?token=abcd1234", "model.config.token": "t0p"}
    )
    for text in (dump(recipe), print_recipe(recipe)):
        assert secret not in text and "pass@" not in text and "abcd1234" not in text and "t0p" not in text
        assert load_recipe(write(good.parent, text, "again.yaml")).experiment.notes
    assert secret not in "".join(errors(good, [f"training.seed={secret}"]))
