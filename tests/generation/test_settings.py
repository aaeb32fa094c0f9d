"""Rules of GenerationSettings: precedence, limits, one-line errors, what is shown."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
from generation_toys import (
    batch,
    one_thread,  # noqa: F401
    shared,
)
from transformers import GenerationConfig
from transformers.utils.logging import warning_once

from engine.generation.api import generate
from engine.generation.settings import GenerationSettings

ORIGINAL = {
    "num_beams": 5,
    "max_new_tokens": 100,
    "min_new_tokens": 30,
    "no_repeat_ngram_size": 3,
    "length_penalty": 1.0,
    "repetition_penalty": 1.5,
    "early_stopping": True,
}
KOBART = {
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "eos_token_id": [1],
    "forced_eos_token_id": 2,
    "pad_token_id": 3,
}


def resolve(values, own=None, encoder_decoder=True) -> GenerationSettings:
    return GenerationSettings.resolve(
        values, model_generation_config=GenerationConfig(**own or {}), is_encoder_decoder=encoder_decoder
    )


def test_settings_of_the_original_system():
    settings = resolve(ORIGINAL, KOBART)
    assert {name: getattr(settings, name) for name in ORIGINAL} == ORIGINAL


def test_what_the_model_forces_is_shown():
    shown = resolve(ORIGINAL, KOBART).describe()
    assert shown["forced_eos_token_id"] == 2
    assert shown["eos_token_id"] == [1]
    assert shown["decoder_start_token_id"] == 2
    assert shown["repetition_scope"] == "all"
    assert shown["max_new_tokens"] == 100
    assert "max_length" not in shown


def test_forced_token_can_be_switched_off():
    settings = resolve({"forced_eos_token_id": -1}, KOBART)
    assert settings.generate_arguments(1)["forced_eos_token_id"] is None
    assert settings.describe()["forced_eos_token_id"] is None


def test_given_beats_model_beats_default():
    settings = resolve({"num_beams": 3}, {"num_beams": 7, "length_penalty": 2.0})
    assert (settings.num_beams, settings.length_penalty, settings.early_stopping) == (3, 2.0, False)


def test_none_means_not_given():
    assert resolve({"num_beams": None}, {"num_beams": 7}).num_beams == 7


def test_new_tokens_beat_length_with_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        settings = resolve({"max_new_tokens": 20, "max_length": 64})
    assert settings.generate_arguments(1)["max_length"] == 21
    assert len(caplog.records) == 1
    assert "20" in caplog.text and "64" in caplog.text


@pytest.mark.parametrize("own", [{}, {"max_new_tokens": 128}, {"max_length": 142}])
def test_length_alone_works(own, caplog):
    with caplog.at_level(logging.WARNING):
        settings = resolve({"max_length": 30}, own)
    assert settings.new_token_limit(1) == 29
    assert not caplog.records


def test_new_tokens_silently_replace_the_models_length(caplog):
    with caplog.at_level(logging.WARNING):
        assert resolve({"max_new_tokens": 20}, {"max_length": 142}).new_token_limit(1) == 20
    assert not caplog.records


def test_no_limit_at_all():
    assert resolve({}).max_new_tokens == 100


def test_scope_depends_on_the_family():
    assert resolve({}, encoder_decoder=False).repetition_scope == "output"
    assert resolve({}, encoder_decoder=True).repetition_scope == "all"
    assert resolve({"repetition_scope": "all"}, encoder_decoder=False).repetition_scope == "all"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_new_tokens": 0}, ("max_new_tokens", "0")),
        ({"max_new_tokens": -3}, ("max_new_tokens", "-3")),
        ({"max_length": 0}, ("max_length", "0")),
        ({"max_length": 0, "max_new_tokens": 5}, ("max_length", "0")),
        ({"max_new_tokens": 2.5}, ("max_new_tokens", "2.5")),
        ({"num_beams": 0}, ("num_beams", "0")),
        ({"num_beams": True}, ("num_beams", "True")),
        ({"num_return_sequences": 3, "num_beams": 2}, ("num_return_sequences=3", "num_beams=2")),
        ({"min_new_tokens": 30, "max_new_tokens": 20}, ("min_new_tokens=30", "max_new_tokens=20")),
        ({"min_new_tokens": 30, "max_length": 30}, ("min_new_tokens=30", "max_length=30")),
        ({"min_length": 40, "max_length": 30}, ("min_length=40", "max_length=30")),
        ({"min_new_tokens": -1}, ("min_new_tokens", "-1")),
        ({"repetition_penalty": 0}, ("repetition_penalty", "0")),
        ({"repetition_penalty": -1.5}, ("repetition_penalty", "-1.5")),
        ({"temperature": 0.0}, ("temperature", "0.0")),
        ({"top_p": 1.5}, ("top_p", "1.5")),
        ({"top_k": -1}, ("top_k", "-1")),
        ({"no_repeat_ngram_size": -1}, ("no_repeat_ngram_size", "-1")),
        ({"early_stopping": "sometimes"}, ("early_stopping", "sometimes")),
        ({"repetition_scope": "input"}, ("repetition_scope", "input")),
        ({"length_penalty": "long"}, ("length_penalty", "long")),
        ({"num_beens": 5}, ("num_beens",)),
    ],
)
def test_impossible_values(values, words):
    with pytest.raises(ValueError) as error:
        resolve(values)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words)


def test_whole_numbers_become_floats_where_transformers_insists():
    settings = resolve({"repetition_penalty": 2, "temperature": 1})
    assert isinstance(settings.repetition_penalty, float) and isinstance(settings.temperature, float)


def test_other_names_reach_generate():
    settings = resolve({"encoder_no_repeat_ngram_size": 2, "extra": {"renormalize_logits": True}})
    arguments = settings.generate_arguments(1)
    assert arguments["encoder_no_repeat_ngram_size"] == 2
    assert arguments["renormalize_logits"] is True


def test_length_of_a_causal_model_counts_the_prompt():
    model = shared("qwen3")
    settings = GenerationSettings.resolve(
        {"num_beams": 2, "max_length": 12},
        model_generation_config=model.generation_config,
        is_encoder_decoder=False,
    )
    inputs = batch(model, lengths=(9, 9))
    assert generate(model, **inputs, settings=settings).sequences.shape[1] == 3


def test_resolved_settings_raise_no_warning_in_transformers(caplog, recwarn):
    model = shared("bart")
    model.generation_config.max_length = 30
    try:
        settings = GenerationSettings.resolve(
            {"num_beams": 2, "max_new_tokens": 5},
            model_generation_config=model.generation_config,
            is_encoder_decoder=True,
        )
        out = generate(model, **batch(model), settings=settings)
    finally:
        model.generation_config.max_length = None
    assert out.sequences.shape[1] == 5
    assert not [w for w in recwarn if "max_" in str(w.message)]
    assert "max_new_tokens" not in caplog.text
    assert out.lengths.dtype == torch.long


@pytest.mark.parametrize(
    "values", [{"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, {"num_beams": 3, "do_sample": False}]
)
def test_settings_without_meaning_raise_no_warning_either(values, caplog):
    """A greedy call after training with beams, a beam search with a chat model's temperature."""
    model = shared("qwen3")
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.top_k = True, 0.6, 0.9, 20
    try:
        settings = GenerationSettings.resolve(
            values | {"max_new_tokens": 3}, model_generation_config=own, is_encoder_decoder=False
        )
        with caplog.at_level("WARNING", logger="transformers"), transformers_logs():
            generate(model, **batch(model), settings=settings)
    finally:
        own.do_sample = own.temperature = own.top_p = own.top_k = None
    assert not caplog.records


@contextmanager
def transformers_logs():
    """Their logger hands records to its own handler only; here the test's has to see them."""
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    warning_once.cache_clear()
    try:
        yield
    finally:
        logger.propagate = before
