"""Pseudo-labels: the measures by hand, what is left out, a call that is killed, and what confidence is worth."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from pathlib import Path

import confidence
import pseudo_label
import pytest
import runs
from confidence import Confidence, limit_of, spearman, worth

from engine.errors import EngineError
from engine.prediction import partial
from engine.prediction.summarizer import Summarizer, Summary
from engine.runtime.atomic import read_json


def summary(texts: list[str], scores: list[float], tokens: int = 4, ended: bool = True) -> Summary:
    return Summary(0, texts, scores, tokens, ended)


def test_measures_by_hand():
    """Whitespace ROUGE of 가 나 with 가: rouge1 and rougeL 2/3, rouge2 0."""
    own = Confidence.of(summary(["가 나", "가", "가 나"], [-0.5, -0.7, -0.9]), 1.0, "whitespace")
    assert own.score == pytest.approx(math.exp(-0.5)) and own.margin == pytest.approx(0.2)
    assert own.agreement == pytest.approx((2 / 3 + 0 + 2 / 3) / 3 / 2 + 1 / 2)
    assert own.confidence == pytest.approx(math.sqrt(own.score * own.agreement))
    squared = Confidence.of(summary(["가", "나"], [-0.5, -0.7], tokens=4), 2.0, "whitespace")
    assert squared.score == pytest.approx(math.exp(-0.5 * 16 / 4)), "-0.5 is the sum over 4 ** 2, the mean is over 4"
    assert Confidence.of(summary(["가", "나"], [-0.5, -0.7], ended=False), 1.0, "whitespace") is None
    assert Confidence.of(summary([" ", "나"], [-0.5, -0.7]), 1.0, "whitespace") is None


def test_rank_correlation_and_the_surest_rows():
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [3, 2, 2, 1]) == pytest.approx(-1)
    assert limit_of([0.1, 0.9, 0.5, 0.7], 0.5) == 0.7 and limit_of([0.1, 0.9], 0.01) == 0.9
    sure = [Confidence(n / 10, 0.1, n / 10) for n in range(1, 9)]
    rows = worth(sure, [10.0 * n for n in range(1, 9)])
    assert rows[1] == ["confidence", "+1.00", *(f"{mean} (from {least})" for mean, least in
                       (("75.00", "0.700"), ("65.00", "0.500"), ("55.00", "0.300"), ("45.00", "0.100")))]  # fmt: skip
    assert rows[4][1] == "-"  # a margin that never differs says nothing


def rows_of(path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A run, and rows that it has not seen beside two that it has. A stand-in decodes them: row n is the less sure, the
    greater n, and row 3 reaches the length limit. What real models write is the slow test's matter."""

    def decode(self, base, rows, mask) -> list[Summary]:
        assert self.settings.num_return_sequences == 3
        return [
            Summary(n, [f"{n}번 회의를 연다.", f"{n}번 회의"], [-0.1 * (n + 1), -2.0], tokens=4, ended=n != 3)
            for n in (row.index for row in rows)
        ]

    monkeypatch.setattr(Summarizer, "_decode", decode)
    folder, _ = trained
    known = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    new = [
        {"fname": f"new_{n}", "dialogue": f"#Person1#: {n}번 회의는 언제예요?\n#Person2#: 내일이요."} for n in range(12)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in [*new, new[0] | {"fname": "again"}]]
    (tmp_path / "rows.jsonl").write_text("\n".join([*known, *lines]), encoding="utf-8")
    return [str(folder / "run"), "--input", str(tmp_path / "rows.jsonl"), "generation.num_beams=3"], tmp_path


