"""Configurations: the recipe's values laid over a model's, and settings that do not go together."""

from __future__ import annotations

import pytest
import tiny
from built import build, refused
from transformers import PegasusConfig, T5Config

from engine.models.configuration import align_config, align_generation_config
from engine.recipe.schema import Model


def test_dropout_of_the_recipe_replaces_the_models(tmp_path):
    config = build(tiny.save("bart", tmp_path), model={"dropout": 0.25}).model.config
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.25, 0.25, 0.25)
    assert config.classifier_dropout != 0.25


def test_settings_that_do_not_go_together(tmp_path):
    folder = tiny.save("t5", tmp_path / "t5")
    refused("E2.53", folder, precision="fp16")
    refused("E2.48", folder, model={"family": "causal"})
    refused("E2.58")
    refused("E2.49", folder, model={"init": "random"}, quantization={"load_in_4bit": True})
    refused("E2.56", folder, quantization={"load_in_4bit": True}, lora={"enabled": False})
    refused("E2.50", folder, tokenizer={"train_vocab_size": 400})
    refused("E2.51", model={"init": "random", "config": {"model_type": "bart"}})
    refused("E4.9", model={"init": "random", "config": {"model_type": "no_such_type"}})
    refused("E2.54", folder, model={"trust_remote_code": True, "revision": "main"})


@pytest.mark.parametrize("config", [PegasusConfig(), T5Config()], ids=["pegasus", "t5"])
def test_a_configuration_may_lack_a_token_id_altogether(config):
    """transformers 5 declares only the ids that a family had: Pegasus and T5 know no first token."""
    assert not hasattr(config, "bos_token_id")
    tokenizer = tiny.tokenizer("bart")
    align_config(config, tokenizer, "seq2seq", Model())
    assert (config.pad_token_id, config.bos_token_id) == (tokenizer.pad_token_id, tokenizer.bos_token_id)
    assert config.decoder_start_token_id == 0


def test_a_model_that_names_no_start_token_gets_its_familys_usual_one():
    model, tokenizer = tiny.model("t5"), tiny.tokenizer("t5")
    model.config.decoder_start_token_id = None
    align_generation_config(model, tokenizer, "seq2seq")
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
