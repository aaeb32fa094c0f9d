"""Ensembles against answers worked out by hand, and against computations that share no code with them."""

from __future__ import annotations

import itertools

import ensembling
import pytest
import tiny
import torch
from ensembling import average_state_dicts, average_tensors, choose_by_consensus, generate_together

from engine.generation.api import generate_all
from engine.generation.settings import GenerationSettings

pytestmark = pytest.mark.slow

# --- consensus of texts ---


def test_consensus_by_hand():
    """Whitespace ROUGE-1: a b and a b c score 0.8, either with d 0."""
    candidates = ["d", "a b c", "a b"]
    choice = choose_by_consensus(candidates, metric="rouge1", tokenizer="whitespace")
    assert choice.index == 1  # a tie with candidate 2: the earlier one
    assert choice.expected == pytest.approx((100 + 80 + 0) / 3)
    # a b c d: 2/3 with a b, 6/7 with a b c, 2/5 with d: it agrees best with all of them
    choice = choose_by_consensus([*candidates, "a b c d"], metric="rouge1", tokenizer="whitespace")
    assert choice.text == "a b c d" and choice.expected == pytest.approx(100 * (1 + 2 / 3 + 6 / 7 + 2 / 5) / 4)


def test_consensus_is_neither_the_longest_nor_the_heaviest():
    candidates = [
        "전혀 다른 아주 길고 긴 요약 문장을 쓴 모델",
        "회의는 내일 3시다",
        "회의는 내일 3시입니다",
        "회의는 내일 2시다",
    ]
    assert choose_by_consensus(candidates).index in (1, 2, 3)
    assert choose_by_consensus(candidates, [0.4, 0.2, 0.2, 0.2]).index == 1
    assert choose_by_consensus(candidates, [0.97, 0.01, 0.01, 0.01]).index == 0


def test_equal_texts_are_votes_and_order_does_not_matter():
    votes = ["가 나 다", "라 마", "라 마", "가 바 사"]
    for order in itertools.permutations(range(4)):
        assert choose_by_consensus([votes[i] for i in order], tokenizer="whitespace").text == "라 마"


def test_weights_are_expected_gains():
    # rouge1: sim(x y, x) = 2/3, sim(x y, z) = 0, sim(x, z) = 0
    candidates, weights = ["x y", "x", "z"], [1.0, 1.0, 2.0]
    choice = choose_by_consensus(candidates, weights, metric="rouge1", tokenizer="whitespace")
    assert choice.text == "z" and choice.expected == pytest.approx(50.0)  # against 25 + 16.7
    assert choose_by_consensus(candidates, [1, 1, 1], metric="rouge1", tokenizer="whitespace").text == "x y"
    assert choose_by_consensus(["x", "z"], [1, 3], tokenizer="whitespace").text == "z"


def test_empty_candidates_lose():
    assert choose_by_consensus(["", "", "회의는 내일이다", "회의는 모레다"]).index == 2
    assert choose_by_consensus([""]).text == ""


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        choose_by_consensus(["가", "나"], weights)


# --- mean of weights ---


def test_average_by_hand():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert torch.equal(average_tensors([a, b]), torch.tensor([2.0, 4.0]))
    assert torch.equal(average_tensors([a, b], [3, 1]), torch.tensor([1.5, 3.0]))


def test_average_keeps_types_and_sums_in_float32():
    halves = [torch.full((4,), 1.0, dtype=torch.bfloat16), torch.full((4,), 1.0078125, dtype=torch.bfloat16)]
    mean = average_tensors([*halves, *halves])
    assert mean.dtype == torch.bfloat16 and mean[0] in (1.0, 1.0078125)
    big = torch.full((2,), 60000.0, dtype=torch.float16)  # the sum is beyond float16
    assert torch.equal(average_tensors([big] * 3), big)
    counter = torch.tensor([3, 4])
    assert torch.equal(average_tensors([counter, counter]), counter)
    with pytest.raises(ValueError, match="have no mean"):
        average_tensors([counter, counter + 1])


