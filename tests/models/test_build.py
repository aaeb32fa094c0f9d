"""Models for training: built, saved, reloaded and restored to the bit."""

from __future__ import annotations

import pytest
import tiny
import torch
from built import CPU, SPOKEN, build, logits
from generation_toys import one_thread  # noqa: F401

from engine.generation.modelstate import bare
from engine.models import tokenization, weights
from engine.models.bundle import save_model, save_weights
from engine.models.load import load_trained


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_build_save_reload_and_restore_to_the_bit(tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    bundle = build(tiny.save(family, tmp_path / "base"))
    saved = tmp_path / "saved"
    save_model(bundle, saved)
    assert not [path for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]

    again = load_trained(saved, device=CPU)
    assert torch.equal(logits(bundle.model, family), logits(again.model, family))
    assert again.prompt == bundle.prompt and again.lengths == bundle.lengths
    assert again.family == bundle.family == ("causal" if family in tiny.CAUSAL else "seq2seq")

    auto = AutoModelForCausalLM if family in tiny.CAUSAL else AutoModelForSeq2SeqLM
    alone = auto.from_pretrained(saved)
    assert torch.equal(logits(bundle.model, family), logits(alone, family))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer(SPOKEN)["input_ids"] == bundle.tokenizer(SPOKEN)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(SPOKEN), skip_special_tokens=True) == SPOKEN

    other = build(tmp_path / "base", training={"seed": 7})
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)
    weights.load_weights(other.model, saved)
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_a_snapshot_is_saved_in_place_of_the_live_weights(tmp_path):
    bundle = build(tiny.save("bart", tmp_path / "base"))
    frozen = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    before = logits(bundle.model, "bart")
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.mul_(2)
    save_model(bundle, tmp_path / "saved", state_dict=frozen)
    assert torch.equal(before, logits(load_trained(tmp_path / "saved", device=CPU).model, "bart"))


def test_wrapped_models_are_saved_bare(tmp_path):
    bundle = build(tiny.save("t5", tmp_path / "base"))
    inner = bundle.model

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    bundle.model = Wrapper(inner)
    assert bare(bundle.model) is inner
    save_weights(bundle, tmp_path / "saved")
    weights.load_weights(bundle.model, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_random_models_train_their_own_tokenizer(tmp_path, family, kind):
    rows = tiny.write_rows(tmp_path / "train.jsonl")
    values = tiny.config_values(family)
    for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        values.pop(key, None)
    sections = {
        "data": {"train_file": str(rows)},
        "tokenizer": {"train_vocab_size": 420, "train_model_type": kind},
    }
    first, second = (build(model={"init": "random", "config": dict(values)}, **sections) for _ in range(2))
    assert torch.equal(logits(first.model, family), logits(second.model, family))
    assert tokenization.tokenizer_fingerprint(first.tokenizer) == tokenization.tokenizer_fingerprint(second.tokenizer)
    tokenizer, config = first.tokenizer, first.model.config
    assert config.vocab_size == len(tokenizer) <= 420
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    if first.family == "seq2seq":
        start = tokenizer.pad_token_id if family == "t5" else tokenizer.eos_token_id
        assert first.model.generation_config.decoder_start_token_id == config.decoder_start_token_id == start
        assert getattr(config, "forced_eos_token_id", None) is None
        assert tokenizer("가").input_ids[-1] == tokenizer.eos_token_id
    else:
        assert tokenizer("가").input_ids[0] == tokenizer.bos_token_id
    save_model(first, tmp_path / "saved")
    assert torch.equal(logits(first.model, family), logits(load_trained(tmp_path / "saved", device=CPU).model, family))


def test_a_seed_decides_random_weights_and_leaves_the_callers_stream(tmp_path):
    model = {"init": "random", "name_or_path": str(tiny.save("bart", tmp_path))}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build(model=model, training={"seed": 1})
    assert torch.equal(torch.rand(3), expected)
    second, third = build(model=model, training={"seed": 1}), build(model=model, training={"seed": 2})
    assert torch.equal(logits(first.model, "bart"), logits(second.model, "bart"))
    assert not torch.equal(logits(first.model, "bart"), logits(third.model, "bart"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trained_weights_are_float32_under_every_precision(tmp_path, precision):
    bundle = build(tiny.save("bart", tmp_path), precision=precision)
    assert {p.dtype for p in bundle.model.parameters()} == {torch.float32}
    assert bundle.report["precision"] == precision


def test_kobart_keeps_its_quirks_and_the_spacing_of_placeholders(tmp_path, shared_data):
    small = {
        "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    }  # fmt: skip
    bundle = build(shared_data / "tokenizers" / "kobart", model={"init": "random", "config": small})
    assert (bundle.report["vocabulary_before"], bundle.report["vocabulary"]) == (30000, 30016)
    assert bundle.model.config.decoder_start_token_id == 2
    save_model(bundle, tmp_path)
    for made in (bundle, load_trained(tmp_path, device=CPU)):
        generation = made.model.generation_config
        assert (generation.eos_token_id, generation.forced_eos_token_id) == ([1], 2)
        assert (generation.decoder_start_token_id, generation.pad_token_id) == (2, 3)
        assert made.tokenizer.decode(made.tokenizer.encode(SPOKEN), skip_special_tokens=True) == SPOKEN
        assert made.tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]
