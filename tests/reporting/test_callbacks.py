"""Hooks hear of everything in order; one that fails costs a line, and the run is saved."""

from __future__ import annotations

import pytest
import runs

from engine import load_recipe
from engine.errors import EngineError
from engine.train import run


def recipe_of(tmp_path, **changes):
    return runs.write_recipe(tmp_path, rows=12, evaluation__strategy="steps", evaluation__steps=1, **changes)


class Notes:
    """Every hook; one of them may fail."""

    def __init__(self, failing=None):
        self.failing, self.calls = failing, []

    def _note(self, hook, value):
        self.calls.append((hook, value))
        if hook == self.failing:
            raise RuntimeError("the chat server is down")

    def on_log(self, row):
        self._note("on_log", row)
        row.clear()  # a copy: nobody else misses it

    def on_evaluation(self, row):
        self._note("on_evaluation", row)

    def on_save(self, path):
        assert (path / "manifest.json").is_file()
        self._note("on_save", path.name)

    def on_end(self, results):
        self._note("on_end", results)


def test_hooks_are_called_in_order_with_what_was_written(tmp_path):
    notes = Notes()
    results = run(
        load_recipe(recipe_of(tmp_path, checkpoint__strategy="steps", checkpoint__steps=1)), callbacks=[notes]
    )
    called = [hook for hook, _ in notes.calls]
    assert called.count("on_log") == called.count("on_evaluation") == called.count("on_save") == 3
    assert called[-1] == "on_end" and notes.calls[-1][1] == results
    assert [value for hook, value in notes.calls if hook == "on_save"] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    rows = [value for hook, value in notes.calls if hook == "on_evaluation"]
    assert [row["rouge1"] for row in rows] == [row["rouge1"] for row in runs.rows_of(tmp_path / "run", "dev")]


@pytest.mark.parametrize(
    "hook", ["on_log", *(pytest.param(hook, marks=pytest.mark.slow) for hook in ("on_evaluation", "on_save", "on_end"))]
)
def test_a_hook_that_fails_ends_the_run_saved_in_one_line(tmp_path, hook):
    notes = Notes(hook)
    recipe = recipe_of(tmp_path, checkpoint__sync=True)
    with pytest.raises(
        EngineError, match=f"E2.85.*callback Notes.{hook} failed at test_callbacks.py:.*server is down"
    ) as told:
        run(load_recipe(recipe), callbacks=[notes])
    assert len(str(told.value).splitlines()) == 1 and "--resume auto" in str(told.value)
    assert notes.calls[-1][0] == hook  # and nothing after it
    saved = "the results are written" if hook == "on_end" else "checkpoint-"
    assert saved in told.value.safe and list((tmp_path / "run").glob("checkpoint-*/manifest.json"))
    again = Notes()
    results = run(load_recipe(recipe), resume="auto", callbacks=[again])
    assert results["last_step"] == 3 and again.calls[-1][0] == "on_end"


def test_callbacks_that_are_none_are_refused(tmp_path):
    for wrong, reason in ((object(), "has no method of ours"), (type("Mine", (), {"on_step": 1})(), "has on_step")):
        with pytest.raises(EngineError, match=f"E2.84.*{reason}"):
            run(load_recipe(recipe_of(tmp_path)), callbacks=[wrong])
