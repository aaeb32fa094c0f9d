"""The loss in pieces: equal to torch's on whole logits for every form of head, without ever holding N x V of them."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.data.collate import IGNORE_INDEX
from engine.loss import output_head
from engine.loss.cross_entropy import aligned_labels, summed_cross_entropy

V, D, N = 211, 16, 37


class Forms(nn.Module):
    """Just a head and what `HeadForm.of` reads."""

    def __init__(self, *, bias=False, offset=False, scale=None, cap=None):
        super().__init__()
        self.lm_head = nn.Linear(D, V, bias=bias)
        if offset:
            self.register_buffer("final_logits_bias", torch.randn(1, V))
        text = type("Config", (), {"logits_scaling": scale, "final_logit_softcapping": cap})()
        self.config = type("Config", (), {"get_text_config": lambda _: text})()


FORMS = {
    "plain": {},
    "bias": {"bias": True},
    "offset": {"offset": True},
    "both biases": {"bias": True, "offset": True},
    "scaled": {"scale": 8.0},
    "capped": {"cap": 3.0},
    "all of it": {"bias": True, "scale": 0.5, "cap": 2.0},
}


def whole(hidden, model, targets, smoothing):
    """What a transformers model computes, as one expression."""
    logits = model.lm_head(hidden)
    if hasattr(model, "final_logits_bias"):
        logits = logits + model.final_logits_bias
    config = model.config.get_text_config()
    logits = logits / (config.logits_scaling or 1.0)
    if config.final_logit_softcapping is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return F.cross_entropy(logits.to(hidden.dtype), targets, reduction="sum", label_smoothing=smoothing)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None and tensor.requires_grad])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(output_head, "PIECE", 5 * V)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equals_torch_on_whole_logits(small_pieces, form, frozen, smoothing):
    torch.manual_seed(0)
    model = Forms(**FORMS[form]).double().requires_grad_(not frozen)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (N,))
    tensors = (hidden, model.lm_head.weight, model.lm_head.bias)
    ours = output_head.cross_entropy(hidden, targets, model, model.lm_head, smoothing)
    theirs = whole(hidden, model, targets, smoothing)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for mine, peer in zip(gradients(3.0 * ours, *tensors), gradients(3.0 * theirs, *tensors), strict=True):
        assert torch.allclose(mine, peer, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_loses_nothing_to_the_whole_way(small_pieces, dtype):
    """Both ways against float64: pieces may not be further from the truth, tiny gradients under the loss scale included."""
    torch.manual_seed(0)
    model, targets = Forms(), torch.randint(V, (N,))
    hidden = torch.randn(N, D, requires_grad=True)
    tensors = (hidden, model.lm_head.weight)
    factor = 2.0**-9 if dtype == torch.bfloat16 else 2.0**12  # the second as a loss scale
    with torch.autocast("cpu", dtype=dtype):
        ours = output_head.cross_entropy(hidden, targets, model, model.lm_head, 0.0)
        theirs = F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")
    assert ours.dtype == torch.float32
    mine, peers = gradients(factor * ours, *tensors), gradients(factor * theirs, *tensors)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_model = Forms().double()
    exact_model.lm_head.weight.data = model.lm_head.weight.data.double()
    exact = whole(exact_hidden, exact_model, targets, 0.0)
    truth = gradients(factor * exact, exact_hidden, exact_model.lm_head.weight)
    assert abs(ours - exact) <= 1.05 * abs(theirs - exact) + 1e-3
    for mine_, peer, true in zip(mine, peers, truth, strict=True):
        assert mine_.dtype == torch.float32
        assert (mine_ - true).norm() <= 1.1 * (peer - true).norm()


def test_half_precision_waits_for_the_loss_scale():
    """Softmax shares of 150,000 tokens vanish in fp16 unless they are scaled before they are rounded."""
    model = Forms()
    model.lm_head = nn.Linear(D, 150_000, bias=False)
    nn.init.zeros_(model.lm_head.weight)
    model.lm_head.weight.data[:1] = 40.0  # one sure token: the others' shares are far below 6e-8
    hidden = torch.ones(2, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = output_head.cross_entropy(hidden * 0.02, torch.zeros(2, dtype=torch.int64), model, model.lm_head, 0.0)
    (by_weight,) = gradients(2.0**16 * loss, model.lm_head.weight)
    assert by_weight[1:].abs().min() > 0


@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_heads_that_are_more_than_a_matrix(small_pieces, kind):
    from peft import LoraConfig, get_peft_model

    base, batch = tiny.model("llama"), tiny.causal_batch()
    target = {"target_modules": ["q_proj", "lm_head"]} if kind == "adapter" else {"modules_to_save": ["lm_head"]}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=target.pop("target_modules", ["q_proj"]), **target))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    ours = summed_cross_entropy(model, batch)
    labels = aligned_labels(batch).flatten()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.flatten(0, 1)
    theirs = F.cross_entropy(logits, labels, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for mine, peer in zip(gradients(ours, *trained), gradients(theirs, *trained), strict=True):
        assert torch.allclose(mine, peer, rtol=1e-4, atol=1e-6)


def test_an_unknown_form_is_trained_on_whole_logits_and_told_once(caplog):
    model, batch = tiny.model("llama"), tiny.causal_batch()

    class Own(type(model)):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits = output.logits.square()
            return output

    model.__class__ = Own
    with caplog.at_level(logging.WARNING, "engine.train"):
        losses = [summed_cross_entropy(model, batch) for _ in range(2)]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.flatten(0, 1)
    theirs = F.cross_entropy(logits, aligned_labels(batch).flatten(), reduction="sum")
    assert all(torch.allclose(loss, theirs, rtol=1e-6) for loss in losses)
    assert len(caplog.records) == 1 and "a way of its own" in caplog.text


class RowsOfLogits(TorchDispatchMode):
    """The most rows of any tensor of V columns that an operation returned; (D, V) is the head's own matrix."""

    def __init__(self, head):
        super().__init__()
        self.vocabulary, self.hidden, self.most = *head.weight.shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[-1] == self.vocabulary:
                rows = leaf.numel() // self.vocabulary
                self.most = self.most if rows == self.hidden else max(self.most, rows)
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_a_piece_of_the_logits_exists_at_any_time(monkeypatch, family, smoothing):
    model, batch = tiny.model(family), tiny.batch_for(family)
    batch = {name: tensor.repeat(40, 1) for name, tensor in batch.items()}
    head = model.get_output_embeddings()
    monkeypatch.setattr(output_head, "PIECE", 8 * head.weight.shape[0])
    summed_cross_entropy(model, batch)  # the first one also holds the head's form against the model
    with RowsOfLogits(head) as seen:
        summed_cross_entropy(model, batch, label_smoothing=smoothing).backward()
    assert seen.most == 8 < (aligned_labels(batch) != IGNORE_INDEX).sum()
