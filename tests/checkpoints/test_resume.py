"""A resumed run equals the uninterrupted one bit for bit, and what the loop depends on is really there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import runs

from engine import train
from engine.errors import EngineError
from engine.runtime import atomic, signals
from engine.runtime.exits import main_guard
from engine.runtime.process import Runtime
from engine.runtime.signals import Stopped

pytestmark = pytest.mark.slow

FULL = pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="takes many minutes; set FULL_TESTS=1")
TIMING = {"tokens_per_second", "samples_per_second", "seconds", "peak_memory_gib"}


def rows(run_dir, split="train"):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in runs.rows_of(run_dir, split)]


def matrix(root, *arguments: str, timeout: int) -> str:
    command = [sys.executable, str(root / "tools" / "resume_matrix.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_from_some_updates_on_two_ranks(root):
    """Update 5 is the first of an epoch, 10 lies within one; fp16 with its loss scaler, and a 4-bit base."""
    chosen = ["--every", "5", "--models", "qlora", "--ranks", "2", "--precisions", "fp16"]
    assert "0 findings" in matrix(root, *chosen, timeout=400)


@FULL
@pytest.mark.slow
def test_from_every_update_in_every_setting(root):
    assert "0 findings" in matrix(root, timeout=3600)


@pytest.fixture
def recipe(tmp_path):
    return runs.write_recipe(tmp_path, evaluation__generate=False, evaluation__metric="loss")


def test_training_uses_dropout_and_resumes_it(tmp_path, recipe, monkeypatch):
    """Weights loaded from a folder arrive in eval mode; dropout must be on, and without its random state lost."""
    modes = []
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda model, *rest: modes.append(model.training) or step(model, *rest))
    runs.train(
        recipe, "checkpoint.strategy=steps", "checkpoint.steps=2", "evaluation.strategy=steps", "evaluation.steps=1"
    )
    assert modes and all(modes)


def test_evaluating_every_update_changes_nothing(tmp_path, recipe):
    """Also with generation: evaluation leaves the random stream, the modes and the caches as it found them."""
    never = tmp_path / "never"
    always = tmp_path / "always"
    runs.train(recipe, "evaluation.strategy=no", f"experiment.output_dir={never}", "model.dropout=0.2")
    often = ["evaluation.strategy=steps", "evaluation.steps=1", "evaluation.generate=true", "model.dropout=0.2"]
    runs.train(recipe, *often, f"experiment.output_dir={always}")
    assert rows(always) == rows(never) and len(rows(always, "dev")) == len(rows(never))


def interrupt_at(monkeypatch, step: int, request: int = signals.STOP) -> None:
    """The signal that arrives during the window before this update."""

    def requests(self):
        return request if self.status.step == step else signals.NOTHING

    monkeypatch.setattr(Runtime, "requests", requests)


@pytest.mark.parametrize("sync", [True, False])
def test_a_stop_whose_save_fails_is_not_called_saved(tmp_path, recipe, monkeypatch, sync):
    """Under `on_save_error: continue` the save only warns; the exit code must still be 76."""

    def fail(point, path):
        raise OSError(errno.ENOSPC, "full")

    interrupt_at(monkeypatch, 2)
    monkeypatch.setattr(atomic, "fail_points", [fail])
    with pytest.raises(Stopped) as caught:
        runs.train(recipe, "checkpoint.on_save_error=continue", f"checkpoint.sync={str(sync).lower()}")
    assert not caught.value.saved


def test_stop_in_the_middle_of_an_epoch_and_resume(tmp_path, recipe, monkeypatch):
    """The step after the stop continues the log: no update twice, none missing, the same numbers."""
    whole = tmp_path / "whole"
    choice = ["model.dropout=0.2", "training.gradient_accumulation_steps=2", "training.num_train_epochs=2"]
    runs.train(recipe, *choice, f"experiment.output_dir={whole}")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Stopped) as caught:
            runs.train(recipe, *choice)
    assert caught.value.saved and [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    runs.train(recipe, *choice, resume="auto")
    assert rows(tmp_path / "run") == rows(whole) and rows(tmp_path / "run", "dev") == rows(whole, "dev")


def test_the_best_survives_a_resume_and_a_worse_evaluation(tmp_path, recipe, monkeypatch):
    """Best value, patience and history come from the checkpoint."""
    import json

    from engine.evaluation import evaluate as evaluating

    scores = {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 3.5, 6: 3.2}
    evaluate = evaluating.evaluate

    def scripted(bundle, split, runtime, *settings):
        found = evaluate(bundle, split, runtime, *settings)
        found.metrics["loss"] = scores[runtime.status.step + 1]
        return found

    monkeypatch.setattr(evaluating, "evaluate", scripted)
    choice = ["evaluation.strategy=steps", "evaluation.steps=1", "checkpoint.save_total_limit=1"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Stopped):
            runs.train(recipe, *choice)
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 2
    results = runs.train(recipe, *choice, resume="auto")
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["step"], best["value"]) == (2, 3.0) and results["best_step"] == 2
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-6"]


def test_a_finished_run_is_left_as_it_is(tmp_path, recipe):
    runs.train(recipe)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    results = runs.train(recipe, resume="auto")
    assert results["final_model_path"] and before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")
    }


CHANGES = {
    "training.learning_rate=2e-3": "training.learning_rate",
    "training.seed=7": "training.seed",
    "data.max_source_length=64": "data.max_source_length",
    "training.num_train_epochs=3": "training.num_train_epochs",
    "data.max_train_samples=12": "data",
}


def test_a_changed_recipe_is_not_resumed(tmp_path, recipe, monkeypatch):
    interrupt_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        runs.train(recipe)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for change, key in CHANGES.items():
        with pytest.raises(EngineError) as caught:
            runs.train(recipe, change, resume="auto")
        assert caught.value.exit_code == 5 and f"{key}: " in str(caught.value), change
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_what_changes_no_number_may_change(tmp_path, recipe, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Stopped):
            runs.train(recipe)
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "train.jsonl").rename(moved)
    free = [f"data.train_file={moved}", "training.logging_steps=2", "experiment.notes=again", "checkpoint.sync=true"]
    runs.train(recipe, *free, resume="auto")
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "resumed at step 2" in log


@pytest.mark.slow
def test_more_ranks_by_permission(tmp_path, recipe, monkeypatch):
    """One rank, then two: every row is seen once, the learning rates are the same."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Stopped):
            runs.train(recipe)
    script = runs.ROOT / "engine" / "train.py"
    changed = ["training.per_device_train_batch_size=2", "--resume", "auto"]
    refused = runs.launch(script, recipe, *changed, ranks=2)
    assert "world_size: 1 -> 2" in refused.stderr and "--allow-change world_size" in refused.stderr
    allowed = ["--allow-change", "world_size", "--allow-change", "training.per_device_train_batch_size"]
    done = runs.launch(script, recipe, *changed, *allowed, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = tmp_path / "whole"
    runs.train(recipe, f"experiment.output_dir={whole}")
    for key in ("sample_ids_sha256", "learning_rate"):
        assert [row[key] for row in rows(tmp_path / "run")] == [row[key] for row in rows(whole)]


def test_a_state_that_does_not_fit_is_the_checkpoints_fault(tmp_path, recipe, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Stopped):
            runs.train(recipe)

    def misfit(self, state):
        raise ValueError("loaded state dict contains a parameter group that doesn't match")

    import torch

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", misfit)
    with pytest.raises(EngineError, match=r"error E5\.8"):
        runs.train(recipe, resume="auto")


@pytest.mark.parametrize(("rate", "evaluation", "says"), [
    (1e30, "steps", "E7.4: the dev loss is nan"),
    (1e30, "no", "E7.1: loss nan"),
    (float("nan"), "no", "E7.3: the weights hold nan"),
])  # fmt: skip
def test_a_ruinous_update_ends_the_run_and_spares_what_was_saved(tmp_path, recipe, monkeypatch, rate, evaluation, says):
    """Its own loss and gradient are finite: the dev loss, the weights to be saved or the next window show the ruin."""
    run_dir, plain, calls = tmp_path / "broken", train.train_step, iter(range(100))

    def ruin_third(model, window, optimizer, *rest):
        if next(calls) == 2:
            optimizer.param_groups[0]["lr"] = rate
        return plain(model, window, optimizer, *rest)

    monkeypatch.setattr(train, "train_step", ruin_third)
    often = ["checkpoint.strategy=steps", "checkpoint.steps=1", f"evaluation.strategy={evaluation}"]
    often += ["evaluation.steps=1"] if evaluation == "steps" else []
    with pytest.raises(EngineError, match=says) as caught:
        runs.train(recipe, *often, f"experiment.output_dir={run_dir}", "training.max_grad_norm=null")
    assert caught.value.exit_code == 7
    names = {path.name for path in run_dir.iterdir()}
    assert "checkpoint-2" in names and not any(name.startswith((".tmp", ".trash", "final")) for name in names)
    assert ("checkpoint-3" in names) == (says.startswith("E7.1"))


@pytest.fixture
def stopped(tmp_path, recipe, monkeypatch):
    """A recipe whose run was stopped after two updates of six."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Stopped):
            runs.train(recipe)
    return recipe


@pytest.mark.parametrize("name", ["best.json", "last.json", "metrics.jsonl", "recipe.yaml", "train.log", ".lock"])
@pytest.mark.parametrize("what", ["folder", "dangling link"])
def test_what_cannot_be_written_over_is_told_in_one_line(tmp_path, stopped, capsys, name, what):
    """Nobody expects a folder there; it is the storage's fault all the same, and not a bug with a traceback."""
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    path.mkdir() if what == "folder" else path.symlink_to(tmp_path / "nowhere" / "x")
    code = main_guard(lambda: train.main([str(stopped), "--resume", "auto"]))
    told = capsys.readouterr().err
    assert "Traceback" not in told and code in ((6,) if what == "folder" else (0, 6))
    assert code == 0 or (f"/{name}" in told.splitlines()[-1] and "checkpoints are untouched" in told)


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\n", b"[1]\n", b"null\n", b"{}\n", b'{"step": "x", "split": "train"}\n', b"\0\0\n"]
)
def test_damaged_rows_are_set_aside_and_the_run_goes_on(tmp_path, stopped, capsys, line):
    path = tmp_path / "run" / "metrics.jsonl"
    damaged = line + path.read_bytes()
    path.write_bytes(damaged)
    runs.train(stopped, resume="auto")
    assert (tmp_path / "run" / "metrics.damaged.jsonl").read_bytes() == damaged
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert "1 lines of" in capsys.readouterr().err


