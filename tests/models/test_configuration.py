"""Configurations: the recipe's values laid over a model's, and settings that do not go together."""

from __future__ import annotations

import tiny
from built import build, refused


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
    refused("E2.50", folder, tokenizer={"train_vocab_size": 400})
    refused("E4.9", model={"init": "random", "config": {"model_type": "no_such_type"}})
    refused("E2.54", folder, model={"trust_remote_code": True, "revision": "main"})
