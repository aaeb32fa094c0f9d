"""The trackers show the rows of metrics.jsonl."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import runs

from engine.recipe.schema import Recipe
from engine.reporting.tracking import Tracker, read_rows, strict_json, write_predictions
from engine.runtime.exits import main_guard


def test_tensorboard_holds_the_rows(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder / "run" / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(tags["scalars"])
    assert {"eval/loss", "eval/rouge1", "eval/rouge_sum", "train/peak_memory_gib"} <= set(tags["scalars"])
    assert "eval/samples/text_summary" in tags["tensors"]
    rows = {row["step"]: row["loss"] for row in runs.rows_of(folder / "run")}
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx(rows, rel=1e-6)


def test_a_disk_that_fills_under_tensorboard_ends_the_run_in_one_line_of_code_6(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recipe = runs.write_recipe(tmp_path, tracking__report_to=["tensorboard"], evaluation__strategy="no")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # main_guard sets its own: put back afterwards
    monkeypatch.setattr(RecordWriter, "write", full)
    assert main_guard(lambda: runs.train(recipe)["exit_code"]) == 6
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.count("error E6.5") == 1 and told.count("stopped: OSError") == 1, told


@pytest.mark.slow
def test_wandb_offline_gets_the_same_rows_and_no_secret_of_the_command_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    secrets = ["hf_" + letter * 20 for letter in "ABC"]  # of the command, the recipe and the environment
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_TOKEN", secrets[2])
    monkeypatch.setattr(sys, "argv", ["train.py", f"model.config={{token: {secrets[0]}}}"])
    runs.train(runs.write_recipe(tmp_path, tracking__report_to=["wandb"], model__config={"token": secrets[1]}))
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"train/loss" in written.read_bytes() and not [text for text in secrets if text.encode() in everything]


def test_numbers_that_json_lacks_become_null_and_are_listed():
    assert json.loads(strict_json({"step": 1, "loss": math.nan, "seconds": math.inf, "rouge1": 2.0})) == {
        "step": 1, "loss": None, "seconds": None, "rouge1": 2.0, "non_finite": ["loss", "seconds"]
    }  # fmt: skip


def test_rows_are_read_up_to_what_a_crash_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    path.write_text('{"split": "train", "step": 1}\nno JSON\n{"step": 2}\n{"split": "dev", "step": 3}\n{"split": "tr')
    assert read_rows(path) == [{"split": "train", "step": 1}, {"split": "dev", "step": 3}]


def test_rows_go_to_the_file_and_their_scalars_to_the_trackers(tmp_path):
    shown = []
    accelerator = SimpleNamespace(
        is_main_process=True,
        init_trackers=lambda *names, **settings: None,
        log=lambda scalars, step: shown.append((step, scalars)),
    )
    tracker = Tracker(tmp_path, accelerator, Recipe(tracking={"report_to": []}))
    written = [
        {"split": "train", "step": 1, "loss": 2.0, "sample_ids_sha256": "0"},
        {"split": "dev", "step": 1, "loss": math.nan, "rouge1": 5.0, "rouge_tokenizer": "char"},
    ]
    for row in written:
        tracker.log_row(row)
    assert shown == [(1, {"train/loss": 2.0}), (1, {"eval/rouge1": 5.0})]
    assert read_rows(tmp_path / "metrics.jsonl") == [written[0], written[1] | {"loss": None, "non_finite": ["loss"]}]


def test_predictions_keep_newlines_and_quotes(tmp_path):
    rows = [{"id": "a", "dialogue": '#Person1#: "네"\n#Person2#: 응', "reference": "가\n나", "prediction": ""}]
    write_predictions(tmp_path / "predictions" / "dev-step1.csv", rows)
    with (tmp_path / "predictions" / "dev-step1.csv").open(encoding="utf-8", newline="") as handle:
        assert list(csv.DictReader(handle)) == rows
