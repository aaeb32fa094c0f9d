"""The trackers show the rows of metrics.jsonl."""

from __future__ import annotations

import csv
import errno
import html
import json
import math
import os
import re
import shutil
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


def accumulated(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert all(path.is_file() for path in (run / "tensorboard").iterdir()), (
        "one run, not a run for its hyperparameters too"
    )
    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_tensorboard_has_a_page_of_curves_that_belong_together(trained):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    events = accumulated(trained[0] / "run")
    (shown,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(shown.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for group in layout.category for chart in group.chart}
    assert charts["loss: train and dev"] == ["^train/loss$", "^eval/loss$"]
    assert [group.title for group in layout.category] == ["Quality", "Training", "Speed and memory"]
    scalars = events.Tags()["scalars"]
    for title, tags in charts.items():
        assert all([tag for tag in scalars if re.search(pattern, tag)] for pattern in tags), title


def test_the_table_of_hyperparameters_holds_the_best_scores_and_no_secret(tmp_path):
    from tensorboard.plugins.hparams import metadata

    secrets = ["hf_" + letter * 20 for letter in "AB"]
    recipe = runs.write_recipe(
        tmp_path,
        rows=8,
        tracking__report_to=["tensorboard"],
        experiment__notes=f"with {secrets[0]}",
        model__config={"token": secrets[1]},
    )
    runs.train(recipe)
    events = accumulated(tmp_path / "run")
    content = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    started = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert started.hparams["training.learning_rate"].number_value == 1e-3
    assert started.hparams["experiment.notes"].string_value == "with [redacted]"
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    compared = [info.name.tag for info in experiment.metric_infos]
    assert compared[:2] == ["best/loss", "best/rouge1"] and "best/rouge_sum" in compared
    best = runs.rows_of(tmp_path / "run", "dev")[-1]
    shown = {tag: events.Scalars(tag)[-1].value for tag in compared}
    assert shown == pytest.approx({tag: best[tag.removeprefix("best/")] for tag in compared}, rel=1e-6)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    assert not [text for text in secrets if text.encode() in everything]


@pytest.mark.slow
def test_a_resumed_run_is_one_run_without_a_step_twice(tmp_path):
    from tensorboard.backend.event_processing import plugin_event_accumulator

    steps = ["checkpoint.strategy=steps", "checkpoint.steps=2", "evaluation.strategy=steps", "evaluation.steps=1"]
    steps.append("checkpoint.save_total_limit=null")
    recipe = runs.write_recipe(tmp_path, rows=20, tracking__report_to=["tensorboard"])
    runs.train(recipe, *steps)
    run = tmp_path / "run"
    for name in (
        "final_model",
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-5",
    ):  # as if it had been killed after step 3
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("results.json", "run_status.json"):
        (run / name).unlink()
    runs.train(recipe, *steps, resume="auto")
    assert len(list((run / "tensorboard").iterdir())) == 2
    events = accumulated(run)
    for tag in ("train/loss", "eval/loss", "eval/rouge1"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4, 5], tag
    # The reader behind TensorBoard's own pages; the other one purges no texts.
    shown = plugin_event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in shown.Tensors("eval/samples/text_summary")] == [1, 2, 3, 4, 5]


def test_the_sample_table_keeps_its_columns_whatever_the_texts_hold(tmp_path):
    import markdown  # TensorBoard's own renderer

    shown = []
    accelerator = SimpleNamespace(
        is_main_process=True,
        trackers=[],
        init_trackers=lambda *names: None,
        log=lambda values, step: shown.append(values),
    )
    tracker = Tracker(tmp_path, accelerator, Recipe(tracking={"report_to": []}))
    texts = [
        "a | b \\| c \\\\| d",
        "#Person1#: 네\n#Person2#: *아니요* _밑줄_ `x|y`",
        "<think>음</think> & <script>",
        "가" * 5000 + "끝",
    ]
    tracker.log_samples(3, [dict.fromkeys(("id", "dialogue", "reference", "prediction"), text) for text in texts])
    page = markdown.markdown(shown[0]["eval/samples"], extensions=["markdown.extensions.tables"])
    rows = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in page.split("<tr>")[2:]]
    assert [len(row) for row in rows] == [4] * len(texts)
    plain = [html.unescape(row[1].replace("<br>", "\n").replace("<br />", "\n")) for row in rows]
    assert plain[:3] == texts[:3] and len(plain[3]) < 700 and plain[3].endswith("끝") and "<em>" not in page


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
        trackers=[],
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
