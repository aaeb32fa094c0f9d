"""What is not verified runs in transformers' `generate`, whole, and the user is told: through the Python API."""

from __future__ import annotations

import logging
from copy import deepcopy

import pytest
import torch
from generation_toys import (
    VOCABULARY,
    batch,
    build,
    one_thread,  # noqa: F401
    resolved,
    shared,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, StopStringCriteria

from engine.generation import encoder, linears
from engine.generation.api import generate, generate_all

pytestmark = pytest.mark.slow

PATH = "engine.generation.search"


def tiny(kind: str, seed: int = 0, **values):
    """A model in float64 of a family that is not in the toys' table."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **values)
    maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return maker.from_config(config).eval().double()


def same(model, inputs, **values) -> None:
    """`generate` of ours and of transformers: the same new tokens."""
    untouched = deepcopy(model)
    ours = generate(model, **inputs, settings=resolved(model, repetition_scope="all", **values)).sequences
    theirs = untouched.generate(**inputs, **values)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    assert ours.tolist() == theirs[:, start:].tolist()


# --- positions that change with the length --------------------------------------------------------------------------

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 6.0, 9.0],
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}} | {
    "max_position_embeddings": 16
}


@pytest.mark.parametrize("beams", [1, 3])
def test_longrope_beyond_the_original_length(beams, told):
    for seed in range(3):
        model = build("phi3", seed, **LONGROPE).double()
        same(model, batch(model, lengths=(9, 6, 4, 8)), num_beams=beams, max_new_tokens=20)
    assert told() == ["positions of phi3 change with the length beyond 16 tokens"]


@pytest.mark.parametrize("beams", [1, 3])
def test_dynamic_positions_follow_the_longest_row_of_the_whole_batch(beams, told):
    ends = {"eos_token_id": [1, 2, 5, 7, 30, 31, 32, 33, 34, 40, 41, 42]}  # rows leave at different steps
    for seed in range(6):
        model = build("llama", seed, **DYNAMIC).double()
        same(model, batch(model, lengths=(12, 3, 5, 11)), num_beams=beams, max_new_tokens=24, **ends)
    assert told() == ["positions of llama change with the length beyond 16 tokens"]


@pytest.mark.parametrize(("kind", "scheme"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_growing_positions_are_ours_below_the_original_length(kind, scheme, told):
    model = build(kind, **scheme).double()
    same(model, batch(model, lengths=(9, 6, 4, 8)), num_beams=3, max_new_tokens=6)
    assert told() == []


# --- families that nobody checked -----------------------------------------------------------------------------------

_SMALL = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64}
_SMALL |= {"encoder_layers": 2, "decoder_layers": 2, "decoder_ffn_dim": 64, "init_std": 0.4}
_EXPERTS = {"num_experts": 2, "expert_capacity": 4}


def test_block_sparse_attention_sees_the_input_as_given(monkeypatch):
    """BigBird-Pegasus switches its attention with the padded length, and for good, so rows must not be cut to their own."""
    monkeypatch.setattr(encoder, "CPU_TOKENS_PER_PASS", 100)
    model = tiny("bigbird_pegasus", **_SMALL, max_position_embeddings=512, block_size=4, num_random_blocks=2)
    inputs = batch(model, lengths=(90, 33, 30, 28))
    same(model, inputs, num_beams=2, max_new_tokens=20)


def test_encoders_with_outputs_of_their_own():
    """Switch Transformers and NLLB-MoE read the encoder's router logits."""
    switch = tiny(
        "switch_transformers", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, **_EXPERTS
    )
    switch.generation_config.decoder_start_token_id = 0
    nllb = tiny("nllb-moe", **_SMALL, **_EXPERTS, encoder_sparse_step=1, decoder_sparse_step=1)
    for model in (switch, nllb):
        same(model, batch(model), num_beams=2, max_new_tokens=6)


def test_another_class_of_a_checked_family(told):
    """BART's decoder alone is a causal LM whose positions count padding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build("bart").config).eval().double()
    assert not model.config.is_encoder_decoder
    same(model, batch(model), num_beams=3, max_new_tokens=8)
    assert told() == ["model type bart was never checked"]


def test_a_changed_class_of_a_checked_family(told):
    class Louder(type(build("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Louder(build("llama").config).eval().double()
    same(model, batch(model), num_beams=3, max_new_tokens=8)
    assert told() == ["Louder is not the class of llama that was checked"]


def test_told_once_per_process(told):
    model = shared("bart")
    settings = resolved(model, num_beams=2, max_new_tokens=3, max_time=60.0)
    generate_all(model, [[7, 8], [9]], settings, pad_token_id=3, max_batch_size=1)
    generate(model, **batch(model), settings=settings)
    assert told() == ["stopping criteria other than length and end tokens"]


# --- how they are run -----------------------------------------------------------------------------------------------


def stranger():
    return tiny("opt", hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)


@pytest.mark.parametrize("make", [stranger, lambda: build("qwen3")])
def test_layers_are_replaced_only_in_what_is_ours(make, monkeypatch):
    monkeypatch.setattr(linears, "MIN_WEIGHTS_TO_PACK", 1)
    model, packed = make().float(), set()
    head = model.get_output_embeddings()
    inner = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: packed.add("forward" in head.__dict__) or inner(*a, **k))
    generate(model, **batch(model), settings=resolved(model, num_beams=1, max_new_tokens=9))
    assert packed == {model.config.model_type == "qwen3" and linears._packing_works()}


def test_samples_come_from_the_generator_given():
    model = stranger()
    settings = resolved(model, do_sample=True, max_new_tokens=12, num_return_sequences=2)
    torch.manual_seed(3)
    theirs = model.generate(**batch(model), do_sample=True, max_new_tokens=12, num_return_sequences=2)[:, 9:]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert generate(model, **batch(model), settings=settings).sequences.tolist() == theirs.tolist()
    assert torch.equal(before, torch.get_rng_state())
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    first = generate(model, **batch(model), settings=settings, generator=one).sequences.tolist()
    second = generate(model, **batch(model), settings=settings, generator=one).sequences.tolist()
    other = generate(model, **batch(model), settings=settings, generator=two).sequences.tolist()
    assert first == theirs.tolist()
    assert first != second and first != other
    assert torch.equal(before, torch.get_rng_state())


def test_the_global_generator_is_put_back_after_an_error():
    model = stranger()
    settings = resolved(model, do_sample=True, max_new_tokens=4, bad_words_ids=[[VOCABULARY]])
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        generate(model, **batch(model), settings=settings, generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())


class Words:
    """As much of a tokenizer as stop strings need: token i is the text `<i>`."""

    def get_vocab(self):
        return {f"<{i}>": i for i in range(VOCABULARY)}

    def __len__(self):
        return VOCABULARY

    def convert_tokens_to_ids(self, token):
        return int(token[1:-1])


@pytest.mark.parametrize("make", [stranger, lambda: build("qwen3").double(), lambda: build("bart").double()])
@pytest.mark.parametrize("scope", ["all", "output"])
def test_stop_strings_reach_the_tokenizer(make, scope, monkeypatch):
    model = make()
    values = {"num_beams": 1, "max_new_tokens": 12}
    given = [[7, 8, 9], [10, 11]]
    pad = model.generation_config.pad_token_id or 0
    free = generate_all(model, given, resolved(model, **values), pad_token_id=pad, max_batch_size=1)
    stop = free[0][0].token_ids[2]
    vocabulary = Words().get_vocab()
    monkeypatch.setattr(
        StopStringCriteria, "clean_tokenizer_vocab", lambda *_, **__: (list(vocabulary), list(vocabulary.values()))
    )
    settings = resolved(model, stop_strings=[f"<{stop}>"], repetition_scope=scope, **values)
    found = generate_all(model, given, settings, pad_token_id=pad, max_batch_size=1, tokenizer=Words())
    expected = free[0][0].token_ids
    assert found[0][0].token_ids == expected[: expected.index(stop) + 1]


@pytest.mark.parametrize("make", [stranger, lambda: build("qwen3").double()])
def test_mask_and_scope_are_kept(make):
    model = make()
    mask = torch.full((VOCABULARY,), float("-inf"))
    mask[[40, 41, 42]] = 0.0
    inputs = batch(model)
    inputs["input_ids"][:, -3:] = torch.tensor([40, 41, 42])
    settings = resolved(model, num_beams=2, max_new_tokens=3, no_repeat_ngram_size=1, max_time=60.0)
    assert settings.repetition_scope == "output"
    for given in (mask, mask.repeat(4, 1)):
        found = generate(model, **inputs, settings=settings, vocabulary_mask=given).sequences.tolist()
        assert all(sorted(row) == [40, 41, 42] for row in found)


MODES = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "dola": {"dola_layers": "high"},
    "force_words": {"num_beams": 3, "force_words_ids": [[40]]},
}


@pytest.mark.parametrize("make", [lambda: shared("bart"), lambda: shared("qwen3"), stranger])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_modes_that_left_transformers_are_refused_in_its_words(mode, make, masked):
    model, values = make(), {"max_new_tokens": 5} | MODES[mode]
    with pytest.raises(ValueError, match="trust_remote_code") as theirs:
        model.generate(**batch(model), **values)
    mask = torch.zeros(VOCABULARY) if masked else None
    settings = resolved(model, repetition_scope="all", **values)
    with pytest.raises(ValueError) as ours:
        generate(model, **batch(model), settings=settings, vocabulary_mask=mask)
    assert str(ours.value) == str(theirs.value)


@pytest.fixture
def told(caplog, monkeypatch):
    """The reasons that a user saw, each time it was said."""
    monkeypatch.setattr("engine.generation.fallback._told", set())
    caplog.set_level(logging.WARNING, logger=PATH)
    return lambda: [r.message.partition(": ")[2] for r in caplog.records if r.name == PATH]
