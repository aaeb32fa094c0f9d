"""The process around a run: starting, mixed precision, random state, and how a stop reads that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runtime_toys import recipe_for

from engine.errors import EngineError
from engine.runtime import exits, process
from engine.runtime import signals as runtime_signals
from engine.runtime.signals import Stopped


def test_help_needs_no_torch():
    """Importing the rooms that every command line imports stays light."""
    code = "import sys, engine.runtime, engine.checkpoints; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_the_machine_cannot_serve(tmp_path, monkeypatch, caplog):
    recipe = recipe_for(tmp_path)
    recipe.training.precision = "fp16"
    with pytest.raises(EngineError, match=r"error E2\.44"):
        process.start(recipe)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(EngineError, match=r"error E2\.40"):
        process.start(recipe_for(tmp_path))


@pytest.mark.parametrize("asked", [None, "0"])
def test_large_tensors_on_a_cpu_stand_on_large_pages(tmp_path, asked):
    """Freed pages of 2 MiB go back whole; who has set torch's variable keeps its value."""
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text(encoding="utf-8"):
        pytest.skip("this machine has no large pages")
    if asked == "0" and "[always]" in enabled.read_text(encoding="utf-8"):
        pytest.skip("this machine gives large pages to all")
    script = (
        "import engine.train, transformers, torch; from pathlib import Path; from engine.recipe.schema import Recipe\n"
        "from engine.runtime import process\n"
        "with process.start(Recipe(runtime={'device': 'cpu'})):\n"
        "    kept = torch.ones(64 << 20)\n"
        "    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()\n"
        "    print(next(int(line.split()[1]) for line in lines if line.startswith('AnonHugePages')))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    environment |= {} if asked is None else {"THP_MEM_ALLOC_ENABLE": asked}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout.split()[-1]) > 100 << 10) == (asked is None)


def test_batches_reach_a_gpu_from_pinned_memory():
    import torch

    class Host:
        """A tensor, as far as moving it goes."""

        shape, pinned = (2, 3), False

        def pin_memory(self):
            pinned = Host()
            pinned.pinned = True
            return pinned

        def to(self, device, *, non_blocking):
            return self.pinned, device.type, non_blocking

    runtime = process.Runtime.__new__(process.Runtime)
    for device, pinned in (("cuda", True), ("cpu", False)):
        runtime.device = torch.device(device)
        assert runtime.to_device({"labels": Host()}) == {"labels": (pinned, device, True)}
    assert runtime.shapes == {"labels": (2, 3)}


def test_the_environment_cannot_change_accumulation_or_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with process.start(recipe_for(tmp_path)) as started:
        assert started.accelerator.gradient_accumulation_steps == 1
        assert started.accelerator.mixed_precision == "no" and started.precision == "fp32"
        assert not started.scaler().is_enabled()


def test_emulated_fp16_is_real_on_the_cpu(tmp_path):
    """Accelerate alone would report fp16 and compute in fp32."""
    import torch

    recipe = recipe_for(tmp_path)
    recipe.training.precision, recipe.runtime.emulate_fp16_on_cpu = "fp16", True
    with process.start(recipe) as started:
        with started.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
        scaler = started.scaler()
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler.scale((weight * 1e38).sum()).backward()  # 65,536 times this is infinite
        scaler.step(optimizer)
        scaler.update()
        assert weight.item() == 1.0 and scaler.get_scale() == 2.0**15, "the overflow was skipped, the scale fell"


def test_threads_and_determinism_are_as_before_afterwards(tmp_path):
    """Two runs in one process: the second, which names neither, must compute as it would alone."""
    import torch

    before, recipe = torch.get_num_threads(), recipe_for(tmp_path)
    recipe.runtime.num_threads, recipe.runtime.deterministic = before + 1, True
    with pytest.raises(ZeroDivisionError), process.start(recipe):
        assert torch.get_num_threads() == before + 1 and torch.are_deterministic_algorithms_enabled()
        raise ZeroDivisionError
    assert torch.get_num_threads() == before and not torch.are_deterministic_algorithms_enabled()


def test_random_state_round_trip(tmp_path):
    import random

    import numpy
    import torch

    def draw():
        return random.random(), numpy.random.rand(), torch.rand(3).tolist()

    with process.start(recipe_for(tmp_path)) as started:
        state = started.random_state()
        first = draw()
        started.restore_random_state(state)
        assert draw() == first
        started.seed_ranks(42)
        assert draw() != first


def test_a_failed_save_while_stopping_is_76(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with pytest.raises(EngineError) as caught, process.start(recipe) as started:
        started.open_run(recipe)
        started.signals.enter_loop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert started.requests() == runtime_signals.STOP
        raise EngineError("E6.1", "disk full")
    assert exits.outcome_of(caught.value).code == 76
    assert "disk full" in json.loads((tmp_path / "run" / "run_status.json").read_text())["reason"]


def test_a_stop_that_is_killed_before_it_is_done_reads_as_unsaved(tmp_path):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with pytest.raises(Stopped), process.start(recipe) as started:
        started.open_run(recipe)
        started.signals.enter_loop()
        assert started.requests() == runtime_signals.NOTHING
        os.kill(os.getpid(), signal.SIGTERM)
        started.requests()
        assert json.loads((tmp_path / "run" / "run_status.json").read_text())["code"] == 76
        started.stop(saved=True)
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["code"] == 75
