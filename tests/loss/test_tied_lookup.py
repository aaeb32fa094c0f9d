"""Embeddings that share the head's weight: autograd's own gradients, without one as large as the weight for each lookup."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from engine.loss import tied_lookup
from engine.loss.cross_entropy import aligned_labels, summed_cross_entropy

V, D = 400, 32
LAYERS = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TIED = {
    "llama": LAYERS | {"num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 5},
    "qwen3": LAYERS | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "t5": {
        "d_model": D,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
}


def tied(kind: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = AutoConfig.for_model(kind, vocab_size=V, **TIED[kind])
    torch.manual_seed(3)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).double().eval()
    ids = torch.randint(V, (3, 11))
    ids[:, :4] = 5  # rows of one token meet in one place
    labels = torch.randint(V, (3, 11))
    labels[0, :6] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return model, batch


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TIED)
def test_gradients_are_those_of_the_plain_model(kind, checkpointing):
    model, batch = tied(kind)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    named = dict(model.named_parameters())
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), aligned_labels(batch).flatten(), reduction="sum")
    plain = torch.autograd.grad(loss, list(named.values()))
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()  # a hook of somebody else's on the embedding
    for _ in range(2):  # two micro-batches of one update
        summed_cross_entropy(model, batch).backward()
    for name, expected in zip(named, plain, strict=True):
        assert torch.allclose(named[name].grad, 2 * expected, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", TIED)
def test_no_lookup_has_a_gradient_of_the_weights_size(kind):
    model, batch = tied(kind)
    summed_cross_entropy(model, batch).backward()  # the first call looks at one position's logits besides
    model.zero_grad()
    loss = summed_cross_entropy(model, batch)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss.backward()
    names = [event.name for event in seen.events()]
    assert "aten::index_add_" in names
    whole = [event for event in seen.events() if event.name == "aten::zeros" and event.cpu_memory_usage >= V * D * 8]
    assert not whole, "no (V, D) of zeros"


def test_what_others_make_of_the_rows_stays():
    """A hook that was there before, such as one that adds noise, works on our rows and not on ones that are dropped."""
    model, batch = tied("llama")
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: 2.0 * output)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    loss = F.cross_entropy(logits.flatten(0, 1), aligned_labels(batch).flatten(), reduction="sum")
    ours = summed_cross_entropy(model, batch)
    assert torch.allclose(ours, loss, rtol=1e-6)
    weight = model.get_output_embeddings().weight
    pair = [torch.autograd.grad(value, weight)[0] for value in (ours, loss)]
    assert torch.allclose(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TIED)
def test_on_a_gpu_the_same_gradients_each_time(gpu, kind):
    """Adding rows in no fixed order would make a resumed run another one."""
    model, batch = tied(kind)
    model = model.to(gpu, torch.float32)
    model.tie_weights()
    batch = {name: value.repeat(8, 1).to(gpu) for name, value in batch.items()}
    weight = model.get_output_embeddings().weight
    found = [torch.autograd.grad(summed_cross_entropy(model, batch), weight)[0] for _ in range(5)]
    assert all(torch.equal(one, found[-1]) for one in found[1:])
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    loss = F.cross_entropy(logits.flatten(0, 1), aligned_labels(batch).flatten(), reduction="sum")
    assert torch.allclose(found[-1], torch.autograd.grad(loss, weight)[0], rtol=1e-3, atol=1e-4)


def test_embeddings_that_do_more_and_frozen_heads_are_left_alone():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 8.0 * super().forward(ids)

    head = nn.Linear(D, V, bias=False)
    plain, scaled = nn.Embedding(V, D), Scaled(V, D)
    counting, other = nn.Embedding(V, D, scale_grad_by_freq=True), nn.Embedding(V, D)
    model = nn.ModuleList([head, plain, scaled, counting, other])
    for module in (plain, scaled, counting):
        module.weight = head.weight
    assert tied_lookup._lookups(model, head) == [plain]
    with tied_lookup.passing_on(model, head) as passed:
        plain(torch.tensor([1, 2]))
        assert torch.equal(passed.weight, head.weight) and passed.weight is not head.weight
    assert not plain._forward_hooks
    head.requires_grad_(False)
    assert tied_lookup._lookups(model, head) == []


def test_rows_of_padding_get_nothing_and_a_weight_without_a_further_user_its_rows():
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids, factor = torch.tensor([[7, 3, 7], [5, 5, 1]]), torch.randn(2, 3, D, dtype=torch.float64)
    (expected,) = torch.autograd.grad((F.embedding(ids, weight, padding_idx=5) * factor).sum(), weight)
    rows, passed = tied_lookup._Lookup.apply(weight, ids, 5)
    (ours,) = torch.autograd.grad((rows * factor).sum(), weight)
    assert torch.equal(ours, expected)
    rows, passed = tied_lookup._Lookup.apply(weight, ids, 5)
    (ours,) = torch.autograd.grad((rows * factor).sum() + 3.0 * passed.sum(), weight)
    assert torch.allclose(ours, expected + 3.0)
    rows, passed = tied_lookup._Lookup.apply(weight, ids, 5)
    assert torch.equal(torch.autograd.grad(passed.sum(), weight)[0], torch.ones_like(weight))
