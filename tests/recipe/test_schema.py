"""The recipe as a value: compared, pickled, checked on assignment, and described key by key."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from engine import load_recipe
from engine.recipe.load import expected
from engine.recipe.schema import SECTIONS, Recipe


def test_recipe_compares_by_value_and_pickles(good: Path) -> None:
    one, two = load_recipe(good, ["training.seed=42"]), load_recipe(good)
    assert one == two and one.origin("training.seed") != two.origin("training.seed")
    copy = pickle.loads(pickle.dumps(one))  # noqa: S301 - our own bytes
    assert copy == one and copy.origin("training.seed") == "command line"
    assert Recipe(**one.model_dump()) == one
    assert load_recipe(good, ["training.seed=43"]) != one and one != "recipe"


def test_values_are_checked_on_assignment_too(good: Path) -> None:
    recipe = load_recipe(good)
    with pytest.raises(ValueError):
        recipe.training.seed = "7"
    with pytest.raises(ValueError):
        recipe.training.sede = 7


def test_every_key_has_a_description_and_words_for_its_values() -> None:
    for section, model in SECTIONS.items():
        for key, declared in model.model_fields.items():
            assert declared.description and declared.description.rstrip().endswith("."), f"{section}.{key}"
            assert "a value" not in expected(section, key) or "sequence_bias" in key, expected(section, key)
