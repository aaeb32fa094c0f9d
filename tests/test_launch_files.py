"""The launch files start what they say, on CPU ranks in place of GPUs, on two local launchers in place of machines."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest
import runs

from engine.runtime.run_status import RunStatus

LAUNCH = runs.ROOT / "recipes" / "launch"
pytestmark = pytest.mark.slow


def environment(python_bin, **more):
    paths = {"PATH": f"{python_bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(runs.ROOT)}
    return os.environ | paths | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def python_bin(tmp_path):
    """A folder with the commands that launch files call, of this interpreter's environment."""
    import sys

    folder = tmp_path / "bin"
    folder.mkdir()
    modules = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}
    for name, start in {"python": '"$@"', **{name: f'-m {module} "$@"' for name, module in modules.items()}}.items():
        (folder / name).write_text(f"#!/bin/sh\nexec {sys.executable} {start}\n")
        (folder / name).chmod(0o755)
    return folder


def started(folder, name, *arguments, **environ):
    command = ["bash", str(LAUNCH / name), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-4000:]
    return out


def results(folder):
    return json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "ranks"), [("one_gpu.sh", 1), ("several_gpus.sh", 2), ("sharded.sh", 2)])
def test_one_machine(tmp_path, python_bin, name, ranks):
    recipe = runs.write_recipe(tmp_path, rows=8)
    out = ended(started(tmp_path, name, recipe, **environment(python_bin, GPUS="2")))
    assert results(tmp_path)["world_size"] == ranks
    assert ("layers are sharded over 2 ranks" in out) is (name == "sharded.sh")


def test_two_machines(tmp_path, python_bin):
    recipe = runs.write_recipe(tmp_path, rows=8)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environ = environment(python_bin, GPUS="1", NODES="2", HEAD="localhost", PORT=port)
    nodes = [started(tmp_path, "two_nodes.sh", recipe, **environ) for _ in range(2)]
    for node in nodes:
        ended(node)
    assert results(tmp_path)["world_size"] == 2


def test_slurm_asks_for_what_it_uses(tmp_path, python_bin):
    """With stand-ins for Slurm's own commands: one task a node, a folder of the job's own, queued again when stopped."""
    calls = tmp_path / "calls"
    run = tmp_path / "experiments" / "slurm-4711"
    run.mkdir(parents=True)
    scripts = {
        "scontrol": f'#!/bin/sh\necho "scontrol $*" >> {calls}\n[ "$1" = show ] && echo localhost\nexit 0\n',
        "srun": f'#!/bin/sh\necho "srun $*; $HEAD $NODES $GPUS $PORT" >> {calls}\nexit $CODE\n',
    }
    for name, text in scripts.items():
        (python_bin / name).write_text(text)
        (python_bin / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_ID": "4711", "SLURM_GPUS_ON_NODE": "4"}
    for ended_with, launcher, expected in ((0, "0", 0), (75, "1", 0), (7, "1", 1)):
        status = RunStatus(rank=0)
        status.open(run)
        status.write(ended_with, "as a run leaves it")
        process = started(
            tmp_path, "slurm.sbatch", "recipes/kobart.yaml", **environment(python_bin, CODE=launcher, **slurm)
        )
        process.communicate(timeout=60)
        assert process.returncode == expected
    told = calls.read_text()
    assert "two_nodes.sh recipes/kobart.yaml experiment.output_dir=experiments/slurm-4711 --resume auto" in told
    assert "; localhost 2 4 24711" in told
    assert told.count("scontrol requeue 4711") == 1
