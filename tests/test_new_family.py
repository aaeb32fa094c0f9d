"""CONTRIBUTING.md's "a family of models", done: one row and one toy make a family that trains and decodes like any other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import runs
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine import Predictor, families
from engine.generation import search
from engine.prediction.files import examples_of

pytestmark = pytest.mark.slow


class MadeUpConfig(LlamaConfig):
    model_type = "made_up"


class MadeUpForCausalLM(LlamaForCausalLM):
    config_class = MadeUpConfig


@pytest.fixture(scope="module", autouse=True)
def registered():
    """As a release of transformers would bring it. It stays for the process: the auto classes have no way to forget."""
    AutoConfig.register("made_up", MadeUpConfig)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM)


@pytest.fixture
def row(monkeypatch):
    """The one row."""
    made_up = replace(families.FAMILIES["llama"], verified=True)
    monkeypatch.setitem(families.FAMILIES, "made_up", made_up)
    return made_up


@pytest.fixture
def toy(tmp_path):
    """The one toy: a folder with a tiny model of the family and a tokenizer."""
    folder = tmp_path / "model"
    values = tiny.config_values("llama", len(tiny.tokenizer("llama")))
    values.pop("model_type")
    torch.manual_seed(0)
    MadeUpForCausalLM(MadeUpConfig(**values)).save_pretrained(folder)
    tiny.tokenizer("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_it_trains_and_decodes_as_generate_does(tmp_path, row, toy, lora):
    recipe = runs.write_recipe(
        tmp_path, "llama", model__name_or_path=str(toy), training__max_steps=2, lora__enabled=lora
    )
    results = runs.train(recipe)
    assert results["last_step"] == 2 and results["model"]["model_type"] == "made_up"
    predictor = Predictor.from_run(tmp_path / "run")
    bundle = predictor.bundle
    if lora:
        adapted = {name.rsplit(".", 1)[-1] for name, part in bundle.model.named_modules() if hasattr(part, "lora_A")}
        assert adapted == set(row.lora_targets)
    summaries = predictor.predict_batch(tiny.TEXTS[:5], show_progress=False, num_beams=3, max_new_tokens=8)
    assert search.unverified(bundle.model if not lora else bundle.model.get_base_model()) is None
    encoder = bundle.text_encoder()
    for dialogue, ours in zip(tiny.TEXTS[:5], summaries, strict=True):
        ids = torch.tensor([predictor.features(examples_of([dialogue]))[0].input_ids])
        theirs = bundle.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=8,
            eos_token_id=list(encoder.stop_token_ids) or None,
        )  # fmt: skip
        assert encoder.decode(theirs[0, ids.shape[1] :].tolist()) == ours


def test_without_its_row_it_is_handed_back(tmp_path, toy):
    runs.train(runs.write_recipe(tmp_path, "llama", model__name_or_path=str(toy), training__max_steps=2))
    predictor = Predictor.from_run(tmp_path / "run")
    assert "made_up was never checked" in search.unverified(predictor.bundle.model)
    assert len(predictor.predict_batch(tiny.TEXTS[:2], show_progress=False, num_beams=2, max_new_tokens=4)) == 2