def test_rows_are_labelled_filtered_and_told(place, capsys):
    arguments, folder = place
    everything, half, sure = (folder / name for name in ("all.csv", "half.csv", "sure.jsonl"))
    assert pseudo_label.main([*arguments, "--output", str(everything)]) == 0
    printed = capsys.readouterr().out
    assert "12 rows to label; left out, by dialogue: 2 of train_file, 1 of an earlier row" in printed
    assert "11 of 12 rows kept; 1 unusable" in printed and not list(folder.glob("*partial*"))
    rows = rows_of(everything)
    numbers = [n for n in range(12) if n != 3]
    assert [row["fname"] for row in rows] == [f"new_{n}" for n in numbers]
    step = str(read_json(Path(arguments[0]) / "results.json")["best_step"])
    for n, row in zip(numbers, rows, strict=True):
        assert row["summary"] == f"{n}번 회의를 연다." and (row["model"], row["step"]) == (arguments[0], step)
        score, agreement = float(row["score"]), float(row["agreement"])
        assert score == pytest.approx(math.exp(-0.1 * (n + 1)), abs=1e-6) and 0 < agreement < 1
        assert float(row["confidence"]) == pytest.approx(math.sqrt(score * agreement), abs=1e-5)

    assert pseudo_label.main([*arguments, "--output", str(half), "--keep-share", "0.5"]) == 0
    assert rows_of(half) == rows[:6], "half of 11, rounded"
    assert "5 below score 0." in capsys.readouterr().out, (
        "what is kept is kept by the score, unless --by says otherwise"
    )
    assert pseudo_label.main([*arguments, "--output", str(sure), "--by", "margin", "--min-confidence", "1.85"]) == 0
    kept = [json.loads(line) for line in sure.read_text(encoding="utf-8").splitlines()]
    assert [(row["fname"], row["margin"]) for row in kept] == [("new_0", 1.9)]


def test_what_cannot_be(place, trained):
    arguments, folder = place

    def refused(code: str, *more: str, beams: int = 3) -> str:
        with pytest.raises(EngineError) as error:
            pseudo_label.main([*arguments[:-1], f"generation.num_beams={beams}", *more])
        assert error.value.code == code, str(error.value)
        return str(error.value)

    output = str(folder / "new.csv")
    assert "num_beams=4" in refused("E2.93", "--output", output, beams=1)
    refused("E2.63", "--output", str(folder / "rows.jsonl"))
    assert "the surest has 0." in refused("E3.78", "--output", output, "--min-confidence", "1.01")
    kept = [path.name for path in folder.iterdir()]
    assert "new.csv" not in kept and any("partial" in name for name in kept)
    refused("E3.77", "--output", output, "--exclude", str(folder / "rows.jsonl"))
    assert "data.train_file" in refused("E3.1", "--output", output, f"data.train_file={folder / 'gone.jsonl'}")


def test_a_killed_call_goes_on(place, monkeypatch, capsys):
    """Rows that were decoded before are not decoded again, and the file is that of a call that was left alone."""
    arguments, folder = place
    more = ["evaluation.per_device_eval_batch_size=4"]
    assert pseudo_label.main([*arguments, *more, "--output", str(folder / "whole.csv")]) == 0
    kept = partial.SideFile.append
    batches: list[int] = []

    def append(self, summaries):
        kept(self, summaries)
        batches.append(len(summaries))
        if len(batches) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(partial.SideFile, "append", append)
    output = folder / "new.csv"
    with pytest.raises(KeyboardInterrupt):
        pseudo_label.main([*arguments, *more, "--output", str(output)])
    assert not output.exists()
    assert pseudo_label.main([*arguments, *more, "--output", str(output)]) == 0
    assert batches == [4, 4, 4, 12] and output.read_bytes() == (folder / "whole.csv").read_bytes()  # 12: the window


@pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="minutes of training; set FULL_TESTS=1")
def test_confidence_goes_with_rouge(tmp_path, root, capsys, monkeypatch):
    """Two epochs of the quickstart: on its dev rows, what the model is surer of scores higher."""
    monkeypatch.chdir(root)
    run = tmp_path / "run"
    settings = ["training.num_train_epochs=2", f"experiment.output_dir={run}", f"experiment.output_root={tmp_path}"]
    runs.train(root / "recipes" / "quickstart.yaml", *settings, "data.test_file=null", "tracking.report_to=[]")
    dev = root / "recipes" / "quickstart" / "dev.csv"
    assert pseudo_label.main([str(run), "--input", str(dev), "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line for line in lines if line.startswith(confidence.MEASURES)}
    values = [float(number) for number in re.findall(r"[+-]?\d+\.\d\d(?= )", found["score"] + " ")]
    assert values[0] > 0.1 and values[1] > values[-1]
