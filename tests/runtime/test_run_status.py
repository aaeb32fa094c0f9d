"""`run_status.json` says how a run stands, or how it ended."""

from __future__ import annotations

import json

import pytest
from runtime_toys import recipe_for

from engine.errors import EngineError
from engine.runtime import process
from engine.runtime.run_status import RunStatus
from engine.runtime.signals import Stopped


def test_the_status_file_tells_how_it_ended(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))

    def status():
        return json.loads((tmp_path / "run" / "run_status.json").read_text())

    with pytest.raises(EngineError), process.start(recipe) as started:
        started.open_run(recipe)
        assert status()["code"] is None, "a run that is killed now must not look finished"
        started.status.step, started.status.last_checkpoint = 7, "checkpoint-5"
        raise EngineError("E7.1", "loss nan", safe="")
    assert status() == {"code": 7, "reason": "error E7.1: loss nan", "step": 7, "last_checkpoint": "checkpoint-5",
                        "resumable": True}  # fmt: skip
    with pytest.raises(Stopped), process.start(recipe) as started:
        started.open_run(recipe, "auto")
        started.stop(saved=True)
    assert status()["code"] == 75
    with process.start(recipe) as started:
        started.open_run(recipe, "auto")
    assert status()["code"] == 0 and status()["resumable"] is False
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_rank_that_fails_leaves_its_own_status(tmp_path):
    status = RunStatus(rank=1)
    status.open(tmp_path)
    status.write(0, "done")
    assert list(tmp_path.iterdir()) == [], "rank 0 speaks for all when all is well"
    status.write(9, "lost")
    assert json.loads((tmp_path / "run_status.rank1.json").read_text())["code"] == 9
    RunStatus(rank=0).open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run_status.json"], "a new attempt forgets old failures"
