"""Which checkpoints stay, which one is best or last, and which one a resume takes."""

from __future__ import annotations

import errno
import json
import random
import shutil

import pytest
from checkpoint_toys import damage, names, open_store, save

from engine.checkpoints import history
from engine.errors import EngineError


@pytest.mark.parametrize("seed", [7, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (8, 9, 10))])
def test_random_histories_keep_the_latest_and_the_best(tmp_path, seed):
    """Over random scores, limits and restarts: the latest k and the best stay, foreign entries are never touched."""
    rng = random.Random(seed)
    for trial in range(6):
        run = tmp_path / str(trial)
        run.mkdir()
        (run / "checkpoint-3-backup").mkdir()
        (run / "checkpoint-abc").mkdir()
        (run / "checkpoint-0007").write_text("a file")
        (run / "step-1").mkdir()
        foreign = {"checkpoint-3-backup", "checkpoint-abc", "checkpoint-0007", "step-1"}
        limit, step, best = rng.randint(1, 4), 0, None
        store, saved = open_store(run, save_total_limit=limit, sync=rng.random() < 0.5), []
        for _ in range(rng.randint(2, 9)):
            step += rng.randint(1, 30)
            value = rng.choice([rng.random(), 0.5])
            if best is None or value > best["value"]:
                best = {"step": step, "metric": "rouge_sum", "value": value}
            save(store, step, best=best, metrics={"rouge_sum": value})
            store.wait()
            saved.append(step)
            expected = {f"checkpoint-{s}" for s in {*saved[-limit:], best["step"]}}
            assert {n for n in names(run) if n.startswith("checkpoint-")} - foreign == expected
            assert json.loads((run / "best.json").read_text())["step"] == best["step"]
            assert json.loads((run / "last.json").read_text())["step"] == step
            if rng.random() < 0.3:
                store = open_store(run, save_total_limit=limit)
                assert store.load_state(store.find_resume("auto")).position["step"] == step
        assert foreign <= names(run)


def test_a_checkpoint_that_cannot_be_removed_only_warns_and_goes_next_time(tmp_path, monkeypatch, caplog):
    store = open_store(tmp_path, save_total_limit=1)
    save(store, 1)
    real = shutil.rmtree

    def refuse(path, *args, **settings):
        if ".trash-" in str(path) and not settings.get("ignore_errors"):
            raise PermissionError(errno.EPERM, "immutable", str(path))
        if ".trash-" not in str(path):
            real(path, *args, **settings)

    monkeypatch.setattr(history.shutil, "rmtree", refuse)
    save(store, 2)
    assert store.wait()
    assert any(name.startswith(".trash-") for name in names(tmp_path))
    monkeypatch.setattr(history.shutil, "rmtree", real)
    save(store, 3)
    assert names(tmp_path) == {"checkpoint-3", "last.json"}


def test_best_is_found_again_by_the_manifests(tmp_path):
    store = open_store(tmp_path)
    for step, value in [(1, 30.0), (2, 50.0), (3, 40.0)]:
        best = {"step": 2 if step > 1 else 1, "metric": "rouge_sum", "value": max(value, 50.0 if step > 1 else 0)}
        save(store, step, best=best, metrics={"rouge_sum": value})
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = open_store(tmp_path)
    state = again.load_state(again.find_resume("auto"))
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["step"], best["value"]) == (3, 40.0) == (state.best["step"], state.best["value"])


def test_best_json_follows_the_checkpoint_and_not_the_other_way_round(tmp_path):
    store = open_store(tmp_path, sync=False)
    store.history.set_best({"step": 5, "metric": "loss", "value": 1.0})
    assert store.history.pointed("best") is None
    save(store, 5, best={"step": 5, "metric": "loss", "value": 1.0})
    store.wait()
    assert store.history.pointed("best") == tmp_path / "checkpoint-5"


def test_what_is_handed_on_is_there(tmp_path):
    """Steps 2 and 4 are only in the trainer's counters: their saves failed under `on_save_error: continue`."""
    store = open_store(tmp_path)
    for step, value in [(1, 30.0), (3, 40.0), (5, 35.0)]:
        save(store, step, metrics={"rouge_sum": value})
    assert [store.step_to_hand_on(step, "rouge_sum") for step in (1, 2)] == [1, 3]
    assert store.step_to_hand_on(4, "loss") == 5, "nothing was scored by it: the last"
    for step in (1, 3, 5):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.raises(EngineError, match=r"error E6\.10"):
        store.step_to_hand_on(5, "rouge_sum")


def test_a_better_score_in_an_abandoned_future_is_forgotten(tmp_path):
    """Back to step 1 although step 2 was better: best.json must not point past the end of history."""
    store = open_store(tmp_path)
    save(store, 1, best={"step": 1, "metric": "loss", "value": 2.0})
    save(store, 2, best={"step": 2, "metric": "loss", "value": 1.0})
    again = open_store(tmp_path)
    again.load_state(again.find_resume(tmp_path / "checkpoint-1"))
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1
    assert [name for name in names(tmp_path) if name.startswith(".later-checkpoint-2")], "nothing valid is deleted"


def test_when_all_are_damaged_nothing_is_resumed(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    damage(tmp_path / "checkpoint-1" / "config.json", "0")
    with pytest.raises(EngineError, match=r"error E5\.7"):
        open_store(tmp_path).find_resume("auto")


def test_nothing_to_resume(tmp_path):
    assert open_store(tmp_path).find_resume("auto") is None
    assert open_store(tmp_path).find_resume(None) is None
    with pytest.raises(EngineError, match=r"error E5\.3"):
        open_store(tmp_path).find_resume(tmp_path / "checkpoint-9")


def test_leftovers_of_killed_saves_are_bounded(tmp_path):
    store = open_store(tmp_path)
    save(store, 1)
    for number in range(20):
        (tmp_path / f".tmp-checkpoint-2-{number:08x}").mkdir()
        (tmp_path / f".trash-checkpoint-1-{number:08x}").mkdir()
    (tmp_path / f".best.json.{99}.partial").write_text("{")
    (tmp_path / f".metrics.jsonl.{99}.partial").write_text("{")
    (tmp_path / ".tmp-something-else").mkdir()
    open_store(tmp_path)
    assert names(tmp_path) == {"checkpoint-1", "last.json", ".tmp-something-else"}


def test_foreign_checkpoints_in_the_way_are_refused_and_untouched(tmp_path):
    store = open_store(tmp_path / "mine")
    save(store, 5)
    other = open_store(tmp_path / "other")
    save(other, 9)
    for kind in ("folder", "link", "file"):
        run = tmp_path / kind
        shutil.copytree(tmp_path / "mine", run)
        target = run / "checkpoint-9"
        if kind == "folder":
            shutil.copytree(tmp_path / "other" / "checkpoint-9", target)
        elif kind == "link":
            target.symlink_to(tmp_path / "other" / "checkpoint-9")
        else:
            target.write_text("a file named like a checkpoint")
        again = open_store(run)
        found = again.find_resume("auto")
        assert found == run / "checkpoint-5"
        with pytest.raises(EngineError, match=r"error E2\.35"):
            again.load_state(found)
        assert target.exists()
    with pytest.raises(EngineError, match="another run"):
        open_store(tmp_path / "folder").find_resume(tmp_path / "folder" / "checkpoint-9")
