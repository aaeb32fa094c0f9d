"""Models built from a recipe in one call, their logits, and refusals held against their error code."""

from __future__ import annotations

import pytest
import torch

from engine.errors import EngineError
from engine.models.build import build_model
from engine.recipe.schema import Recipe

CPU = torch.device("cpu")
SPOKEN = "#Person1#는 #Person2#에게 #PhoneNumber#를 알려 준다."


def recipe(folder=None, *, model=None, **sections):
    named = {} if folder is None else {"name_or_path": str(folder)}
    return Recipe(model=named | (model or {}), **sections)


def build(*args, precision="fp32", **sections):
    return build_model(recipe(*args, **sections), device=CPU, precision=precision)


def logits(model, family):
    ids = torch.tensor([[5, 6, 7, 300, 301, 9]])
    extra = {"decoder_input_ids": ids} if family in ("bart", "t5", "seq2seq") else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits


def refused(code, *args, **sections):
    with pytest.raises(EngineError) as caught:
        build(*args, **sections)
    assert caught.value.code == code, str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)
