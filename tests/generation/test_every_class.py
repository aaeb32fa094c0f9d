"""Every class that transformers can generate text with: our result is `generate`'s, or the call is handed back and told.

In float64, so that what differs is a mistake and never rounding. The default run takes the families of the table and a few
classes drawn anew each time; FULL_TESTS=1 takes all, and all rotary schemes. It prints what became of each.
"""

from __future__ import annotations

import os
import random
import warnings
from collections import Counter

import pytest
import torch
from every_class import CLASSES, VOCABULARY, NotBuilt, build
from generation_toys import assert_equal, batch, decode, one_thread, reference, resolved  # noqa: F401

from engine import families
from engine.generation import fallback, search
from engine.generation.api import generate_all

pytestmark = pytest.mark.slow

FULL = "FULL_TESTS" in os.environ
SEED = int(os.environ.get("GENERATION_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
HOW_TO_REPEAT = f"repeat with GENERATION_SEED={SEED} and -k on this test's name"
TABLE = [key for key in CLASSES if families.of(key[0]).verified]
OTHERS = [key for key in CLASSES if key not in TABLE]
DRAWS = 6


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(fallback, "_told", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def name_of(key) -> str:
    return f"{key[0]}-{'seq2seq' if key[1] else 'causal'}"


@pytest.mark.parametrize("key", TABLE, ids=name_of)
def test_class_of_a_family_in_the_table(key):
    print(CLASSES[key], sweep(key, SEED))


@pytest.mark.skipif(FULL, reason="all are run")
@pytest.mark.parametrize("number", range(DRAWS))
def test_class_drawn(number):
    key = random.Random(SEED + number).choice(OTHERS)
    print(CLASSES[key], sweep(key, SEED))


@pytest.mark.parametrize("key", OTHERS if FULL else [], ids=name_of)
def test_class(key):
    print(CLASSES[key], sweep(key, SEED))


# --- one class ------------------------------------------------------------------------------------------------------


def sweep(key, seed: int, new_tokens: int = 14, **overrides) -> str:
    """What became of the class: "ours", "handed back", "refused", "not built" or "not run", with the reason."""
    draw = random.Random(f"{seed} {key}")
    try:
        model = build(*key, seed=draw.randrange(1000), **overrides)
    except NotBuilt as reason:
        return f"not built: {reason}"
    # What is handed back runs in `generate` both times: one look is enough.
    cases = 1 if search.unverified(model) else 4 if FULL else 2
    outcomes = Counter(one_case(model, draw, new_tokens) for _ in range(cases))
    outcomes[in_any_batch(model, draw, new_tokens)] += 1
    return ", ".join(outcomes)


def drawn_settings(draw: random.Random, new_tokens: int) -> dict:
    settings = {"num_beams": draw.choice([1, 3, 3]), "max_new_tokens": new_tokens}
    rules = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": draw.choice([2, 3]),
        "min_new_tokens": draw.randint(2, 6),
        "bad_words_ids": [[draw.randrange(6, VOCABULARY)], [draw.randrange(6, VOCABULARY) for _ in range(2)]],
    }
    settings |= {name: rules[name] for name in draw.sample(sorted(rules), draw.randint(0, 2))}
    if settings["num_beams"] > 1:
        settings |= {"early_stopping": draw.choice([True, False, "never"]), "num_return_sequences": draw.choice([1, 2])}
    return settings


def ends_of(model, inputs, draw: random.Random, new_tokens: int) -> list[int]:
    """End tokens that some rows will reach early: out of what they write freely."""
    written = model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=None, forced_eos_token_id=None)
    rows = written[:, -new_tokens + 2 :].tolist()
    return sorted({2, *(draw.choice(row) for row in rows[:2])})


def one_case(model, draw: random.Random, new_tokens: int) -> str:
    inputs = batch(model, lengths=[draw.randint(1, 12) for _ in range(draw.randint(2, 5))], seed=draw.randrange(1000))
    settings = drawn_settings(draw, new_tokens)
    try:
        settings["eos_token_id"] = ends_of(model, inputs, draw, new_tokens)
        theirs = reference(model, **inputs, **settings)
        twice = reference(model, **inputs, **settings)
    except Exception as error:
        return f"not run: {type(error).__name__}"
    if theirs.sequences.tolist() != twice.sequences.tolist():
        return "not run: two runs of transformers differ"
    ours = decode(model, **inputs, **settings)
    note = f"{type(model).__name__} {settings} {inputs['attention_mask'].sum(1).tolist()}: {HOW_TO_REPEAT}"
    assert ours.sequences.tolist() == theirs.sequences.tolist(), note
    assert_equal(ours, theirs, tolerance=1e-5 if model.dtype == torch.float32 else 1e-9)
    return outcome(ours.native)


def outcome(native: bool) -> str:
    told = sorted(fallback._told)
    assert native or told, f"handed back without a word: {HOW_TO_REPEAT}"
    return "ours" if native else f"handed back ({told[0]})"


def in_any_batch(model, draw: random.Random, new_tokens: int) -> str:
    """`generate_all`: each prompt alone as `generate` has it, and ours the same in any company."""
    prompts = [[draw.randrange(6, VOCABULARY) for _ in range(draw.randint(1, 12))] for _ in range(5)]
    values = drawn_settings(draw, new_tokens) | {"num_return_sequences": 1}
    # transformers' n-gram rule counts the padding before a prompt, which shows where a model writes padding itself.
    values |= (
        {"suppress_tokens": [model.generation_config.pad_token_id or 0]} if "no_repeat_ngram_size" in values else {}
    )
    try:
        first = torch.tensor([prompts[0]])
        ends = ends_of(model, {"input_ids": first, "attention_mask": torch.ones_like(first)}, draw, new_tokens)
        values["eos_token_id"] = ends
        expected = [alone(model, prompt, values) for prompt in prompts]
    except Exception as error:
        return f"not run: {type(error).__name__}"
    settings, pad = resolved(model, repetition_scope="all", **values), model.generation_config.pad_token_id or 0

    def found(**options):
        return [h[0].token_ids for h in generate_all(model, prompts, settings, pad_token_id=pad, **options)]

    note = f"{type(model).__name__} {values} {prompts}: {HOW_TO_REPEAT}"
    mine = found(max_batch_size=1)
    assert [cut(row, ends) for row in mine] == expected, note
    if fallback._told:
        return outcome(False)
    for options in ({}, {"max_batch_size": 2}, {"max_batch_size": 3, "sort_by_length": False}):
        assert found(**options) == mine, note
    return outcome(True)


def alone(model, prompt: list[int], values: dict) -> list[int]:
    ids = torch.tensor([prompt])
    row = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **values)[0].tolist()
    return cut(row[1 if model.config.is_encoder_decoder else len(prompt) :], values["eos_token_id"])


