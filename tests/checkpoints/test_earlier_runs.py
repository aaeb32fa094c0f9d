"""A run folder written by commit 8500516, before the rooms moved into packages, still predicts and resumes.

`run_of_8500516.tar.gz` holds what that commit wrote for a tiny Bart: 8 updates, `checkpoint-3`, `final_model`.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import runs

from engine import Predictor, load_recipe
from engine.train import run

ARCHIVE = Path(__file__).with_name("run_of_8500516.tar.gz")


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    """The folder that holds the recipe, its data, the starting model and `run/`; the recipe's paths begin there."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_final_model_writes_the_same_summaries(earlier):
    best = json.loads((earlier / "run" / "best.json").read_text(encoding="utf-8"))["step"]
    written = pd.read_csv(earlier / "run" / "predictions" / f"dev-step{best}.csv", keep_default_na=False)
    summaries = Predictor.from_run(earlier / "run").predict_batch(list(written["dialogue"]), show_progress=False)
    assert summaries == list(written["prediction"])


def test_its_checkpoint_resumes_to_the_same_losses(earlier):
    before = runs.rows_of(earlier / "run")
    shutil.rmtree(earlier / "run" / "final_model")
    (earlier / "run" / "run_status.json").unlink()
    results = run(load_recipe(earlier / "recipe.yaml"), resume=str(earlier / "run" / "checkpoint-3"))
    after = runs.rows_of(earlier / "run")
    assert results["last_step"] == 8 and [row["step"] for row in after] == list(range(1, 9))
    for old, new in zip(before, after, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):  # to the bit on that commit's processor, nearly so on others
            assert new[key] == pytest.approx(old[key], rel=1e-5), (old["step"], key)
