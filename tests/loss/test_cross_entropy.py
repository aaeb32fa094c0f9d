"""The summed loss: equal to the plain model's mean, whatever is padded or masked; only supervised positions meet the head."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from engine.data.collate import IGNORE_INDEX
from engine.loss.cross_entropy import aligned_labels, summed_cross_entropy, supervised_tokens


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_the_plain_forward_pass(family):
    model, batch = tiny.model(family), tiny.batch_for(family)
    ours = summed_cross_entropy(model, batch)
    plain = model(**batch).loss * supervised_tokens(batch)
    assert torch.allclose(ours, plain, rtol=1e-6)

    ours.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = model(**batch).loss * supervised_tokens(batch)
    plain.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_label_smoothing_is_that_of_torch(family):
    model, batch = tiny.model(family), tiny.batch_for(family)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = aligned_labels(batch)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
    assert torch.allclose(summed_cross_entropy(model, batch, label_smoothing=0.1), expected, rtol=1e-6)


def test_of_several_streams_the_one_that_decoding_reads_is_trained():
    """ProphetNet predicts further tokens in other streams; transformers trains them too unless it is told not to."""
    sizes = {"hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 400}
    config = AutoConfig.for_model("prophetnet", **sizes, num_encoder_layers=1, num_decoder_layers=1, pad_token_id=0)
    config.num_encoder_attention_heads = config.num_decoder_attention_heads = 4
    config.disable_ngram_loss = True
    model, batch = AutoModelForSeq2SeqLM.from_config(config).eval(), tiny.seq2seq_batch()
    plain = model(**batch).loss * supervised_tokens(batch)
    assert torch.allclose(summed_cross_entropy(model, batch), plain, rtol=1e-6)
    named = dict(model.named_parameters())
    ours = torch.autograd.grad(summed_cross_entropy(model, batch), list(named.values()))
    theirs = torch.autograd.grad(plain, list(named.values()))
    for name, mine, expected in zip(named, ours, theirs, strict=True):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-5), name


def test_head_is_left_as_found():
    model, batch = tiny.model("qwen3"), tiny.causal_batch()
    summed_cross_entropy(model, batch)
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_hook_is_removed_after_an_error():
    model, batch = tiny.model("llama"), tiny.causal_batch()
    batch["attention_mask"] = "not a tensor"
    with pytest.raises((AttributeError, TypeError)):
        summed_cross_entropy(model, batch)
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_supervised_adds_zero_and_reaches_every_parameter(family):
    model, batch = tiny.model(family), tiny.batch_for(family)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    loss = summed_cross_entropy(model, batch)
    assert loss.item() == 0.0 and supervised_tokens(batch).item() == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_ranks_that_drop_all_layers_of_a_decoder_still_hear_of_its_encoder(tmp_path):
    """DistributedDataParallel waits for the encoder, which stands behind the outputs though not behind the loss."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, batch = tiny.model("bart").train(), tiny.batch_for("bart")
        model.model.decoder.layerdrop = 1.0
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):  # what was not heard of in one pass is an error in the next
            summed_cross_entropy(wrapped, batch).backward()
    finally:
        dist.destroy_process_group()


def test_causal_shift_counts_what_it_trains():
    batch = {"labels": torch.tensor([[IGNORE_INDEX, 7, 8], [9, IGNORE_INDEX, 5]])}
    assert aligned_labels(batch).tolist() == [[7, 8, IGNORE_INDEX], [IGNORE_INDEX, 5, IGNORE_INDEX]]
    assert supervised_tokens(batch).item() == 3  # the label at position 0 has nothing before it to predict it from
