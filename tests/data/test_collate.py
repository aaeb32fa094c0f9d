"""Features to batches: padding by position, labels that end in the end token, and the loss that comes of them."""

from __future__ import annotations

import pytest
import tiny
import torch
from encoders import encoder, example, tiny_llama

from engine.data.collate import IGNORE_INDEX, collate_causal, collate_seq2seq
from engine.data.encode import Feature, encode_all


def test_pad_equal_to_eos_never_masks_the_end_token():
    tokenizer = tiny_llama("unigram")
    tokenizer.pad_token = tokenizer.eos_token
    made = encoder("llama", "instruction", tokenizer=tokenizer)
    features = [made.training_feature(example(d, s), 0) for d, s in zip(tiny.TEXTS, tiny.TEXTS[5:], strict=False)]
    batch = collate_causal(features, pad_token_id=tokenizer.pad_token_id)
    for row, feature in enumerate(features):
        length = len(feature.input_ids)
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][row].sum() == length


def test_encoder_decoder_batch():
    features = [Feature([5, 6, 7], [8, 9, 1], 0), Feature([5], [8, 1], 1)]
    batch = collate_seq2seq(features, pad_token_id=3, decoder_start_token_id=2)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [5, 3, 3]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[8, 9, 1], [8, 1, IGNORE_INDEX]],
        "decoder_input_ids": [[2, 8, 9], [2, 8, 3]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert [feature.length for feature in features] == [6, 3]
    without = collate_seq2seq([Feature([5], None, 0)], pad_token_id=3, decoder_start_token_id=2)
    assert set(without) == {"input_ids", "attention_mask"}


def test_causal_batch():
    features = [Feature([5, 6, 1], [IGNORE_INDEX, 6, 1], 0), Feature([5, 6, 7, 1], [IGNORE_INDEX] * 2 + [7, 1], 1)]
    batch = collate_causal(features, pad_token_id=1)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 1, 1], [5, 6, 7, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[IGNORE_INDEX, 6, 1, IGNORE_INDEX], [IGNORE_INDEX, IGNORE_INDEX, 7, 1]],
    }
    assert [feature.length for feature in features] == [3, 4]


def test_batches_refuse_nothing_and_mixtures():
    with pytest.raises(ValueError, match="at least one"):
        collate_causal([], pad_token_id=0)
    with pytest.raises(ValueError, match="have none"):
        collate_causal([Feature([1], [1], 0), Feature([1], None, 1)], pad_token_id=0)


def test_the_loss_of_the_labels_is_transformers_own():
    """Shift, start token and masks as the models themselves do them."""
    from engine.loss.cross_entropy import summed_cross_entropy, supervised_tokens

    for family in ("bart", "llama"):
        made, model = encoder(family), tiny.model(family, len(tiny.tokenizer(family)))
        features = encode_all(
            made, [example(text, summary) for text, summary in zip(tiny.TEXTS, tiny.TEXTS[5:], strict=False)]
        )
        collate = collate_causal if family == "llama" else collate_seq2seq
        start = {} if family == "llama" else {"decoder_start_token_id": model.config.decoder_start_token_id}
        batch = collate(features, pad_token_id=made.tokenizer.pad_token_id, **start)
        own = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
        ours = summed_cross_entropy(model, batch) / supervised_tokens(batch)
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
