"""Where a run writes: new folders and its own, never through a link, never over what others left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import runs
from runtime_toys import recipe_for

from engine.errors import EngineError
from engine.recipe.schema import Recipe
from engine.runtime import process, run_folder
from engine.runtime.run_folder import choose_run_folder

pytestmark = pytest.mark.slow


def test_dated_folders_do_not_collide(tmp_path):
    recipe = recipe_for(tmp_path, name="kobart")
    first, second = choose_run_folder(recipe, None), choose_run_folder(recipe, None)
    assert first.path != second.path and not first.reused
    day, name = first.path.parts[-2:]
    assert name.startswith(day + "_") and name.endswith("_kobart") and len(name) == len("20250101_120000_kobart")


def test_a_folder_with_a_run_needs_resume(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    folder = choose_run_folder(recipe, None)
    assert folder.path.is_dir() and not folder.reused
    (folder.path / "train.log").write_text("a run that failed before its first update\n")
    (folder.path / "run_status.json").write_text('{"code": 3}')
    assert choose_run_folder(recipe, None).reused
    for trace in ("metrics.jsonl", "results.json"):
        (folder.path / trace).write_text("{}\n")
        with pytest.raises(EngineError, match=r"error E2\.31"):
            choose_run_folder(recipe, None)
        assert choose_run_folder(recipe, "auto").reused
        (folder.path / trace).unlink()
    (folder.path / "checkpoint-5").symlink_to("/")
    with pytest.raises(EngineError, match=r"error E2\.31"):
        choose_run_folder(recipe, None)


def test_auto_finds_the_newest_run_of_that_name(tmp_path):
    recipe = recipe_for(tmp_path, name="a")
    fresh = choose_run_folder(recipe, "auto")
    assert not fresh.reused
    root = tmp_path / "experiments"
    for name in ("20250101/20250101_120000_a", "20250102/20250102_120000_a", "20250102/20250102_120000_a-2",
                 "20250103/20250103_120000_ab", "20250104/20250104_120000_a"):  # fmt: skip
        (root / name).mkdir(parents=True)
        if not name.startswith("20250104"):  # that one never got as far as a status
            (root / name / "run_status.json").write_text('{"code": null}')
    fresh.path.rmdir()
    assert choose_run_folder(recipe, "auto").path == root / "20250102" / "20250102_120000_a-2"


def test_a_finished_run_is_complete(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with process.start(recipe) as started:
        started.open_run(recipe)
        (tmp_path / "run" / "results.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with process.start(recipe) as started:
        assert started.open_run(recipe, "auto").finished
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}


def test_resume_paths(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "run_status.json").write_text('{"code": null}')
    recipe = recipe_for(tmp_path)
    assert choose_run_folder(recipe, str(run / "checkpoint-5")).path == run
    assert choose_run_folder(recipe, str(run)).path == run
    (run / ".tmp-checkpoint-6-0a").mkdir()
    (run / "checkpoint-7").symlink_to(tmp_path)
    for bad in ("nothing", "run/checkpoint-6", "run/.tmp-checkpoint-6-0a", "run/checkpoint-7"):
        with pytest.raises(EngineError) as caught:
            choose_run_folder(recipe, str(tmp_path / bad))
        assert caught.value.exit_code == 5, bad
    with pytest.raises(EngineError, match=r"error E2\.32"):
        choose_run_folder(recipe_for(tmp_path, output_dir=str(tmp_path / "other")), str(run / "checkpoint-5"))


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for bad, code in ((tmp_path / "file", 2), (tmp_path / "file" / "below", 2), (Path("/proc/nowhere"), 6)):
        with pytest.raises(EngineError) as caught:
            choose_run_folder(recipe_for(tmp_path, output_dir=str(bad)), None)
        assert caught.value.exit_code == code, bad
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: 1000)
    with pytest.raises(EngineError, match="not enough space for this run"):
        choose_run_folder(recipe_for(tmp_path, output_dir=str(tmp_path / "run")), None)


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path, resume):
    recipe = runs.write_recipe(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.yaml", "train.log", "best.json", "thesis.txt"):
        (folder / name).write_text(f"my {name}")
    before = tree(folder)
    with pytest.raises(EngineError, match=r"E2\.22.*best\.json, recipe\.yaml, thesis\.txt, train\.log") as caught:
        runs.train(recipe, resume=resume)
    assert caught.value.exit_code == 2 and tree(folder) == before


@pytest.mark.parametrize(
    "where", ["", ".", "/", "temporary", "foreign", "hf-trainer/checkpoint-5", "run/final_model", "run/nothing"]
)
def test_a_path_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch, where):
    """It used to train afresh there, over whatever lay there."""
    recipe = runs.write_recipe(tmp_path)
    runs.train(recipe)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "recipe.yaml").write_text("mine")
    (tmp_path / "hf-trainer" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "hf-trainer" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "temporary")
    path = where if where in ("", ".", "/") else str(tmp_path / where)
    before = tree(tmp_path)
    with pytest.raises(EngineError) as caught:
        runs.train(recipe, resume=path)
    assert caught.value.exit_code == 5 and "nothing was started" in str(caught.value)
    assert tree(tmp_path) == before


def test_a_refused_resume_leaves_the_recipe_as_it_was(tmp_path):
    recipe = runs.write_recipe(
        tmp_path, training__num_train_epochs=2, checkpoint__strategy="steps", checkpoint__steps=2
    )
    runs.train(recipe)
    run = tmp_path / "run"
    for name in ("run_status.json", "results.json"):
        (run / name).unlink()
    before = tree(run)
    with pytest.raises(EngineError, match=r"E5\.5.*nothing was changed"):
        runs.train(recipe, "training.learning_rate=1e-4", resume="auto")
    after = tree(run)
    changed = {str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"train.log", "run_status.json"}  # what happened is told there


def test_a_refused_resume_keeps_what_the_status_knew(tmp_path):
    from engine.runtime.run_status import RunStatus, read_status

    first = RunStatus()
    first.open(tmp_path)
    first.step, first.last_checkpoint = 7, "checkpoint-7"
    first.write(75, "stopped")
    second = RunStatus()
    second.open(tmp_path)
    second.write(5, "refused")
    assert read_status(tmp_path) == {
        "code": 5, "reason": "refused", "step": 7, "last_checkpoint": "checkpoint-7", "resumable": True
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
@pytest.mark.parametrize(
    "name",
    ["recipe.yaml", "train.log", "metrics.jsonl", "metrics.damaged.jsonl", "best.json", "tensorboard", "predictions",
     "final_model", "run_status.json", "results.json", "predictions/x.csv", "tensorboard/events",
     ".metrics.jsonl.1.partial", ".tmp-final_model"],
)  # fmt: skip
def test_links_and_pipes_where_a_run_writes(tmp_path, name, kind):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "manifest.json").write_text("{}")
    (tmp_path / "victim").write_text("victim")
    if kind == "fifo":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(tmp_path / ("victim" if kind == "link" else "nowhere"))
    recipe = Recipe(model={"name_or_path": "m"}, experiment={"output_dir": str(run)})
    with pytest.raises(EngineError, match=r"E6\.8"):
        choose_run_folder(recipe, "auto")
    assert (tmp_path / "victim").read_text() == "victim" and not (tmp_path / "nowhere").exists()


def test_the_folder_itself_may_be_a_link(tmp_path):
    """Its user named it: large disks are often reached so."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    runs.train(runs.write_recipe(tmp_path))
    assert (tmp_path / "disk" / "results.json").is_file()