def cut(row: list[int], ends: list[int]) -> list[int]:
    """Up to the first end token."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


# --- rotary schemes beyond the original length ----------------------------------------------------------------------

ORIGINAL = 16
SCHEMES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}
ROTARY_IN_THE_TABLE = [("exaone4", False), ("gpt_neox", False), ("llama", False), ("olmo2", False), ("phi3", False)]


def rotary(model, scheme: str) -> dict | None:
    """Overrides of the text configuration that put the scheme in place of a model's own; None where it has none."""
    own = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    widths = [m.inv_freq.numel() for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if not own or not widths:
        return None
    new = {"rope_type": scheme} | SCHEMES[scheme]
    if scheme == "longrope":
        new |= {"short_factor": [1.0] * widths[0], "long_factor": [2.0 + i for i in range(widths[0])]}
    nested = [name for name, value in own.items() if isinstance(value, dict)]
    parameters = {name: own[name] | new for name in nested} if nested else own | new
    return {"rope_parameters": parameters, "max_position_embeddings": ORIGINAL if scheme == "dynamic" else 4 * ORIGINAL}


def sweep_rotary(key, scheme: str) -> str:
    try:
        overrides = rotary(build(*key, seed=0), scheme)
        return "no rotary positions" if overrides is None else sweep(key, SEED, new_tokens=20, **overrides)
    except NotBuilt as reason:
        return f"not built: {reason}"


@pytest.mark.skipif(FULL, reason="all are run")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rotary_scheme_drawn(scheme):
    drawn = random.Random(f"{SEED} {scheme}").sample(ROTARY_IN_THE_TABLE, len(ROTARY_IN_THE_TABLE))
    outcomes = ((key, sweep_rotary(key, scheme)) for key in drawn)  # Phi-3 takes longrope only, and so on
    key, found = next(pair for pair in outcomes if not pair[1].startswith(("not built", "no rotary")))
    print(CLASSES[key], scheme, found, HOW_TO_REPEAT)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("key", [key for key in TABLE if not key[1]] if FULL else [], ids=name_of)
def test_rotary_scheme(key, scheme):
    print(CLASSES[key], scheme, sweep_rotary(key, scheme))


@pytest.mark.parametrize("key", [key for key in OTHERS if not key[1]] if FULL else [], ids=name_of)
def test_rotary_scheme_of_another_class(key):
    scheme = random.Random(f"{SEED} {key}").choice(sorted(SCHEMES))
    print(CLASSES[key], scheme, sweep_rotary(key, scheme))
