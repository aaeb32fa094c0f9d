"""A run folder that somebody else prepared: whatever its links point to keeps its bytes, whichever name they stand under.

A run is stopped in the middle; then each name that its end would write is replaced by a link to a file, a folder or nothing,
and the run is resumed. It may be refused or go on. The default run tries some of the cases, drawn by LINKS_SEED; FULL_TESTS=1
tries all.
"""

from __future__ import annotations

import os
import random
import shutil

import pytest
import runs

from engine.errors import EngineError

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("LINKS_SEED", "1"))
KINDS = ("file", "folder", "nothing")
CRITICAL = ("metrics.damaged.jsonl", "recipe.yaml", "train.log", "predictions", "tensorboard")
OVERRIDES = ("checkpoint.strategy=steps", "checkpoint.steps=2", "evaluation.strategy=steps", "evaluation.steps=3")


def names_in(run):
    """Every path below a run folder, but for the insides of checkpoints, whose manifests have tests of their own."""
    found = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    return {name for name in found if not name.startswith(("checkpoint-", "final_model/"))}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that has ended, set back to its checkpoint of update 2; and the names that its end writes."""
    folder = tmp_path_factory.mktemp("links")
    test_rows = folder / "test.jsonl"
    recipe = runs.write_recipe(folder, rows=16, data__test_file=str(test_rows), tracking__report_to=["tensorboard"])
    shutil.copy(folder / "dev.jsonl", test_rows)
    runs.train(recipe, *OVERRIDES)
    run = folder / "run"
    names = names_in(run)
    for name in ("final_model", "results.json", "run_status.json", "checkpoint-3", "checkpoint-4"):
        shutil.rmtree(run / name, ignore_errors=True) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
    pid = os.getpid()  # names of partial files can be guessed
    names |= {
        "metrics.damaged.jsonl",
        ".tmp-final_model",
        "checkpoint-3",
        "checkpoint-4",
        "run_status.json",
        "results.json",
    }
    names |= {
        f".{name}.{pid}.partial"
        for name in ("metrics.jsonl", "recipe.yaml", "best.json", "last.json", "run_status.json")
    }
    return recipe, run, sorted(names)


def cases(names):
    every = [(name, kind) for name in names for kind in KINDS]
    if os.environ.get("FULL_TESTS"):
        return every
    always = [(name, kind) for name in CRITICAL for kind in ("file", "folder")]
    return always + random.Random(SEED).sample([case for case in every if case not in always], 8)


@pytest.mark.slow
def test_victims_keep_their_bytes(stopped, tmp_path):
    recipe, run, names = stopped
    refused = 0
    for number, (name, kind) in enumerate(cases(names)):
        place = tmp_path / str(number)
        shutil.copytree(run, place / "run")
        (place / "victims").mkdir()
        (place / "victims" / "file").write_text("victim")
        target = place / "run" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(place / "victims" / {"file": "file", "folder": "", "nothing": "nowhere"}[kind])
        with (place / "run" / "metrics.jsonl").open("ab") as metrics:  # makes the resume set the damaged file aside
            metrics.write(b"chosen bytes\n") if name != "metrics.jsonl" else None
        try:
            runs.train(recipe, *OVERRIDES, f"experiment.output_dir={place / 'run'}", resume="auto")
        except EngineError as error:
            assert error.exit_code in (2, 5, 6) and len(str(error).splitlines()) == 1, (SEED, name, kind, str(error))
            refused += 1
        left = {path.name: path.read_text() for path in (place / "victims").iterdir()}
        assert left == {"file": "victim"}, f"LINKS_SEED={SEED}: {name} as a link to {kind} was written through"
        shutil.rmtree(place)
    assert refused > 5
