"""Our decoding against transformers' `generate`: whole tensors and scores, on tiny random models of four families.

Case numbers in comments are those of the project's list of parity cases.
"""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from generation_toys import (
    FAMILIES,
    OTHERS,
    VOCABULARY,
    assert_equal,
    batch,
    build,
    decode,
    each,
    one_thread,  # noqa: F401
    reference,
    resolved,
    shared,
)
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import MinLengthLogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

from engine import families
from engine.generation import decoder, fallback, graphs, search
from engine.generation.api import generate
from engine.generation.cache import TreeCache

BEAMS = {"num_beams": 4, "max_new_tokens": 14}

# name -> arguments of generate, run on every family. Ours must run (no hand-back), and equal theirs.
COMMON = {
    "greedy": {"num_beams": 1},  # 1
    "beams2": {"num_beams": 2},  # 2
    "beams5": {"num_beams": 5},
    "beams40": {"num_beams": 40},  # 3
    "more_beams_than_tokens": {"num_beams": 120, "max_new_tokens": 4},  # 4
    "early_true": {"early_stopping": True},  # 9
    "early_false": {"early_stopping": False},
    "early_never": {"early_stopping": "never"},
    "penalty_minus1": {"length_penalty": -1.0},  # 10
    "penalty_0": {"length_penalty": 0.0},
    "penalty_02": {"length_penalty": 0.2},
    "penalty_15": {"length_penalty": 1.5},
    "penalty_2_early": {"length_penalty": 2.0, "early_stopping": True},
    "never_negative": {"early_stopping": "never", "length_penalty": -0.5},  # 11
    "never_positive": {"early_stopping": "never", "length_penalty": 1.5},
    "return2": {"num_return_sequences": 2},  # 12
    "return_all": {"num_return_sequences": 4, "early_stopping": True},
    "one_token": {"max_new_tokens": 1},  # 13
    "two_tokens": {"max_new_tokens": 2, "num_return_sequences": 4},
    "min_equals_max": {"min_new_tokens": 14},  # 19
    "min_new": {"min_new_tokens": 6},
    "repetition_13": {"repetition_penalty": 1.3},  # 34
    "repetition_08": {"repetition_penalty": 0.8},  # 35
    "repetition_10": {"repetition_penalty": 1.0},
    "ngram1": {"no_repeat_ngram_size": 1},  # 39
    "ngram2": {"no_repeat_ngram_size": 2},  # 40
    "ngram3": {"no_repeat_ngram_size": 3},  # 41
    "ngram_too_long": {"no_repeat_ngram_size": 40},  # 42
    "original_system": {
        "num_beams": 5,
        "min_new_tokens": 8,
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.5,
        "early_stopping": True,
    },
    "bad_50": {"bad_words_ids": [[i] for i in range(30, 80)]},  # 45
    "bad_all_but_one": {"bad_words_ids": [[i] for i in range(VOCABULARY) if i != 50]},  # 46
    "bad_all_but_three": {"bad_words_ids": [[i] for i in range(VOCABULARY) if i not in (50, 60, 70)]},  # 47
    "bad_all": {"bad_words_ids": [[i] for i in range(VOCABULARY)]},  # 48
    "bad_all_and_min": {"bad_words_ids": [[i] for i in range(VOCABULARY)], "min_new_tokens": 5},  # 49
    "bad_duplicates": {"bad_words_ids": [[40], [40], [41], [40]]},  # 50
    "bad_multi": {"bad_words_ids": [[40, 41], [50, 51, 52], [60]]},  # 51
    "invalid_removed": {"remove_invalid_values": True, "bad_words_ids": [[i] for i in range(VOCABULARY)]},  # 54
    "suppress": {"suppress_tokens": [40, 41, 42], "begin_suppress_tokens": [50, 51, 1]},  # 55
    "decay": {"exponential_decay_length_penalty": (3, 1.2)},  # 56
    "encoder_rules": {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},  # 57
    "renormalised": {"renormalize_logits": True, "repetition_penalty": 1.3},  # 58
    "sequence_bias": {"sequence_bias": [[[40], 4.0], [[41], -4.0], [[50, 51], 3.0]]},  # 59
    "ends_list": {"eos_token_id": [1, 2]},  # 29
    "ends_three": {"eos_token_id": [1, 2, 7], "early_stopping": True, "num_return_sequences": 3},
    "forced_bos": {"forced_bos_token_id": 9},  # 23
    "forced_bos_is_end": {"forced_bos_token_id": 1, "eos_token_id": 1},  # 22
    "forced_end_list": {"forced_eos_token_id": [1, 2]},  # 28
    "forced_end_none": {"forced_eos_token_id": None},  # 26
    "pad_none": {"pad_token_id": None},  # 33
    "sample": {"do_sample": True, "num_beams": 1},
    "sample_rows": {"do_sample": True, "num_beams": 1, "num_return_sequences": 3, "top_k": 20, "temperature": 1.3},
    "sample_nucleus": {"do_sample": True, "num_beams": 1, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.2},
    "greedy_rules": {"num_beams": 1, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4, "min_new_tokens": 6},
}


