"""A split is scored whole or evenly spaced, and training goes on as if there had been no evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from engine.data.rows import Example
from engine.evaluation import evaluate
from engine.evaluation.evaluate import Split
from engine.recipe.schema import Evaluation

FEATURES = SimpleNamespace(
    prompts=lambda examples: [("prompt", index) for index in range(len(examples))],
    training=lambda examples: [("target", index) for index in range(len(examples))],
)


def rows(count: int, references: tuple[str, ...] = ("요약",)) -> list[Example]:
    return [Example(f"row_{i}", f"대화 {i}", references, None, i + 1) for i in range(count)]


def test_a_subset_is_evenly_spaced_and_keeps_rows_together():
    split = Split.of("dev", rows(10), FEATURES)
    assert split.subset(None) is split.subset(10) is split
    part = split.subset(4)
    assert [row.id for row in part.examples] == ["row_0", "row_2", "row_5", "row_7"]
    assert part.prompts == [("prompt", i) for i in (0, 2, 5, 7)] and part.targets == [
        ("target", i) for i in (0, 2, 5, 7)
    ]


def test_a_split_without_all_references_has_no_targets():
    split = Split.of("test", [*rows(2), *rows(1, references=())], FEATURES)
    assert split.targets is None and len(split.prompts) == 3 and split.subset(1).targets is None


class Alone:
    """What an evaluation needs of the runtime, on one rank."""

    rank, world_size, device, is_main = 0, 1, torch.device("cpu"), True
    random_state = staticmethod(torch.get_rng_state)
    restore_random_state = staticmethod(torch.set_rng_state)
    autocast = staticmethod(lambda: torch.autocast("cpu", enabled=False))
    to_device = staticmethod(lambda value: value)
    ranks = SimpleNamespace(sum_across_ranks=lambda value: value, wait_for_all=lambda what: None)


@pytest.mark.parametrize("fails", [False, True])
def test_mode_and_random_streams_are_left_as_found(monkeypatch, fails):
    bundle = SimpleNamespace(model=tiny.model("bart").train())
    frozen = bundle.model.lm_head.eval()

    def loss(bundle, *others):
        assert not any(module.training for module in bundle.model.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        if fails:
            raise RuntimeError("out of memory")
        return 2.5

    monkeypatch.setattr(evaluate, "evaluation_loss", loss)
    before, modes = torch.get_rng_state(), [module.training for module in bundle.model.modules()]
    try:
        scores = evaluate.evaluate(bundle, Split("dev", rows(1), [None], [None]), Alone(), Evaluation(), None)
        assert scores.metrics["loss"] == 2.5 and not fails
    except RuntimeError:
        assert fails
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in bundle.model.modules()] == modes and not frozen.training


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_loss_is_the_mean_over_all_supervised_tokens(batch_size):
    model, whole = tiny.model("llama"), tiny.causal_batch(rows=3)
    targets = [SimpleNamespace(length=9, row=i) for i in range(3)]
    collate = lambda features: {name: value[[f.row for f in features]] for name, value in whole.items()}  # noqa: E731
    with torch.no_grad():
        found = evaluate.evaluation_loss(SimpleNamespace(model=model, collate=collate), targets, Alone(), batch_size)
        assert found == pytest.approx(model(**whole).loss.item(), rel=1e-5)
