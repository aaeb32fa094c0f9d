"""Names that other trainers give to our keys."""

from __future__ import annotations

from engine.recipe.schema import SECTIONS
from engine.recipe.synonyms import _THEIRS


def test_synonyms_point_at_real_keys_and_shadow_none() -> None:
    for ours, names in _THEIRS.items():
        section, _, key = ours.partition(".")
        assert key in SECTIONS[section].model_fields, ours
        assert key not in names.split(), ours