def test_lost_rows_are_told(tmp_path, stopped, capsys):
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    runs.train(stopped, resume="auto")
    assert "has lost its rows from step 2 on" in " ".join(capsys.readouterr().err.split())
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 3, 4, 5, 6]


def test_a_new_logging_interval_loses_nothing(tmp_path, stopped, capsys):
    runs.train(stopped, "training.logging_steps=2", resume="auto")
    assert "has lost" not in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 4, 6]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", None])
def test_lost_results_of_a_finished_run_can_be_written_again(tmp_path, recipe, content):
    first = runs.train(recipe)
    path = tmp_path / "run" / "results.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(EngineError, match=r"error E6\.7: the run is complete.*remove .*run_status\.json"):
        runs.train(recipe, resume="auto")
    (tmp_path / "run" / "run_status.json").unlink()
    assert runs.train(recipe, resume="auto")["metrics"] == first["metrics"]


ON_A_GPU = {
    "fp32": ("bart", []),
    "bf16": ("t5", ["training.precision=bf16"]),
    "fp16": ("bart", ["training.precision=fp16"]),
    "paged": ("llama", ["training.precision=bf16", "training.optim=paged_adamw_8bit"]),
    "qlora": (
        "llama",
        ["training.precision=bf16", "training.optim=paged_adamw_32bit", "quantization.load_in_4bit=true"],
    ),
}


