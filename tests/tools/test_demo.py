"""The demo in a real browser: a dialogue goes in, the summaries of two models come out, and nothing is asked of the network."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import demo
import pytest
from driven import Page
from generation_toys import one_thread  # noqa: F401

from engine.errors import EngineError
from engine.recipe.schema import Generation

DIALOGUE = "#Person1#: 커피 한 잔 주세요.\n#Person2#: 따뜻한 것으로 드릴까요?"
BUTTON = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() == '요약하기')"


class Echo:
    """A predictor that says what it was asked."""

    def __init__(self, word: str) -> None:
        self.word, self.generation = word, Generation(num_beams=2, max_new_tokens=24)

    def predict_single(self, dialogue: str, **settings) -> str:
        if settings["num_beams"] == 9:
            raise EngineError("E2.36", "nine beams are too many")
        return f"{self.word} {dialogue.splitlines()[0]} {settings}"


def test_each_chosen_run_answers_with_the_settings_of_the_page():
    two = {"가": Echo("하나"), "나": Echo("둘")}
    found = demo.summaries(two, f"  {DIALOGUE}\n", ["나"], 4.0, 32.0, 1.5)
    assert found[0] == "" and found[1].startswith("둘 #Person1#: 커피 한 잔 주세요.")
    assert "{'num_beams': 4, 'max_new_tokens': 32, 'length_penalty': 1.5}" in found[1]
    assert demo.summaries(two, "", ["가"], 4, 32, 1) == ["대화를 붙여 넣으세요.", ""]
    assert "너무 깁니다" in demo.summaries(two, "가" * 20_001, ["가"], 4, 32, 1)[0]
    (told, other) = demo.summaries(two, DIALOGUE, ["가", "나"], 9, 32, 1)
    assert told == other and told.startswith("요약하지 못했습니다: error E2.36")


def test_runs_get_names_that_tell_them_apart(trained, tmp_path):
    run = trained[0] / "run"
    shutil.copytree(run / "final_model", tmp_path / "run")
    assert list(demo.load([run, run / "final_model"])) == ["run", "final_model"]
    assert list(demo.load([run, tmp_path / "run"])) == [str(run.resolve()), str((tmp_path / "run").resolve())]
    with pytest.raises(EngineError, match="E2.77"):
        demo.load([run, run])


def test_gradio_is_asked_for_where_it_is_missing(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(EngineError, match=r"E2.78.*\[demo\]"):
        demo.main([str(trained[0] / "run")])


@pytest.fixture
def served(monkeypatch):
    """Addresses of demos that end with the test."""
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    yield lambda predictors: demo.serve(predictors, None, wait=False)
    gradio.close_all(verbose=False)


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({"num_beams": 1, "max_new_tokens": 6}, [(1, 1, 10), (1, 6, 256), (0, 1.0, 3)]),
        ({"num_beams": 16, "max_new_tokens": 400, "length_penalty": 4.5}, [(1, 16, 16), (1, 400, 400), (0, 4.5, 4.5)]),
        ({"max_new_tokens": None, "length_penalty": -1.0}, [(1, 4, 10), (1, 64, 256), (-1.0, -1.0, 3)]),
    ],
)
def test_the_page_begins_with_the_first_runs_settings(settings, bounds):
    """Gradio refuses a value beyond a slider's bounds when the button is clicked, and not before."""
    gradio = pytest.importorskip("gradio")
    echo = Echo("하나")
    echo.generation = Generation(**settings)
    echo.bundle = SimpleNamespace(lengths={"max_target_length": 64})
    blocks = demo.page({"가": echo}).blocks.values()
    assert [(b.minimum, b.value, b.maximum) for b in blocks if isinstance(b, gradio.Slider)] == bounds


def test_a_port_that_is_taken_is_said_in_one_line(served):
    address = served({"가": Echo("하나")})
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(EngineError, match=f"E2.136.*{port}"):
        demo.serve({"가": Echo("하나")}, port, wait=False)


@pytest.mark.slow
def test_paste_click_and_two_summaries(served, trained, tmp_path):
    """With a real model and one that echoes; SCREENSHOT=FILE keeps a picture."""
    from engine import Predictor

    predictors = {"run": Predictor.from_run(trained[0] / "run", device="cpu"), "나": Echo("둘")}
    address = served(predictors)
    assert address.startswith("http://127.0.0.1:")
    with Page(tmp_path) as page:
        page.open(address)
        page.wait_for(BUTTON)
        page.paste("document.querySelector('textarea')", DIALOGUE)
        page.evaluate(f"{BUTTON}.click()")
        values = "[...document.querySelectorAll('textarea')].map(t => t.value)"
        page.wait_for(f"{values}.at(-1) != ''")
        dialogue, first, second = page.evaluate(values)
        assert dialogue == DIALOGUE and second.startswith("둘 #Person1#: 커피 한 잔 주세요. {'num_beams': 2")
        assert first == predictors["run"].predict_single(DIALOGUE)
        text = page.evaluate("document.body.innerText")
        assert all(word in text for word in ("대화 요약", "모델", "빔 수", "최대 길이(토큰)", "길이 벌점"))
        if place := os.environ.get("SCREENSHOT"):
            page.screenshot(Path(place))
        outside = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
        assert page.requests and outside == []
        assert page.console == []
