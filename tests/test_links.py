"""Folders that somebody else prepared: whatever their links point to keeps its bytes, whichever name they stand under.

A run is stopped in the middle; then each name that its end would write is replaced by a link to a file, a folder or nothing,
and the run is resumed. It may be refused or go on. The same with every tool that writes, and with predict: what they write
is not listed here but watched. The default run tries some of the cases, drawn by LINKS_SEED; FULL_TESTS=1 tries all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import runs
import tiny

from engine import predict
from engine.errors import EngineError
from engine.runtime.exits import Outcome

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("LINKS_SEED", "1"))
KINDS = ("file", "folder", "nothing")
CRITICAL = ("metrics.damaged.jsonl", "recipe.yaml", "train.log", "predictions", "tensorboard", "profile")
OVERRIDES = (
    "checkpoint.strategy=steps",
    "checkpoint.steps=2",
    "evaluation.strategy=steps",
    "evaluation.steps=3",
    "runtime.profile=true",
)


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


def put_link(path, place, kind):
    """A link to a victim in the path's stead."""
    (place / "victims").mkdir(parents=True)
    (place / "victims" / "file").write_text("victim")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(place / "victims" / {"file": "file", "folder": "", "nothing": "nowhere"}[kind])


def bytes_of_victims(place):
    return {path.relative_to(place / "victims").as_posix(): path.read_text() for path in (place / "victims").iterdir()}


@pytest.mark.slow
def test_victims_keep_their_bytes(stopped, tmp_path):
    recipe, run, names = stopped
    refused = 0
    for number, (name, kind) in enumerate(cases(names)):
        place = tmp_path / str(number)
        shutil.copytree(run, place / "run")
        put_link(place / "run" / name, place, kind)
        if name != "metrics.jsonl":
            with (place / "run" / "metrics.jsonl").open("ab") as metrics:
                metrics.write(b"chosen bytes\n")  # makes the resume set the damaged file aside
        try:
            runs.train(recipe, *OVERRIDES, f"experiment.output_dir={place / 'run'}", resume="auto")
        except EngineError as error:
            assert error.exit_code in (2, 5, 6) and len(str(error).splitlines()) == 1, (SEED, name, kind, str(error))
            refused += 1
        left = bytes_of_victims(place)
        assert left == {"file": "victim"}, f"LINKS_SEED={SEED}: {name} as a link to {kind} was written through"
        shutil.rmtree(place)
    assert refused > 5


# Tools


def tool(name):
    spec = importlib.util.spec_from_file_location(name, runs.ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Written:
    """Paths below a folder that this process creates or opens for writing, also such as are renamed or removed later."""

    def __init__(self):
        self.folder, self.names = None, set()
        sys.addaudithook(self._see)

    def _see(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if self.folder and (writes or event in ("os.mkdir", "os.rename")):
            path = Path(os.fsdecode(arguments[event == "os.rename"])) if not isinstance(arguments[0], int) else None
            if path is not None and path.is_relative_to(self.folder) and path != self.folder:
                self.names.add(path.relative_to(self.folder).as_posix())


@pytest.fixture(scope="module")
def watched():
    return Written()


@pytest.fixture(scope="module")
def inputs(stopped, tmp_path_factory):
    """What the tools read: a run with two checkpoints, an adapter, pickled weights, predictions, recipes to screen."""
    import torch
    from adapted import build

    from engine.models.bundle import save_model

    recipe, _, _ = stopped
    folder = tmp_path_factory.mktemp("inputs")
    runs.train(recipe, *OVERRIDES, f"experiment.output_dir={folder / 'run'}", "checkpoint.save_total_limit=2")
    save_model(build(tiny.save("llama", folder / "base")), folder / "adapter")
    pickled = shutil.copytree(recipe.parent / "model", folder / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(tiny.model("bart", len(tiny.tokenizer("bart"))).state_dict(), pickled / "pytorch_model.bin")
    for name in ("one", "two"):
        (folder / f"{name}.csv").write_text("id,prediction\n1,가 나\n2,다\n", encoding="utf-8")
    (folder / "broken.yaml").write_text("modell: {}\n", encoding="utf-8")
    shutil.copy(recipe, folder / "good.yaml")
    tiny.write_rows(folder / "train.jsonl", 4)
    tiny.write_rows(folder / "rows.jsonl", 1)
    return folder


def screened(folder, out):
    """What the tool's child writes, and what it writes itself about a recipe that fails at once."""
    screen = tool("screen")
    options = argparse.Namespace(child=str(folder / "good.yaml"), output=out, overrides=[])
    return screen.main([f"{folder}/broken.yaml", "--output", str(out)]) and screen.child(options)


def averaged(folder, out):
    shutil.copytree(folder / "run", out / "run", dirs_exist_ok=True, symlinks=True)
    return tool("average_checkpoints").main([f"{out}/run", "--last", "2", "--no-score"])


def tuned(folder, out):
    shutil.copytree(folder / "run", out / "run", dirs_exist_ok=True, symlinks=True)
    return tool("tune_decoding").main([f"{out}/run", "--grid", "num_beams=[1]", "--limit", "1", "--device", "cpu"])


def varied(folder, out):
    return tool("vary_dialogues").main([f"{folder}/train.jsonl", "--output-dir", str(out), "--copies", "1"])


def ensembled(folder, out):
    files = [f"{folder}/{name}.csv" for name in ("one", "two")]
    return tool("ensemble").main(["mbr", *files, "--rouge-tokenizer", "whitespace", "--output", f"{out}/both.csv"])


USES = {  # of the inputs, writing below a folder
    "predict": lambda i, out: predict.main([f"{i}/run", "--input", f"{i}/rows.jsonl", "--output", f"{out}/p.csv"]),
    "merge_adapter": lambda i, out: tool("merge_adapter").main([f"{i}/adapter", f"{out}/merged"]),
    "convert_weights": lambda i, out: tool("convert_weights").main([f"{i}/pickled", f"{out}/converted"]),
    "make_quickstart_data": lambda i, out: tool("make_quickstart_data").main(["--output", str(out)]),
    "average_checkpoints": averaged,
    "tune_decoding": tuned,
    "vary_dialogues": varied,
    "ensemble": ensembled,
    "screen": screened,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_tools_write_through_no_link(inputs, tmp_path, name, watched, capsys):
    whole = tmp_path / "whole"
    whole.mkdir()
    watched.folder, watched.names = whole, set()
    assert not USES[name](inputs, whole)
    watched.folder = None
    found = watched.names | {path.relative_to(whole).as_posix() for path in whole.rglob("*")}
    names = sorted(
        found - {f"run/{path.relative_to(inputs / 'run')}" for path in (inputs / "run").rglob("*")} - {"run"}
    )
    assert names
    every = [(at, kind) for at in names for kind in KINDS]
    few = [every[0], *random.Random(SEED).sample(every, 3)]
    for number, (at, kind) in enumerate(every if os.environ.get("FULL_TESTS") else few):
        place = tmp_path / str(number)
        put_link(place / "out" / at, place, kind)
        try:
            USES[name](inputs, place / "out")
        except Exception as error:
            outcome = Outcome.of(error)
            assert outcome.code in (2, 5, 6) and len(outcome.reason.splitlines()) == 1, (at, kind, outcome.reason)
        left = bytes_of_victims(place)
        assert left == {"file": "victim"}, f"LINKS_SEED={SEED}: {name} wrote through {at}, a link to {kind}: {left}"
    assert "Traceback" not in capsys.readouterr().err
