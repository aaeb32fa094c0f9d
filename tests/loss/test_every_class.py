"""Every class that transformers can generate text with: loss and gradients are those of its own logits.

The default run takes a few classes drawn anew each time; FULL_TESTS=1 takes all. FSMT is refused before it is trained.
"""

from __future__ import annotations

import os
import random
import warnings

import pytest
import torch
from every_class import CLASSES, VOCABULARY, NotBuilt, build
from torch.nn import functional as F

from engine.data.collate import IGNORE_INDEX
from engine.loss.cross_entropy import aligned_labels, summed_cross_entropy

pytestmark = pytest.mark.slow
FULL = "FULL_TESTS" in os.environ
SEED = int(os.environ.get("LOSS_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
DRAWS = 3
TRAINED = sorted(key for key in CLASSES if key != ("fsmt", True))


def name_of(key) -> str:
    return f"{key[0]}-{'seq2seq' if key[1] else 'causal'}"


@pytest.mark.skipif(FULL, reason="all are run")
@pytest.mark.parametrize("number", range(DRAWS))
def test_class_drawn(number):
    hold_against_its_own_logits(random.Random(SEED + number).choice(TRAINED))


@pytest.mark.parametrize("key", TRAINED if FULL else [], ids=name_of)
def test_class(key):
    hold_against_its_own_logits(key)


def hold_against_its_own_logits(key):
    stream = random.Random(f"{SEED} {key}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(*key, seed=stream.randrange(1000))
        except NotBuilt as reason:
            pytest.skip(f"not built: {reason}")
        batch = batch_for(model, stream)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        plain = F.cross_entropy(logits.flatten(0, 1), aligned_labels(batch).flatten(), reduction="sum")
        expected = torch.autograd.grad(plain, list(named.values()), allow_unused=True)
        if not all(bool(value.isfinite().all()) for value in (plain, *filter(torch.is_tensor, expected))):
            pytest.skip("a model that small has no finite gradients")
        for _ in range(2):  # the first call looks at one position's logits besides
            ours = summed_cross_entropy(model, batch)
            found = torch.autograd.grad(ours, list(named.values()), allow_unused=True)
    exact = next(model.parameters()).dtype == torch.float64
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5), f"repeat with LOSS_SEED={SEED}"
    scale = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for name, mine, theirs in zip(named, found, expected, strict=True):
        pair = [torch.zeros_like(named[name]) if gradient is None else gradient for gradient in (mine, theirs)]
        worst = float((pair[0] - pair[1]).abs().max())
        assert worst <= (1e-6 if exact else 1e-4) * scale, f"{name}: repeat with LOSS_SEED={SEED}"


def batch_for(model, stream: random.Random) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[stream.randrange(3, VOCABULARY) for _ in range(9)] for _ in range(2)])
    ids[:, :3] = 4  # one token at several places
    labels = ids.clone()
    labels[0, :3] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.cat([torch.zeros(2, 1, dtype=torch.long), ids[:, :-1]], dim=1)
    return batch
