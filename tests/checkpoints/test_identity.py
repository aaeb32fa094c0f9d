"""What may change between a checkpoint and its resume."""

from __future__ import annotations

import json

import pytest
from checkpoint_toys import IDENTITY, open_store, save

from engine.checkpoints import identity
from engine.errors import EngineError
from engine.recipe.schema import Recipe

CHANGES = [
    ("training.learning_rate", 2e-4),
    ("data", {"train": "abd"}),
    ("tokenizer", "other"),
    ("training.seed", 1),
    ("world_size", 2),
]


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_changes_are_refused_with_both_values(tmp_path, key, value):
    store = open_store(tmp_path)
    save(store, 1)
    with pytest.raises(EngineError, match=r"error E5\.5") as caught:
        open_store(tmp_path, identity=IDENTITY | {key: value}).load_state(tmp_path / "checkpoint-1")
    text = str(caught.value)
    assert (
        f"{key}: " in text
        and json.dumps(value) in text
        and json.dumps(IDENTITY.get(key, "(absent)")).strip('"') in text
    )


def test_several_changes_are_told_at_once(tmp_path):
    save(open_store(tmp_path), 1)
    changed = IDENTITY | {"training.learning_rate": 1.0, "tokenizer": "x"}
    with pytest.raises(EngineError) as caught:
        open_store(tmp_path, identity=changed).load_state(tmp_path / "checkpoint-1")
    assert "training.learning_rate: 0.0001 -> 1.0" in str(caught.value) and 'tokenizer: "t" -> "x"' in str(caught.value)


def test_allowed_changes_are_logged_and_the_rest_still_refused(tmp_path, caplog):
    save(open_store(tmp_path), 1)
    two = {"world_size": 2, "training.gradient_accumulation_steps": 1}
    store = open_store(tmp_path, identity=IDENTITY | two, allow_change=tuple(two))
    with caplog.at_level("WARNING", logger="engine.checkpoints"):
        store.load_state(tmp_path / "checkpoint-1")
    with pytest.raises(EngineError, match="rows of one update would change from 8 to 16"):
        open_store(tmp_path, identity=IDENTITY | {"world_size": 2}, allow_change=["world_size"]).load_state(
            tmp_path / "checkpoint-1"
        )
    with pytest.raises(EngineError, match=r"error E2\.34"):
        open_store(tmp_path, allow_change=["training.seed"])


def test_identity_leaves_out_what_changes_no_number():
    recipe, other = Recipe(), Recipe()
    other.experiment.name, other.tracking.report_to, other.training.logging_steps = "b", [], 1
    other.checkpoint.sync, other.data.train_file = True, "elsewhere.csv"
    assert identity.identity_of(recipe, data="d") == identity.identity_of(other, data="d")
    other.training.seed = 43
    assert identity.identity_of(recipe) != identity.identity_of(other)
    assert identity.identity_of(recipe, **{"training.seed": 9})["training.seed"] == 9, "values in force win"
