"""Weights in and out of models: embeddings resized, saved weights restored, what is missing refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from built import CPU, build, logits, refused
from generation_toys import one_thread  # noqa: F401

from engine.errors import EngineError
from engine.models import hub, tokenization, weights
from engine.models.bundle import save_model
from engine.models.load import load_trained


def test_restoring_refuses_other_shapes_and_changes_nothing(tmp_path):
    save_model(build(tiny.save("llama", tmp_path / "a")), tmp_path / "saved")
    other = build(tiny.save("llama", tmp_path / "b", intermediate_size=96))
    before = logits(other.model, "llama")
    with pytest.raises(EngineError, match=r"E5\.10"):
        weights.load_weights(other.model, tmp_path / "saved")
    assert torch.equal(before, logits(other.model, "llama"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_new_rows_start_at_the_mean_of_their_old_spelling(tmp_path, family):
    folder = tiny.save(family, tmp_path)
    old = tokenization.load_tokenizer(folder)
    base = tiny.model(family, len(old))
    bundle = build(folder, tokenizer={"added_tokens": ["#Person1#", "#Address#", "하하"], "pad_to_multiple_of": 16})
    rows = bundle.model.get_input_embeddings().weight
    assert rows.shape[0] % 16 == 0 and bundle.report["vocabulary"] == len(old) + 2
    assert torch.equal(rows[: len(old)], base.get_input_embeddings().weight)
    for token in ("#Address#", "하하"):
        spelled = old.encode(token, add_special_tokens=False)
        for ours, theirs in (
            (rows, base.get_input_embeddings().weight),
            (bundle.model.get_output_embeddings().weight, base.get_output_embeddings().weight),
        ):
            expected = theirs[spelled].mean(0)
            torch.testing.assert_close(ours[bundle.tokenizer.convert_tokens_to_ids(token)], expected)


def test_an_untied_t5_keeps_its_own_output_head(tmp_path):
    """T5 1.1 (pko-T5 too): transformers' configuration calls it tied and a resize would copy the embedding over the head."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSeq2SeqLM

    folder = tiny.save("t5", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn_like(tensors["shared.weight"])
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    bundle = build(folder)
    rows = bundle.report["vocabulary_before"]
    assert bundle.report["embedding_rows"] > rows
    assert torch.equal(bundle.model.get_output_embeddings().weight[:rows], head)
    assert torch.equal(bundle.model.get_input_embeddings().weight[:rows], tensors["shared.weight"])
    save_model(bundle, tmp_path / "saved")
    expected = logits(bundle.model, "t5")
    assert torch.equal(logits(load_trained(tmp_path / "saved", device=CPU).model, "t5"), expected)
    assert torch.equal(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved"), "t5"), expected)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    folder = tiny.save("qwen3", tmp_path)
    gradients = []
    for checkpointing in (False, True):
        bundle = build(folder, training={"gradient_checkpointing": checkpointing})
        ids = torch.tensor([[5, 6, 7, 8]])
        bundle.model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(bundle.model.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients)


def test_missing_weights_are_not_filled_with_noise(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.save("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing" in refused("E4.8", folder)


def test_only_a_single_process_spreads_a_model_that_is_too_large(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path)
    weights_bytes = 4 * sum(hub.stored_types(folder).values())
    gpu = torch.device("cuda", 0)
    assert not weights.too_large(folder, torch.float32, CPU)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for free, expected in ((weights_bytes, True), (2 * weights_bytes, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert weights.too_large(folder, torch.float32, gpu) is expected
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not weights.too_large(folder, torch.float32, gpu)


def test_embeddings_never_shrink(tmp_path):
    model = tiny.model("llama", 400)
    weights.resize_embeddings(model, 100, {})
    assert model.get_input_embeddings().weight.shape[0] == 400


def test_a_peft_model_is_saved_by_what_is_trained():
    from peft import LoraConfig, get_peft_model

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x)

    model = get_peft_model(Base(), LoraConfig(target_modules=["linear"], r=2))
    assert weights.weights_of(model) and all("lora_" in name for name in weights.weights_of(model))
