"""The micro-batch that fits: found before the first update, with the same windows and therefore the same training."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest
import runs
import torch
import yaml

from engine.data.collate import IGNORE_INDEX, collate_causal, collate_seq2seq
from engine.data.encode import Feature
from engine.errors import EngineError
from engine.loss import cross_entropy
from engine.recipe.schema import Recipe
from engine.runtime.ranks import RankGroup
from engine.training import batch_size


@pytest.fixture
def memory_for(monkeypatch):
    """Pretend that micro-batches of more than so many rows do not fit."""

    def limit(rows: int) -> None:
        plain = cross_entropy.summed_cross_entropy

        def tight(model, batch, **options):
            if batch["labels"].shape[0] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return plain(model, batch, **options)

        monkeypatch.setattr(batch_size, "summed_cross_entropy", tight)

    return limit


@pytest.mark.slow
def test_halves_the_micro_batch_and_keeps_the_updates(tmp_path, memory_for):
    settings = {"training__per_device_train_batch_size": 8, "evaluation__strategy": "no"}
    runs.train(
        runs.write_recipe(tmp_path / "plain", **settings, experiment__output_dir=str(tmp_path / "plain" / "run"))
    )
    memory_for(3)
    runs.train(runs.write_recipe(tmp_path / "auto", **settings, training__auto_batch_size=True))
    resolved = yaml.safe_load((tmp_path / "auto" / "run" / "recipe.yaml").read_text(encoding="utf-8"))["training"]
    assert (resolved["per_device_train_batch_size"], resolved["gradient_accumulation_steps"]) == (2, 4)
    plain, auto = (runs.rows_of(tmp_path / name / "run") for name in ("plain", "auto"))
    assert [row["sample_ids_sha256"] for row in plain] == [row["sample_ids_sha256"] for row in auto]


@pytest.mark.slow
def test_says_so_when_one_row_is_too_much(tmp_path, memory_for):
    memory_for(0)
    with pytest.raises(EngineError, match="single row") as caught:
        runs.train(runs.write_recipe(tmp_path, training__auto_batch_size=True))
    assert caught.value.exit_code == 8


@pytest.mark.slow
def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    def broken(model, batch, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(batch_size, "summed_cross_entropy", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        runs.train(runs.write_recipe(tmp_path, training__auto_batch_size=True))


@pytest.mark.parametrize(("number", "below", "divisor"), [(8, 5, 4), (10, 6, 5), (7, 4, 1), (6, 2, 1), (12, 4, 3)])
def test_largest_divisor(number, below, divisor):
    assert batch_size.largest_divisor(number, below=below) == divisor


def tried(monkeypatch, parts: list[tuple[int, ...]], micro: int) -> list[tuple[int, ...]]:
    """Shapes (rows, and the padded length of each part) of the batches that are tried before `micro` rows are taken."""
    model, shapes = torch.nn.Linear(1, 1), []

    def loss(model, batch, **options):
        shapes.append(
            (len(batch["labels"]), *(batch[name].shape[1] for name in ("input_ids", "labels")[: len(parts[0])]))
        )
        return model.weight.sum()

    monkeypatch.setattr(batch_size, "summed_cross_entropy", loss)
    features = [Feature([5] * row[0], [6] * row[-1] if len(row) > 1 else [IGNORE_INDEX] * row[0], 0) for row in parts]
    start = {"decoder_start_token_id": 0} if len(parts[0]) > 1 else {}
    collate = collate_seq2seq if start else collate_causal
    bundle = SimpleNamespace(model=model, collate=lambda rows: collate(rows, pad_token_id=0, **start))
    runtime = SimpleNamespace(
        accelerator=SimpleNamespace(no_sync=lambda model: nullcontext()),
        autocast=nullcontext,
        to_device=lambda batch: batch,
        random_state=lambda: None,
        restore_random_state=lambda state: None,
        device=torch.device("cpu"),
        ranks=RankGroup(),
    )
    recipe = Recipe(training={"per_device_train_batch_size": micro, "auto_batch_size": True})
    found = batch_size.with_fitting_batch(recipe, model, bundle, features, runtime)
    assert found.training.per_device_train_batch_size == micro
    return shapes


ROWS = [(512, 2), (300, 128), (512, 20), (512, 20), (10, 60)]


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:3], [(length,) for length, _ in ROWS]], ids=["many", "two", "causal"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_no_batch_is_larger_than_those_that_were_tried(monkeypatch, rows, micro):
    """Source and target are padded apart, so the rows of the greatest sum need not make the largest batch."""
    shapes = tried(monkeypatch, rows, micro)
    for batch in combinations(rows, min(micro, len(rows))):
        padded = (len(batch), *map(max, zip(*batch, strict=True)))
        assert any(all(map(int.__ge__, shape, padded)) for shape in shapes), padded
