"""One update's gradient does not depend on how its rows were cut into micro-batches and ranks."""

from __future__ import annotations

import os

import pytest
import runs
import torch
from safetensors.torch import load_file

# 22 rows in windows of 8: the last window is short (6 rows), and the rows differ in length and in supervised tokens.
ROWS = 22
SPLITS = {
    "1 x 8": (1, 8, 1),
    "4 accumulated x 2": (1, 2, 4),
    "2 ranks x 2 accumulated x 2": (2, 2, 2),
}


def gradients(folder, name, ranks, batch, accumulation, family, *overrides):
    recipe = runs.write_recipe(
        folder,
        family,
        rows=ROWS,
        model__dropout=0.0,
        training__max_grad_norm=None,
        training__learning_rate=1e-12,  # the weights stay where they are: every update is compared from the same point
        evaluation__strategy="no",
        checkpoint__strategy="no",
    )
    out, run_dir = folder / f"{name}.safetensors", folder / name
    done = runs.launch(
        runs.ROOT / "tests" / "record_gradients.py",
        recipe,
        out,
        f"training.per_device_train_batch_size={batch}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"experiment.output_dir={run_dir}",
        *overrides,
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out), runs.rows_of(run_dir)


FULL = pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="another family's launches; set FULL_TESTS=1")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", pytest.param("llama", marks=FULL)])
def test_same_gradients_and_learning_rates_however_split(family, tmp_path):
    results = {label: gradients(tmp_path, f"run{i}", *split, family) for i, (label, split) in enumerate(SPLITS.items())}
    reference, reference_rows = results.pop("1 x 8")
    assert len(reference_rows) == 3, "22 rows in windows of 8 are two full windows and a short one"
    first = max(int(name.split(".")[0]) for name in reference)
    assert first == 2
    assert_same(results, reference, reference_rows)


def assert_same(results, reference, reference_rows):
    for label, (found, rows) in results.items():
        assert found.keys() == reference.keys()
        for name, gradient in reference.items():
            assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-6), (label, name)
        for ours, theirs in zip(rows, reference_rows, strict=True):
            assert ours["learning_rate"] == theirs["learning_rate"], label
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), label
            assert ours["sample_ids_sha256"] == theirs["sample_ids_sha256"], label


@pytest.mark.slow
def test_same_gradient_however_cut_by_tokens(tmp_path):
    """All rows in one update, so that it has the same ones as `length`: only the cuts differ."""
    cuts = {"1 x 200": (1, 24, 1, 200), "1 x 1": (1, 24, 1, 1), "2 ranks x 300": (2, 6, 2, 300)}
    reference, reference_rows = gradients(tmp_path, "length", 1, 24, 1, "bart")
    results = {}
    for number, (label, (*split, budget)) in enumerate(cuts.items()):
        overrides = ["data.batching=tokens", f"data.tokens_per_batch={budget}"]
        results[label] = gradients(tmp_path, f"run{number}", *split, "bart", *overrides)
    assert len(reference_rows) == 1
    padding = [rows[0]["padding_share"] for _, rows in results.values()]
    assert padding[1] == 0.0 < padding[0] < reference_rows[0]["padding_share"], "the cuts differ"
    # The order of the window's rows is another one: the same ids all the same
    for _, rows in results.values():
        rows[0]["sample_ids_sha256"] = reference_rows[0]["sample_ids_sha256"]
    assert_same(results, reference, reference_rows)
