"""`generate` and `generate_all`: results, order, batch invariance, and a model left as it was found."""

from __future__ import annotations

import os
import random

import pytest
import torch
from generation_toys import (
    FAMILIES,
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

from engine.generation import beams
from engine.generation.api import Hypothesis, generate, generate_all, pad, plan_batches
from engine.generation.settings import GenerationSettings

SEED = int(os.environ.get("GENERATION_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
DRAWS = int(os.environ.get("GENERATION_DRAWS", "24"))


def draws(numbers: range) -> list:
    """The first eight at a desk."""
    return [pytest.param(n, marks=pytest.mark.slow if n >= numbers.start + 8 else ()) for n in numbers]


def prompts(count: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(6, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def ids(results: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[h.token_ids for h in found] for found in results]


# --- one batch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", each())
def test_new_tokens_only(family):
    model = shared(family)
    inputs = batch(model)
    values = {"num_beams": 3, "max_new_tokens": 12, "num_return_sequences": 2, "repetition_scope": "all"}
    ours = generate(model, **inputs, settings=resolved(model, **values))
    values.pop("repetition_scope")
    theirs = reference(model, **inputs, **values)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    assert ours.sequences.tolist() == theirs.sequences[:, start:].tolist()
    torch.testing.assert_close(ours.scores, theirs.sequences_scores, rtol=1e-5, atol=1e-6)
    assert ours.lengths.tolist() == (theirs.beam_indices >= 0).sum(1).tolist()


@pytest.mark.parametrize("family", each())
def test_ended_means_the_model_ended(family):
    model = shared(family)
    ends = torch.tensor(model.generation_config.eos_token_id).reshape(-1).tolist()
    for values in ({"num_beams": 3}, {"num_beams": 1}, {"do_sample": True, "num_return_sequences": 2}):
        out = generate(model, **batch(model), settings=resolved(model, max_new_tokens=10, **values))
        forced = model.generation_config.forced_eos_token_id is not None
        for row, length, ended in zip(out.sequences.tolist(), out.lengths.tolist(), out.ended.tolist(), strict=True):
            last_is_end = row[length - 1] in ends
            assert ended == (last_is_end and not (forced and length == 10))
            assert ended or length == 10


def test_forced_end_at_the_limit_is_no_ending():
    model = shared("bart")
    out = generate(model, **batch(model), settings=resolved(model, num_beams=3, max_new_tokens=6, min_new_tokens=6))
    assert out.sequences[:, -1].tolist() == [1] * 4
    assert not out.ended.any()


def test_scope_output_spares_the_prompt():
    model = shared("llama")
    inputs = batch(model, lengths=(12, 12))
    plain = generate(model, **inputs, settings=resolved(model, num_beams=1, max_new_tokens=1))
    inputs["input_ids"][:, 4] = plain.sequences[:, 0]
    inputs["input_ids"][:, 4:] = inputs["input_ids"][:, 4:].clone()
    first = generate(model, **inputs, settings=resolved(model, num_beams=1, max_new_tokens=1)).sequences
    punished = {"num_beams": 1, "max_new_tokens": 1, "repetition_penalty": 50.0}
    assert generate(model, **inputs, settings=resolved(model, **punished)).sequences.tolist() == first.tolist()
    both = resolved(model, repetition_scope="all", no_repeat_ngram_size=1, num_beams=1, max_new_tokens=1)
    seen = generate(model, **inputs, settings=both).sequences
    assert all(token not in row for token, row in zip(seen[:, 0].tolist(), inputs["input_ids"].tolist(), strict=True))


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("extra", [{}, {"do_sample": True}, {"max_time": 60.0}])
def test_vocabulary_mask(family, extra):
    model = shared(family)
    mask = torch.full((VOCABULARY,), float("-inf"))
    mask[[1, 2, 5, 40, 41, 42]] = 0.0
    settings = resolved(model, num_beams=4, max_new_tokens=8, **extra)
    for given in (mask, mask.repeat(4, 1)):
        out = generate(model, **batch(model), settings=settings, vocabulary_mask=given)
        allowed = {1, 2, 5, 40, 41, 42, model.generation_config.pad_token_id}
        assert set(out.sequences.flatten().tolist()) <= allowed


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("spare", [0, 6, 64])
@pytest.mark.parametrize("banned", [range(20, 30), range(20, 60), range(4, 90)])
def test_mask_equals_suppressed_tokens(family, spare, banned, monkeypatch):
    """However few candidates are looked at before everything is masked."""
    monkeypatch.setattr(beams, "SPARE", spare)
    model, banned = shared(family), list(banned)
    mask = torch.zeros(VOCABULARY).index_fill_(0, torch.tensor(banned), float("-inf"))
    expected = reference(model, **batch(model), num_beams=4, max_new_tokens=12, suppress_tokens=banned)
    rows = mask.repeat(expected.sequences.shape[0], 1)
    for given in (mask, rows):
        ours = decode(model, **batch(model), num_beams=4, max_new_tokens=12, vocabulary_mask=given)
        assert_equal(ours, expected)


# --- many prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", each())
def test_alone_or_in_any_batch(family):
    """An example's result depends on nothing but itself: not on company, padding, order or budget."""
    model = shared(family)
    given = prompts(9)
    settings = resolved(model, num_beams=4, max_new_tokens=14, early_stopping=True, no_repeat_ngram_size=3)
    pad_id = model.generation_config.pad_token_id
    alone = ids(generate_all(model, given, settings, pad_token_id=pad_id, max_batch_size=1))
    for options in ({}, {"tokens_per_batch": 200}, {"max_batch_size": 4}, {"sort_by_length": False}):
        assert ids(generate_all(model, given, settings, pad_token_id=pad_id, **options)) == alone
    shuffled = list(range(9))
    random.Random(3).shuffle(shuffled)
    mixed = ids(generate_all(model, [given[i] for i in shuffled], settings, pad_token_id=pad_id, max_batch_size=3))
    assert [mixed[shuffled.index(i)] for i in range(9)] == alone


def test_limit_that_counts_the_prompt_does_not_depend_on_company():
    model = shared("qwen3")
    given = prompts(6)
    settings = resolved(model, num_beams=2, max_length=20)
    found = generate_all(model, given, settings, pad_token_id=0)
    assert ids(found) == ids(generate_all(model, given, settings, pad_token_id=0, max_batch_size=1))
    assert all(len(p) + len(h[0].token_ids) <= 20 for p, h in zip(given, found, strict=True))


def test_every_prompt_is_reported_once():
    model = shared("t5")
    given = prompts(10)
    seen: dict[int, list[Hypothesis]] = {}

    def note(indices, hypotheses):
        assert not seen.keys() & set(indices)
        seen.update(zip(indices, hypotheses, strict=True))

    settings = resolved(model, num_beams=2, max_new_tokens=5, num_return_sequences=2)
    found = generate_all(model, given, settings, pad_token_id=0, max_batch_size=4, on_batch=note)
    assert [seen[i] for i in range(10)] == found
    assert all(len(results) == 2 and results[0].score >= results[1].score for results in found)


def test_masks_per_prompt_follow_their_prompt():
    model = shared("bart")
    given = prompts(6)
    masks = torch.full((6, VOCABULARY), float("-inf"))
    for i in range(6):
        masks[i, 40 + i] = 0.0
    settings = resolved(model, num_beams=2, max_new_tokens=4, forced_eos_token_id=-1)
    found = generate_all(model, given, settings, pad_token_id=3, max_batch_size=4, vocabulary_mask=masks)
    assert [set(h[0].token_ids) for h in found] == [{40 + i} for i in range(6)]


def test_empty_prompt_is_named():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_all(shared("bart"), [[7], []], resolved(shared("bart")), pad_token_id=3)
    assert generate_all(shared("bart"), [], resolved(shared("bart")), pad_token_id=3) == []


def test_plan_keeps_the_budget():
    settings = GenerationSettings(num_beams=5, max_new_tokens=10)
    lengths = [3, 50, 7, 7, 400, 20]
    plan = list(plan_batches(lengths, settings, 240, None, True, True))
    assert sorted(i for b in plan for i in b) == list(range(6))
    for rows in plan:
        assert len(rows) == 1 or len(rows) * (max(lengths[i] for i in rows) + 50) <= 240
    assert plan[0] == [4]
    assert list(plan_batches(lengths, settings, 10**6, 2, False, True)) == [[0, 1], [2, 3], [4, 5]]


def test_padding_side():
    ids_left, mask_left = pad([[5], [6, 7]], 0, left=True, device=torch.device("cpu"))
    ids_right, _ = pad([[5], [6, 7]], 0, left=False, device=torch.device("cpu"))
    assert ids_left.tolist() == [[0, 5], [6, 7]] and mask_left.tolist() == [[0, 1], [1, 1]]
    assert ids_right.tolist() == [[5, 0], [6, 7]]


# --- sampling -------------------------------------------------------------------------------------------------------


def test_samples_leave_the_random_state_alone():
    model = shared("qwen3")
    settings = resolved(model, do_sample=True, max_new_tokens=8, num_return_sequences=3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = generate(model, **batch(model), settings=settings)
    assert torch.equal(before, torch.get_rng_state())
    theirs = model.generate(**batch(model), do_sample=True, max_new_tokens=8, num_return_sequences=3)
    assert first.sequences.tolist() == theirs[:, 9:].tolist()
    generator = torch.Generator().manual_seed(8)
    one = generate(model, **batch(model), settings=settings, generator=generator)
    two = generate(model, **batch(model), settings=settings, generator=generator)
    assert one.sequences.tolist() != two.sequences.tolist()


# --- the model afterwards -------------------------------------------------------------------------------------------


def snapshot(model) -> tuple:
    return (
        [m.training for m in model.modules()],
        model.config._attn_implementation,
        model.config.use_cache,
        [sorted(m.__dict__) for m in model.modules()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        model.generation_config.to_dict(),
    )


@pytest.mark.parametrize("family", each())
def test_model_is_left_as_found(family):  # 85, 91
    model = build(family)
    model.train()
    next(model.children()).eval()
    model.config.use_cache = False
    before = snapshot(model)
    out = generate(model, **batch(model), settings=resolved(model, num_beams=3, max_new_tokens=9))
    assert snapshot(model) == before
    again = generate(model.eval(), **batch(model), settings=resolved(model, num_beams=3, max_new_tokens=9))
    assert out.sequences.tolist() == again.sequences.tolist()


@pytest.mark.parametrize("family", each())
def test_model_is_left_as_found_after_an_error(family):
    model = build(family).train()
    before = snapshot(model)
    with pytest.raises(ValueError):
        generate(
            model,
            **batch(model),
            settings=resolved(model, num_beams=3, max_new_tokens=9, bad_words_ids=[[VOCABULARY]]),
        )
    mask = torch.zeros(VOCABULARY + 1)
    with pytest.raises(ValueError, match="vocabulary mask has"):
        generate(model, **batch(model), settings=resolved(model, num_beams=3, max_new_tokens=9), vocabulary_mask=mask)
    assert snapshot(model) == before


# --- random configurations ------------------------------------------------------------------------------------------


def draw_case(draw: random.Random) -> dict:
    """Arguments of `generate` that mean something together."""
    case = {
        "num_beams": draw.choice([1, 2, 3, 5, 8]),
        "max_new_tokens": draw.choice([1, 2, 7, 15, 25]),
        "early_stopping": draw.choice([True, False, "never"]),
        "length_penalty": draw.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
    }
    options = {
        "repetition_penalty": draw.choice([0.8, 1.2, 1.5]),
        "no_repeat_ngram_size": draw.choice([1, 2, 3]),
        "min_new_tokens": draw.randint(1, case["max_new_tokens"]),
        "bad_words_ids": [[draw.randrange(VOCABULARY)] for _ in range(draw.randint(1, 40))],
        "suppress_tokens": draw.sample(range(6, VOCABULARY), 9),
        "eos_token_id": draw.sample(range(1, VOCABULARY), draw.choice([1, 2, 9])),
        "forced_eos_token_id": draw.choice([None, 1, 2]),
        "sequence_bias": [[[draw.randrange(VOCABULARY)], draw.uniform(-3, 3)]],
    }
    for name in draw.sample(sorted(options), draw.randint(0, 4)):
        case[name] = options[name]
    if case["num_beams"] > 1:
        case["num_return_sequences"] = draw.randint(1, case["num_beams"])
    return case


def compare(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    """A family, weights, a batch and settings drawn from `seed`: ours against `generate`."""
    draw = random.Random(seed)
    family = draw.choice(FAMILIES)
    model = build(family, seed=draw.randrange(1000)).to(dtype)
    inputs = batch(model, lengths=[draw.randint(1, 14) for _ in range(draw.randint(1, 6))], seed=draw.randrange(1000))
    case = draw_case(draw)
    compaction = draw.random() < 0.8
    print(f"seed {seed}: {family} {case}")
    ours = decode(model, **inputs, **case, compaction=compaction)
    assert_equal(ours, reference(model, **inputs, **case), tolerance)
    assert ours.native


@pytest.mark.parametrize("number", draws(range(DRAWS)))
def test_random_configurations(number):
    """New draws in every run, in float64: what differs there is a mistake and never rounding."""
    print(f"GENERATION_SEED={SEED} draw {number}")
    compare(SEED + number, torch.float64, tolerance=1e-10)


@pytest.mark.parametrize("seed", draws(range(2026, 2026 + DRAWS)))
def test_drawn_configurations_in_float32(seed):
    """The same draws everywhere, as float32 rounds differently on every processor."""
    compare(seed, torch.float32, tolerance=1e-5)