def test_average_of_a_linear_model_is_the_mean_of_its_outputs():
    members = [torch.nn.Linear(3, 2) for _ in range(3)]
    mean = torch.nn.Linear(3, 2)
    mean.load_state_dict(average_state_dicts([m.state_dict() for m in members], [0.5, 0.25, 0.25]))
    x = torch.randn(5, 3)
    expected = 0.5 * members[0](x) + 0.25 * members[1](x) + 0.25 * members[2](x)
    assert torch.allclose(mean(x), expected, atol=1e-6)


def test_average_refuses_other_models():
    state = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match="such as b"):
        average_state_dicts([state, {"a": torch.zeros(2)}])
    with pytest.raises(ValueError, match=r"^a: shapes differ"):
        average_state_dicts([state, state | {"a": torch.zeros(3)}])
    with pytest.raises(ValueError, match="nothing to average"):
        average_state_dicts([])


# --- mean of token probabilities ---

VOCABULARY = 40


def tiny_model(family: str, seed: int, width: int = 16):
    shape = {
        "bart": {"d_model": width, "encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.6}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2},
        "llama": {"hidden_size": width, "head_dim": width // 4, "intermediate_size": 32, "initializer_range": 0.6},
    }
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return tiny.model(family, VOCABULARY, seed=seed, **ids, **shape[family])


def prompts(seed: int, lengths=(9, 4, 7)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def settings_for(model, **values) -> GenerationSettings:
    return GenerationSettings.resolve(
        {"num_beams": 3, "max_new_tokens": 8, "early_stopping": True} | values,
        model_generation_config=model.generation_config,
        is_encoder_decoder=model.config.is_encoder_decoder,
    )


@torch.no_grad()
def mean_log_probabilities(models, shares, rows, beams):
    """Log of the mean distribution after each of `beams`, every model run from scratch, without cache or padding."""
    total = 0.0
    for model, share, row in zip(models, shares, rows, strict=True):
        source = torch.tensor([row] * len(beams))
        written = torch.tensor(beams, dtype=torch.long).reshape(len(beams), -1)
        if model.config.is_encoder_decoder:
            start = torch.full((len(beams), 1), 2)
            logits = model(input_ids=source, decoder_input_ids=torch.cat([start, written], dim=1)).logits
        else:
            logits = model(input_ids=torch.cat([source, written], dim=1)).logits
        total = total + share * logits[:, -1].double().softmax(-1)
    return total.log().tolist()


def plain_beam_search(models, shares, rows, beams: int, limit: int, penalty: float, eos: int = 2):
    """Textbook beam search over lists: ends when `beams` hypotheses are there (early_stopping=True)."""
    running, finished = [(0.0, [])], []
    for step in range(1, limit + 1):
        scored = mean_log_probabilities(models, shares, rows, [written for _, written in running])
        extended = [
            (score + s, [*written, token])
            for (score, written), scores in zip(running, scored, strict=True)
            for token, s in enumerate(scores)
        ]
        extended = sorted(extended, key=lambda pair: -pair[0])[: 2 * beams]
        for score, written in extended[:beams]:
            if written[-1] == eos or step == limit:
                finished.append((score / step**penalty, written))
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        running = [pair for pair in extended if pair[1][-1] != eos][:beams]
        if len(finished) == beams:
            break
    return finished


@pytest.mark.parametrize("family", ["bart", "llama"])
@pytest.mark.parametrize("penalty", [1.0, 0.3])
def test_together_equals_a_direct_computation(family, penalty):
    models, weights = [tiny_model(family, 1), tiny_model(family, 2), tiny_model(family, 3, width=24)], [3.0, 2.0, 1.0]
    rows = prompts(5)
    settings = settings_for(models[0], length_penalty=penalty, num_return_sequences=2)
    found = generate_together(models, [rows] * 3, settings, pad_token_id=1, weights=weights)
    shares = [w / 6 for w in weights]
    for row, hypotheses in zip(rows, found, strict=True):
        expected = plain_beam_search(models, shares, [row] * 3, beams=3, limit=8, penalty=penalty)
        assert [h.token_ids for h in hypotheses] == [written for _, written in expected[:2]]
        assert [h.score for h in hypotheses] == pytest.approx([score for score, _ in expected[:2]], abs=1e-4)


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_members_may_have_their_own_prompts(family):
    models = [tiny_model(family, 1), tiny_model(family, 2)]
    rows = [prompts(5), prompts(6, lengths=(5, 8, 3))]
    found = generate_together(models, rows, settings_for(models[0]), pad_token_id=1, max_batch_size=2)
    for own, hypotheses in zip(zip(*rows, strict=True), found, strict=True):
        expected = plain_beam_search(models, [0.5, 0.5], own, beams=3, limit=8, penalty=1.0)
        assert hypotheses[0].token_ids == expected[0][1]


@pytest.mark.parametrize("family", ["bart", "llama"])
@pytest.mark.parametrize("values", [{}, {"num_beams": 1}, {"no_repeat_ngram_size": 2, "min_new_tokens": 4}])
def test_one_model_or_twins_are_the_model_alone(family, values):
    model, rows = tiny_model(family, 4), prompts(7)
    settings = settings_for(model, **values)
    alone = [h[0].token_ids for h in generate_all(model, rows, settings, pad_token_id=1)]
    for members in ([model], [model, model], [model, tiny_model(family, 4)]):
        together = generate_together(members, [rows] * len(members), settings, pad_token_id=1)
        assert [h[0].token_ids for h in together] == alone
    stranger = tiny_model(family, 9)
    together = generate_together([model, stranger], [rows] * 2, settings, pad_token_id=1, weights=[1, 0])
    assert [h[0].token_ids for h in together] == alone


def test_mask_callback_and_ends():
    models, rows = [tiny_model("bart", 1), tiny_model("bart", 2)], prompts(5)
    mask = torch.zeros(VOCABULARY)
    mask[20:] = -torch.inf
    seen: list[int] = []
    found = generate_together(
        models,
        [rows] * 2,
        settings_for(models[0]),
        pad_token_id=1,
        max_batch_size=2,
        vocabulary_mask=mask,
        on_batch=lambda batch, _: seen.extend(batch),
    )
    assert sorted(seen) == [0, 1, 2]
    assert all(token < 20 for h in found for token in h[0].token_ids)
    assert all(h[0].ended == (h[0].token_ids[-1] == 2) for h in found)


def test_a_mask_per_prompt_follows_its_prompt():
    models, rows = [tiny_model("bart", 1), tiny_model("bart", 2)], prompts(5)
    masks = torch.zeros(3, VOCABULARY)
    masks[0, 20:] = masks[2, 3:20] = -torch.inf
    free = generate_together(models, [rows] * 2, settings_for(models[0]), pad_token_id=1)
    for size in (1, 2, 3):
        found = generate_together(
            models, [rows] * 2, settings_for(models[0]), pad_token_id=1, max_batch_size=size, vocabulary_mask=masks
        )
        assert all(token < 20 for token in found[0][0].token_ids)
        assert not any(3 <= token < 20 for token in found[2][0].token_ids)
        assert found[1][0].token_ids == free[1][0].token_ids


def test_together_refuses_what_cannot_be_averaged():
    bart, llama = tiny_model("bart", 1), tiny_model("llama", 1)
    rows, settings = prompts(5), settings_for(bart)
    with pytest.raises(ValueError, match="cannot be decoded together"):
        generate_together([bart, llama], [rows] * 2, settings, pad_token_id=1)
    wider = tiny_model("bart", 2)
    wider.resize_token_embeddings(VOCABULARY + 2)
    with pytest.raises(ValueError, match="vocabularies differ"):
        generate_together([bart, wider], [rows] * 2, settings, pad_token_id=1)
    with pytest.raises(ValueError, match="own prompt"):
        generate_together([bart, bart], [rows], settings, pad_token_id=1)
    with pytest.raises(ValueError, match="2 weights for 1"):
        generate_together([bart], [rows], settings, pad_token_id=1, weights=[1, 1])
    assert bart.config._attn_implementation == "sdpa" and not ensembling.normalised(None, 4)[0] - 0.25
