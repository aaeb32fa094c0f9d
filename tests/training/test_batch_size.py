"""The micro-batch that fits: found before the first update, with the same windows and therefore the same training."""

from __future__ import annotations

import pytest
import runs
import torch
import yaml

from engine.errors import EngineError
from engine.loss import cross_entropy
from engine.training import batch_size

pytestmark = pytest.mark.slow


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


def test_says_so_when_one_row_is_too_much(tmp_path, memory_for):
    memory_for(0)
    with pytest.raises(EngineError, match="single row") as caught:
        runs.train(runs.write_recipe(tmp_path, training__auto_batch_size=True))
    assert caught.value.exit_code == 8


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    def broken(model, batch, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(batch_size, "summed_cross_entropy", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        runs.train(runs.write_recipe(tmp_path, training__auto_batch_size=True))


@pytest.mark.parametrize(("number", "below", "divisor"), [(8, 5, 4), (10, 6, 5), (7, 4, 1), (6, 2, 1), (12, 4, 3)])
def test_largest_divisor(number, below, divisor):
    assert batch_size.largest_divisor(number, below=below) == divisor
