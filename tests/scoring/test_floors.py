"""The floors of a run: measured once, in every evaluation's row, in the log and in the results; warnings of collapse."""

from __future__ import annotations

import csv
import json

import pytest
import runs

from engine.reporting.report import result_lines
from engine.scoring import floors, rouge
from engine.scoring.baselines import lead_baseline


def test_floors_are_the_scores_of_what_they_name():
    dialogues = ["#Person1#: 산에 가자\n#Person2#: 좋아 산에 가자", "#Person1#: 밥\n#Person2#: 국"]
    references = ["산에 가자", "밥 국"]
    found = floors.measure(["산에 가자", "물에 가자"], dialogues, references, "whitespace")
    by_turns = {
        turns: rouge.rouge([lead_baseline(text, turns) for text in dialogues], references, "whitespace")["rouge_mean"]
        for turns in (1, 2, 3)
    }
    assert found["lead"]["rouge_mean"] == max(by_turns.values()) == by_turns[found["lead"]["turns"]]
    assert found["constant"]["text"] == "산에 가자" and found["constant"]["rouge_mean"] == pytest.approx(50)
    again = floors.measure_again(found, ["#Person1#: 산"], ["물에 가자"], "whitespace")
    assert again["constant"]["rouge1"] == pytest.approx(50) and again["lead"]["turns"] == found["lead"]["turns"]


def test_a_run_stands_beside_its_floors(trained):
    folder, results = trained
    dev = results["baselines"]["dev"]
    keys = {"lead_rouge_mean": dev["lead"]["rouge_mean"], "constant_rouge_mean": dev["constant"]["rouge_mean"]}
    for row in runs.rows_of(folder / "run", "dev"):
        assert {key: row[key] for key in keys} == keys and 0 <= row["alike_share"] <= 1
    assert set(results["baselines"]["test"]) == {"lead", "constant"}
    log = (folder / "run" / "train.log").read_text(encoding="utf-8")
    assert log.count("baselines on the 6 dev rows") == 1 and f"{dev['constant']['rouge_mean']:.2f} by one" in log
    assert (
        json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))["baselines"] == results["baselines"]
    )


def test_prediction_files_hold_the_rouge_of_each_row(trained):
    folder, results = trained
    with (folder / "run" / "predictions" / f"dev-step{results['best_step']}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "dialogue", "reference", "prediction", "rouge1", "rouge2", "rougeL"]
    for key in rouge.METRICS:
        mean = sum(float(row[key]) for row in rows) / len(rows)
        assert mean == pytest.approx(results["metrics"][key])


def test_the_end_says_whether_the_model_is_above_its_floors(trained):
    folder, results = trained
    lines = lambda score: "\n".join(  # noqa: E731
        result_lines(
            results | {"metrics": results["metrics"] | {"rouge_mean": score, "alike_share": 0.9}}, folder / "run"
        )
    )
    assert "is not above both" in lines(0.0) and "is not above" not in lines(99.0)
    assert "90% of its dev predictions are nearly the same" in lines(99.0)
    loss_only = results | {"baselines": {}, "metrics": {"loss": 1.0}}
    assert not any("baselines" in line for line in result_lines(loss_only, folder / "run"))


def test_collapsed_predictions_are_told_and_alike_references_excuse_them():
    rows = [
        {"prediction": "늘 같은 말", "reference": f"{text} 이야기를 합니다"}
        for text in ("산", "밥", "학교", "비행기와 공항")
    ]
    assert floors.alike_warning(rows) == "100% of the 4 predictions are nearly the same text: 늘 같은 말"
    assert floors.alike_warning([row | {"reference": ""} for row in rows]) is not None  # a test split without summaries
    assert floors.alike_warning([row | {"reference": "같은 요약"} for row in rows]) is None
    assert floors.alike_warning([row | {"prediction": row["reference"]} for row in rows]) is None
    assert floors.alike_warning([row | {"prediction": ""} for row in rows]).endswith("predictions are empty")
