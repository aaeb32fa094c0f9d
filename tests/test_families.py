"""The table of families against transformers' own classes, on models that have shapes but no contents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from engine import families


def hollow(model_type: str) -> torch.nn.Module:
    """A model of the family with one layer in each stack and the sizes of transformers' defaults."""
    row = families.of(model_type)
    config = AutoConfig.for_model(model_type, **dict.fromkeys(row.depths, 1))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    auto = AutoModelForSeq2SeqLM if row.kind == "seq2seq" else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_each_row_says_what_transformers_has(model_type: str) -> None:
    row, model = families.of(model_type), hollow(model_type)
    config = model.config
    assert row.kind == ("seq2seq" if config.is_encoder_decoder else "causal")
    assert len(row.depths) == (2 if config.is_encoder_decoder else 1)
    have = [key for key in families.DROPOUTS if isinstance(getattr(config, key, None), int | float)]
    assert list(row.dropouts) == have
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    gates = {"wi", "wi_0", "wi_1"} if "wi" in row.lora_targets else set()  # T5 has the first, T5 1.1 the others
    assert set(row.lora_targets) - gates <= leaves and (not gates or gates & leaves)


def test_a_row_that_is_added_counts_at_once_and_others_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for unknown in ("made_up", None, ["t5"]):
        assert families.of(unknown) == families.Family()
    monkeypatch.setitem(families.FAMILIES, "made_up", replace(families.of("llama"), capturable=False))
    assert families.of("made_up").verified and not families.of("made_up").capturable
