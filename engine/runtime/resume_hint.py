"""What a run that was stopped leaves behind, and the exact command that goes on with it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.runtime.console import columns, from_here, is_terminal, wrap, wrap_command
from engine.runtime.run_status import RunStatus

_SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
COMMAND = "kodialogue train"  # what tools/kodialogue.py calls itself then


def going_on(status: RunStatus, *, saved: bool) -> list[str]:
    """Lines for stderr: what is saved, and the command that goes on from there.

    None before there is a run folder, and where no command line started the run.
    """
    if status.folder is None or Path(sys.argv[0]).name not in (_SCRIPT.name, COMMAND):
        return []
    folder = from_here(status.folder)
    if status.last_checkpoint is None:
        said = f"no checkpoint yet in {folder}; to start again there:"
    else:
        said = f"{'saved' if saved else 'the last checkpoint is'} {folder}/{status.last_checkpoint}; to go on:"
    command = resume_command(sys.argv[1:], folder, os.environ)
    if not is_terminal(sys.stderr):
        return [said, shlex.join(command)]
    width = columns(sys.stderr)
    return [*wrap(said, width), *wrap_command(command, width)]


def resume_command(arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> list[str]:
    """The command line of this process with `--resume auto` and the run folder in place of what it said of both."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name == "experiment.output_dir":
            skip = False
        elif len(name) > 2 and "--resume".startswith(name):  # argparse also takes the beginning of an option's name
            skip = not equals
        else:
            kept.append(argument)
    program = COMMAND.split() if sys.argv[0] == COMMAND else [*_launcher(environment), from_here(_SCRIPT)]
    return [*program, *kept, "--resume", "auto", f"experiment.output_dir={folder}"]


def _launcher(environment: Mapping[str, str]) -> list[str]:
    """What started this process, as far as its environment says. One process needs no launcher."""
    ranks = environment.get("WORLD_SIZE", "1")
    here = environment.get("LOCAL_WORLD_SIZE", ranks)
    if ranks == "1":
        return ["python"]
    if ranks != here:  # the addresses of several machines are the user's
        return ["accelerate", "launch", "--num_processes", ranks, "--num_machines", str(int(ranks) // int(here))]
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return ["torchrun", "--nproc_per_node", ranks]
    quiet = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", ranks, *quiet]