def both(model, **arguments):
    """Ours and theirs from the same random state; warnings are transformers' own, twice."""
    cuda_graphs = arguments.pop("cuda_graphs", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        theirs = reference(model, **arguments)
        torch.manual_seed(5)
        return decode(model, **arguments, cuda_graphs=cuda_graphs), theirs


def check(model, native: bool = True, **arguments):
    ours, theirs = both(model, **arguments)
    assert ours.native is native
    assert_equal(ours, theirs)
    return ours


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("name", COMMON)
def test_settings(name, family):
    model = shared(family)
    check(model, **batch(model), **BEAMS | COMMON[name])


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("seed", range(1, 4))
def test_other_weights(family, seed):
    model = build(family, seed)
    check(model, **batch(model, seed=seed), **BEAMS | COMMON["original_system"])
    check(model, **batch(model, seed=seed), **BEAMS | {"num_return_sequences": 4, "max_new_tokens": 25})


@pytest.mark.parametrize("family", each())
def test_batch_of_one(family):  # 5
    model = shared(family)
    check(model, **batch(model, lengths=(7,)), **BEAMS)


@pytest.mark.parametrize("family", each())
def test_ends_by_length_limits(family):
    model = shared(family)
    inputs = batch(model)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    check(model, **inputs, num_beams=3, max_length=start + 6)  # 15
    check(model, **inputs, num_beams=3, max_length=start + 6, max_new_tokens=9)  # 16
    check(model, **inputs, num_beams=3)  # 17
    check(model, **inputs, num_beams=3, max_new_tokens=5, min_new_tokens=9)  # 20
    check(model, **inputs, num_beams=3, max_new_tokens=12, min_length=start + 6)  # 21


ERRORS = {
    "zero": {"max_new_tokens": 0},  # 14
    "negative": {"max_new_tokens": -1},
    "prompt_too_long": {"max_length": 1, "max_new_tokens": None},  # 18
    "too_many_returned": {"num_return_sequences": 5},  # 12
    "whole_penalty": {"repetition_penalty": 2},  # 35
    "bad_word_out_of_range": {"bad_words_ids": [[VOCABULARY]]},  # 52
    "no_bad_words": {"bad_words_ids": []},  # 53
    "unknown": {"num_beens": 3},
}


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_theirs(name, family):
    model = shared(family)
    arguments = batch(model) | BEAMS | ERRORS[name]
    with pytest.raises(Exception) as theirs:
        reference(model, **arguments)
    with pytest.raises(type(theirs.value)) as ours:
        decode(model, **arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("family", each())
def test_end_token_minus_one_runs_to_the_limit(family):  # 30
    model = shared(family)
    check(model, **batch(model), **BEAMS, eos_token_id=-1, forced_eos_token_id=None)


@pytest.mark.parametrize("family", each())
def test_no_end_token(family):  # 31
    model = build(family)
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    ours = check(model, **batch(model), **BEAMS)
    assert ours.sequences.shape[1] == ours.prompt_length + BEAMS["max_new_tokens"]


def test_pad_zero_gives_way_to_the_end_token():  # 32
    model = shared("t5")
    ours = check(model, **batch(model), num_beams=4, max_new_tokens=20, bad_words_ids=[[i] for i in range(40, 97)])
    assert 0 not in ours.sequences[:, 1:]


def test_bart_forces_an_end_its_config_never_mentioned():  # 25, 27
    model = build("bart", forced_eos_token_id=2)
    ours = check(model, **batch(model), num_beams=3, max_new_tokens=6, min_new_tokens=6)
    assert ours.sequences[:, -1].tolist() == [2] * 4


def test_kobart_ids():  # start 2, end a list, forced end != end
    model = build("bart", decoder_start_token_id=2, bos_token_id=0, forced_eos_token_id=2)
    model.generation_config.eos_token_id = [1]
    for extra in ({}, {"repetition_penalty": 1.5}, {"early_stopping": True, "no_repeat_ngram_size": 3}):
        check(model, **batch(model), num_beams=5, max_new_tokens=12, **extra)


@pytest.mark.parametrize("family", each(["bart", "t5"]))
def test_decoder_prompts(family):
    model = shared(family)
    inputs = batch(model)
    start = model.generation_config.decoder_start_token_id
    rows = torch.tensor([[start, 20], [start, 30], [start, 20], [start, 40]])
    check(model, **inputs, **BEAMS, decoder_input_ids=rows)  # 62
    check(model, **inputs, **BEAMS, decoder_input_ids=rows[:, 1:])  # 63
    check(model, **inputs, **BEAMS, decoder_input_ids=rows, forced_bos_token_id=9)  # 24
    check(model, **inputs, **BEAMS, decoder_input_ids=rows.repeat(1, 2), no_repeat_ngram_size=2)  # 44


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prompt_takes_part_in_the_rules(family):
    model = shared(family)
    end = [2, 5] if family == "llama" else [2]
    inputs = batch(model, lengths=(12, 12, 12))
    inputs["input_ids"][:, 3] = end[0]
    check(model, **inputs, **BEAMS, repetition_penalty=1.4)  # 37
    inputs["input_ids"][:, 6:] = inputs["input_ids"][:, :6]
    check(model, **inputs, **BEAMS, no_repeat_ngram_size=3)  # 43


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("pad", [0, 2])
def test_padding_is_not_penalised(family, pad):  # 36, 81
    model = shared(family)
    inputs = batch(model, lengths=(9, 1, 5, 3))
    inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, pad)
    for extra in ({"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}):
        check(model, **inputs, **BEAMS, pad_token_id=pad, **extra)


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("pad", [0, 1, 2])
def test_mask_is_inferred_when_absent(family, pad):  # 38
    model = shared(family)
    ids = batch(model)["input_ids"]
    check(model, input_ids=ids, **BEAMS, pad_token_id=pad, repetition_penalty=1.2)


@pytest.mark.parametrize("family", each())
def test_a_row_of_nothing_but_padding(family):  # 64, 65, 66
    model = shared(family)
    inputs = batch(model)
    inputs["attention_mask"][1] = 0
    check(model, **inputs, **BEAMS)
    check(model, **inputs, **BEAMS, repetition_penalty=1.3)


@pytest.mark.parametrize("family", each())
def test_empty_input_is_their_error(family):  # 67, 68
    model = shared(family)
    ids = torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(Exception) as theirs:
        reference(model, input_ids=ids, **BEAMS)
    with pytest.raises(type(theirs.value)):
        decode(model, input_ids=ids, **BEAMS)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_no_input_at_all(family):  # 69
    check(shared(family), **BEAMS)


def test_input_beyond_the_positions():  # 70
    model = shared("bart")
    inputs = batch(model, lengths=(80, 70))
    with pytest.raises(IndexError):
        decode(model, **inputs, **BEAMS)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", each())
def test_long_inputs(family):  # 71
    model = shared(family)
    lengths = (60, 33, 2) if family == "bart" else (200, 131, 2)
    check(model, **batch(model, lengths=lengths), **BEAMS)


class Poison(LogitsProcessor):
    """Puts a value into one entry at one length."""

    def __init__(self, value: float, length: int):
        self.value, self.length = value, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores = scores.clone()
            scores[0, 7] = self.value
        return scores


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_broken_logit(family, value):  # 72, 73
    model = shared(family)
    inputs = batch(model)
    length = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    check(model, **inputs, **BEAMS, logits_processor=LogitsProcessorList([Poison(value, length)]))
    check(model, **inputs, **BEAMS, logits_processor=LogitsProcessorList([Poison(value, length + 2)]))


@pytest.mark.parametrize("family", each())
def test_exact_ties(family):  # 74
    model = build(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    check(model, **batch(model), **BEAMS)


@pytest.mark.parametrize("family", each())
def test_twin_tokens(family):  # 75
    """Tokens 50-96 are twins of 3-49. Where twins share an input embedding too, which twin of equal hypotheses is kept
    hangs on the last bit of attention (other slots lie between the ancestors), so twins count as one there."""
    model = build(family)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[50:] = head[3:50]
    ours, theirs = both(model, **batch(model), **BEAMS)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-6)
    tied = head.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    first, second = (torch.where(s.sequences >= 50, s.sequences - 47, s.sequences) for s in (ours, theirs))
    assert first.tolist() == second.tolist() if tied else ours.sequences.tolist() == theirs.sequences.tolist()


@pytest.mark.parametrize("family", each())
def test_resized_embeddings(family):  # 76
    model = build(family)
    model.resize_token_embeddings(VOCABULARY + 5, pad_to_multiple_of=64)
    inputs = batch(model)
    inputs["input_ids"][0, 5] = VOCABULARY + 3
    check(model, **inputs, **BEAMS, repetition_penalty=1.3, no_repeat_ngram_size=2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_embedding_larger_than_head(family):  # 77
    model = build(family)
    wide = torch.nn.Embedding(VOCABULARY + 10, 32)
    with torch.no_grad():
        wide.weight[:VOCABULARY] = model.get_input_embeddings().weight
    model.set_input_embeddings(wide)
    inputs = batch(model)
    inputs["input_ids"][:, 5] = VOCABULARY + 4
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    try:
        reference(model, **inputs, **BEAMS, **rules)
    except RuntimeError:
        pytest.skip("this transformers cannot do it itself")
    check(model, **inputs, **BEAMS, **rules)
    inputs["input_ids"][:, -1] = VOCABULARY + 4
    check(model, **inputs, **BEAMS, **rules)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_outputs_given(family):  # 78
    model = shared(family)
    inputs = batch(model)
    states = model.get_encoder()(**inputs).last_hidden_state
    arguments = {"attention_mask": inputs["attention_mask"]} | BEAMS
    theirs = reference(model, encoder_outputs=BaseModelOutput(last_hidden_state=states.clone()), **arguments)
    ours = decode(model, encoder_outputs=BaseModelOutput(last_hidden_state=states.clone()), **arguments)
    assert ours.native
    assert_equal(ours, theirs)


@pytest.mark.parametrize("family", each())
def test_same_model_different_shapes(family):  # 84
    model = shared(family)
    for lengths, beams, new in (((9, 4), 3, 8), ((3,), 5, 12), ((7, 7, 7, 2), 2, 3), ((9, 4), 3, 8)):
        check(model, **batch(model, lengths=lengths), num_beams=beams, max_new_tokens=new)


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("early", [True, False, "never"])
def test_compaction_changes_nothing(family, early):  # 86, 89
    model = shared(family)
    inputs = batch(model, lengths=(9, 3, 5, 7, 2, 8, 6, 4))
    ends = {"eos_token_id": [1, 2, 7, 30, 31, 32], "early_stopping": early, "num_return_sequences": 3}
    arguments = {"num_beams": 3, "max_new_tokens": 24} | ends
    theirs = reference(model, **inputs, **arguments)
    for compaction in (True, False):
        assert_equal(decode(model, **inputs, **arguments, compaction=compaction), theirs)


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("every", [1, 3])
def test_dropping_dead_slots_changes_nothing(family, every, monkeypatch):
    dropped = []
    pick = TreeCache.pick

    def counted(tree, start, order):
        dropped.append(tree.slot - start - order.shape[1])
        pick(tree, start, order)

    monkeypatch.setattr(TreeCache, "pick", counted)
    monkeypatch.setattr(decoder, "PRUNE_EVERY", every)
    for lengths, seed in (((9, 7, 3), 0), ((2, 8), 1)):
        model = build(family, seed)
        check(model, **batch(model, lengths=lengths), num_beams=4, max_new_tokens=30, num_return_sequences=3)
    assert sum(dropped) > 5


@pytest.mark.parametrize("family", each(["bart", "t5"]))
def test_sources_in_groups_of_like_length(family):
    model = shared(family)
    lengths = (20, 19, 12, 11, 10, 4, 3, 1)
    ends = {"eos_token_id": [1, 2, 7, 30, 31, 32], "early_stopping": True}
    for seed in range(4):
        check(model, **batch(model, lengths=lengths, seed=seed), num_beams=3, max_new_tokens=30, **ends)


class Bonus(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + (torch.arange(scores.shape[1]) % 7 == 0) * 2.0


class Patience(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


@pytest.mark.parametrize("family", each())
def test_processors_of_the_user(family):  # 60
    model = shared(family)
    inputs = batch(model)
    check(model, **inputs, **BEAMS, logits_processor=LogitsProcessorList([Bonus()]))
    own = MinLengthLogitsProcessor(12, torch.tensor([1, 2]))
    check(model, **inputs, **BEAMS, logits_processor=LogitsProcessorList([own]), min_length=3)


@pytest.mark.parametrize("family", each())
def test_a_passed_config(family):
    model = shared(family)
    config = GenerationConfig(num_beams=3, max_new_tokens=9, no_repeat_ngram_size=2)
    check(model, **batch(model), generation_config=config)


HANDED_BACK = {
    "beam_sample": {"do_sample": True},  # 90
    "max_time": {"max_time": 60.0},  # 61
    "attentions": {"output_hidden_states": True},
    "no_cache": {"use_cache": False},
    "static_cache": {"cache_implementation": "static"},
    "prefix": {"prefix_allowed_tokens_fn": lambda batch_id, ids: list(range(40))},
}


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("name", HANDED_BACK)
def test_hand_back(name, family, caplog, monkeypatch):
    monkeypatch.setattr(fallback, "_told", set())
    model = shared(family)
    with caplog.at_level(logging.WARNING, logger="engine.generation.search"):
        check(model, native=False, **batch(model), **BEAMS | HANDED_BACK[name])
    assert len([r for r in caplog.records if "left to transformers" in r.message]) == 1


@pytest.mark.parametrize("family", each())
def test_hand_back_of_criteria_and_embeddings(family):  # 61, 79
    model = shared(family)
    inputs = batch(model)
    check(model, native=False, **inputs, **BEAMS, stopping_criteria=StoppingCriteriaList([Patience()]))
    if not model.config.is_encoder_decoder:
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        check(model, native=False, inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **BEAMS)


def test_hand_back_of_sliding_windows():  # 80
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = build("qwen3", **window)
    check(model, native=False, **batch(model), **BEAMS)
    model = build("mistral", sliding_window=4)
    check(model, native=False, **batch(model), **BEAMS)


@pytest.mark.parametrize("family", each(OTHERS, quick=("marian", "gpt2")))
def test_other_families(family):
    assert set(OTHERS) | set(FAMILIES) == {name for name, row in families.FAMILIES.items() if row.verified}
    for seed in range(2):
        model = build(family, seed)
        native = search._tells_attentions_apart(model)  # false for UMT5 before transformers 5.23
        check(model, native, **batch(model, seed=seed), **BEAMS | {"max_new_tokens": 22})
        check(model, native, **batch(model, seed=seed), **BEAMS | COMMON["original_system"])
        check(model, native, **batch(model, seed=seed), **BEAMS | COMMON["greedy"])


def test_unmarked_self_attention_is_handed_back():
    """Then nothing tells the relative positions of one attention from the source groups of the other."""
    model = build("umt5")
    for module in model.get_decoder().modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    check(model, native=False, **batch(model), **BEAMS)


@pytest.mark.parametrize("family", each())
def test_eager_attention(family):
    model = build(family)
    model.set_attn_implementation("eager")
    check(model, **batch(model), **BEAMS)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_right_padding_is_decoded_as_it_is(family):  # 82
    model = shared(family)
    inputs = batch(model)
    flipped = {name: tensor.flip(1) for name, tensor in inputs.items()}
    check(model, **flipped, **BEAMS)


@pytest.mark.parametrize("family", each())
def test_grouped_beam_search_is_their_error(family):  # 90
    model = shared(family)
    with pytest.raises(ValueError, match="custom_generate|trust_remote_code|diversity"):
        reference(model, **batch(model), num_beams=4, num_beam_groups=2, diversity_penalty=0.5, max_new_tokens=5)


# --- steps of fixed shape (what a GPU replays as a CUDA graph), here without a graph --------------------------------


@pytest.fixture
def fixed_shapes(monkeypatch):
    monkeypatch.setattr(search, "worth_capturing", lambda *_: True)
    monkeypatch.setattr(graphs, "WINDOW_STRIDE", 16)
    monkeypatch.setattr(decoder, "PRUNE_EVERY", 5)


CAPTURABLE = sorted(name for name, row in families.FAMILIES.items() if row.capturable)
FIXED = [
    "beams5",
    "greedy",
    "original_system",
    "return_all",
    "ends_three",
    "sample_rows",
    "one_token",
    "bad_all_and_min",
]


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("name", FIXED)
def test_steps_of_fixed_shape(name, family, fixed_shapes):  # 87, 88
    model = shared(family)
    check(model, cuda_graphs=True, **batch(model), **BEAMS | {"max_new_tokens": 26} | COMMON[name])
    if family in ("bart", "t5"):
        check(
            model,
            cuda_graphs=True,
            **batch(model, lengths=(12, 11, 5, 4, 2)),
            **BEAMS | {"max_new_tokens": 26} | COMMON[name],
        )


@pytest.mark.parametrize("family", each())
def test_steps_of_fixed_shape_with_leaving_examples(family, fixed_shapes):
    model = shared(family)
    ends = {"eos_token_id": [1, 2, 7, 30, 31, 32], "early_stopping": True, "num_return_sequences": 3}
    check(model, cuda_graphs=True, **batch(model, lengths=(9, 3, 5, 7, 2, 8)), num_beams=3, max_new_tokens=30, **ends)


@pytest.mark.parametrize("family", each(CAPTURABLE))
def test_steps_of_fixed_shape_never_wait_for_the_device(family, fixed_shapes, monkeypatch):
    """A capture fails at the first value that Python wants to know."""
    inner = graphs.StaticStep._run
    runs = []

    def guarded(step, window):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero"):
                patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} in a fixed step"))
            runs.append(window)
            return inner(step, window)

    monkeypatch.setattr(graphs.StaticStep, "_run", guarded)
    model = shared(family)
    if not search._tells_attentions_apart(model):
        pytest.skip("this transformers does not mark its self-attention")
    check(model, cuda_graphs=True, **batch(model), **BEAMS | {"max_new_tokens": 26})
    assert len(set(runs)) > 1


def test_steps_are_plain_unless_graphs_are_asked_for(fixed_shapes, monkeypatch):
    monkeypatch.setattr(graphs.StaticStep, "__call__", lambda *_: pytest.fail("a fixed step"))
    model = shared("bart")
    check(model, **batch(model), **BEAMS)
    values = {"num_beams": 3, "max_new_tokens": 6}
    generate(model, **batch(model), settings=resolved(model, **values))
    with pytest.raises(pytest.fail.Exception):
        generate(model, **batch(model), settings=resolved(model, cuda_graphs=True, **values))


class FailedCapture:
    """`torch.cuda.graph` as it looks where the device refuses the capture."""

    def __init__(self, *_, **__): ...

    def __enter__(self):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    def __exit__(self, *_): ...


def test_a_failed_capture_is_told_once_and_decoding_goes_on(fixed_shapes, monkeypatch, caplog):
    """The call itself, and the model's later calls, which no longer try."""
    tried = []
    for name, fake in {
        "graph": FailedCapture,
        "CUDAGraph": lambda: tried.append(1),
        "current_stream": lambda: None,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    made = graphs.StaticStep.__init__

    def as_on_a_gpu(step, *arguments):
        made(step, *arguments)
        step.capturable = True

    monkeypatch.setattr(graphs.StaticStep, "__init__", as_on_a_gpu)
    model, gpu = build("bart"), torch.device("cuda", 0)
    assert graphs.worth_capturing(model, gpu, 40)
    check(model, cuda_graphs=True, **batch(model), **BEAMS | {"max_new_tokens": 26})
    told = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert len(tried) == len(told) == 1 and told[0].endswith("when stream is capturing")
    assert not graphs.worth_capturing(model, gpu, 40) and graphs.worth_capturing(build("bart"), gpu, 40)


ON_A_GPU = [(name, family) for name in ("beams5", "greedy", "original_system", "ends_three") for family in FAMILIES]
ON_A_GPU += [("beams5", family) for family in CAPTURABLE if family not in FAMILIES]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "family"), ON_A_GPU)
def test_on_a_gpu(name, family, gpu, monkeypatch):  # 87
    """With graphs, without, and transformers: the same tokens, and captures that succeed."""
    replayed = []
    capture = graphs.StaticStep._capture
    monkeypatch.setattr(
        graphs.StaticStep, "_capture", lambda step, window: replayed.append(found := capture(step, window)) or found
    )
    model = build(family).to(gpu)
    if not search._tells_attentions_apart(model):
        pytest.skip("this transformers does not mark its self-attention")
    inputs = {key: tensor.to(gpu) for key, tensor in batch(model).items()}
    arguments = inputs | BEAMS | {"max_new_tokens": 40} | COMMON[name]
    theirs = reference(model, **arguments)
    assert_equal(decode(model, **arguments, cuda_graphs=True), theirs)
    assert_equal(decode(model, **arguments), theirs)
    assert all(replayed), "a capture failed"
    assert replayed or gpu.type != "cuda" or name != "beams5", "nothing was captured"
