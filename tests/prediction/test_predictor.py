"""The Python API: it agrees with the run, takes settings by name, and refuses what it cannot read before decoding."""

from __future__ import annotations

import csv

import pandas as pd
import pytest

from engine import Predictor
from engine.errors import EngineError
from engine.prediction.files import examples_of


def test_predictor_agrees_with_the_run(trained):
    folder, results = trained
    predictor = Predictor.from_run(folder / "run")
    with (folder / "run" / "predictions" / f"test-step{results['best_step']}.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    dialogues = [row["dialogue"] for row in rows]
    assert predictor.predict_batch(dialogues, show_progress=False) == [row["prediction"] for row in rows]
    assert predictor.predict_single(dialogues[0]) == rows[0]["prediction"]
    frame = pd.DataFrame({"fname": ["b", "a"], "dialogue": dialogues[:2]}, index=[7, 3])
    predicted = predictor.predict_dataframe(frame, show_progress=False)
    assert list(predicted.index) == [7, 3] and list(predicted["summary"]) == [row["prediction"] for row in rows[:2]]
    assert "summary" not in frame.columns


def test_predictor_takes_settings_by_name(trained):
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    short = predictor.summarize(["#Person1#: 안녕하세요?"], max_new_tokens=2)
    assert short[0].tokens <= 2
    with pytest.raises(EngineError, match="max_new_tokens"):
        predictor.predict_single("안녕", max_new_token=3)
    with pytest.raises(EngineError, match=r"^error E2.2: argument num_beam is not a key.*mean num_beams\?$"):
        predictor.predict_single("안녕", num_beam=4)
    with pytest.raises(EngineError, match=r"^error E2.2: argument num_beams must be a whole number"):
        predictor.predict_single("안녕", num_beams="many")
    with pytest.raises(EngineError) as caught:
        predictor.predict_batch(["안녕", ""])
    assert caught.value.exit_code == 3


def test_predictor_refuses_what_it_cannot_read(trained):
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    assert predictor.predict_batch(text for text in ["안녕?"]) == [predictor.predict_single("안녕?")]
    for dialogues, batch_size in (["\ud800"], 4), ([None], 4), ("안녕", 4), (["안녕"], 0):
        with pytest.raises(EngineError) as caught:
            predictor.predict_batch(dialogues, batch_size=batch_size)
        assert caught.value.exit_code == (3 if batch_size else 2)


@pytest.mark.parametrize("missing", [float("nan"), None, pd.NA, pd.NaT, " ", "nan"])
def test_a_missing_topic_of_a_frame_is_none_as_in_a_file(trained, missing):
    predictor = Predictor.from_run(trained[0] / "run")
    predictor.data = predictor.data.model_copy(update={"topic_column": "topic"})
    texts = ["#Person1#: 안녕?", "#Person1#: 뭐 해?"]
    frame = pd.DataFrame({"dialogue": texts, "topic": pd.Series([missing, "인사"], dtype=object)})
    given = predictor.summarize(texts, topics=[None, "인사"])
    predicted = predictor.predict_dataframe(frame, show_progress=False)
    assert list(predicted["summary"]) == [summary.text for summary in given]
    assert [row.topic for row in examples_of(texts, [missing, " 인사\n"])] == [None, "인사"]


@pytest.mark.parametrize("topic", [3, "\ud800"])
def test_a_topic_that_is_no_text_is_refused(trained, topic):
    with pytest.raises(EngineError, match="E3.31: topic 2 is no text"):
        Predictor.from_run(trained[0] / "run").summarize(["안녕?", "뭐 해?"], topics=["인사", topic])


def test_a_submission_is_checked_before_and_never_lost_after_decoding(trained, tmp_path, monkeypatch):
    from engine.prediction import summarizer as prediction_summarizer

    folder, _ = trained
    predictor, target = Predictor.from_run(folder / "run"), tmp_path / "out.csv"
    frame = pd.DataFrame({"fname": ["a", "b"], "dialogue": ["#Person1#: 안녕?\n#Person2#: 네.", "뭐 해?"]})
    sample = tmp_path / "sample.csv"
    sample.write_text("fname,summary\na,x\nc,y\n", encoding="utf-8")

    def decode(self, model, rows, mask):
        return [prediction_summarizer.Summary(row.index, ["" if row.index else "요약"], [0.0], 1, True) for row in rows]

    monkeypatch.setattr(prediction_summarizer.Summarizer, "_decode", decode)
    assert list(predictor.create_submission(frame, target, show_progress=False)["summary"]) == ["요약", "뭐 해?"]
    predictor.data = predictor.data.model_copy(update={"id_column": "번호", "text_column": "대화"})
    korean = frame.rename(columns={"fname": "번호", "dialogue": "대화"})
    assert list(predictor.create_submission(korean, target, show_progress=False)["번호"]) == ["a", "b"]
    monkeypatch.setattr(prediction_summarizer.Summarizer, "_decode", lambda *_: pytest.fail("decoded too early"))
    for wrong, given in ((frame.drop(columns="fname"), None), (frame, sample), (frame.assign(fname="a"), None)):
        with pytest.raises(EngineError) as caught:
            predictor.create_submission(wrong, target, sample_submission=given)
        assert caught.value.exit_code == 3