@pytest.fixture
def afterwards_any_kernel():
    yield
    import torch

    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ON_A_GPU)
def test_a_run_on_a_gpu_is_resumed_to_the_bit(tmp_path, gpu, setting, monkeypatch, afterwards_any_kernel):
    """Stopped in the middle of an accumulated epoch, with dropout: the same numbers and weights as the run without a stop."""
    family, choice = ON_A_GPU[setting]
    if setting in ("paged", "qlora"):
        pytest.importorskip("bitsandbytes")
    if gpu.type != "cuda":  # what a CPU has in place of a GPU's
        choice = [word.replace("paged_adamw_32bit", "adamw").replace("paged_", "") for word in choice]
    if setting == "qlora":
        adapted_base(tmp_path / "model")
    fixed = {"evaluation__generate": False, "evaluation__metric": "loss", "model__dropout": 0.2}
    fixed |= {"runtime__device": gpu.type, "runtime__deterministic": True, "training__gradient_accumulation_steps": 2}
    fixed |= {"runtime__emulate_fp16_on_cpu": gpu.type == "cpu"}
    recipe = runs.write_recipe(tmp_path, family, **fixed)
    runs.train(recipe, *choice, f"experiment.output_dir={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Stopped):
            runs.train(recipe, *choice)
    runs.train(recipe, *choice, resume="auto")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole") and len(rows(tmp_path / "run")) == 3
    ours, whole = ((tmp_path / run / "final_model") for run in ("run", "whole"))
    weights = sorted(path.name for path in whole.glob("*.safetensors"))
    assert weights and all((ours / name).read_bytes() == (whole / name).read_bytes() for name in weights)


def adapted_base(folder):
    """A Llama wide enough for whole blocks of 4-bit weights."""
    import adapted
    import tiny

    tiny.save("llama", folder, **adapted.WIDE)
