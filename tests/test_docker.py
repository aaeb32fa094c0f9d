"""The Dockerfile without Docker: its words, and its RUN and CMD in a copy of what it would copy."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {"FROM", "ARG", "RUN", "USER", "WORKDIR", "COPY", "CMD"}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [tuple(line.split(None, 1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def ignored(name: str) -> bool:
    """Whether .dockerignore leaves a path out: patterns without `**/` mean the top folder alone."""
    for pattern in (ROOT / ".dockerignore").read_text(encoding="utf-8").split():
        parts = Path(name).parts if pattern.startswith("**/") else Path(name).parts[:1]
        if any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts):
            return True
    return False


def test_the_dockerfile_installs_and_starts_what_the_readme_says():
    found = instructions()
    assert {word for word, _ in found} <= KNOWN and found[0] == ("FROM", "python:3.11-slim")
    assert [rest for word, rest in found if word == "USER"], "a run needs no root"
    assert json.loads(found[-1][1]) == ["bash", "tools/quickstart.sh"] and found[-1][0] == "CMD"
    assert "http" not in (ROOT / "Dockerfile").read_text(encoding="utf-8"), "no index is named"


def test_the_image_holds_code_and_no_runs():
    kept = (
        "engine/train.py",
        "recipes/quickstart/train.csv",
        "tools/environment.sh",
        "constraints.txt",
        "tests/tiny.py",
    )
    left = (
        ".git/HEAD",
        ".venv/bin/python",
        "experiments/a/b",
        "models/x",
        "engine/data/__pycache__/rows.pyc",
        "data/t.csv",
    )
    assert not any(map(ignored, kept)) and all(map(ignored, left))
    assert not ignored("engine/data/rows.py"), "data is a folder of the top alone"


@pytest.mark.skipif("FULL_TESTS" not in os.environ, reason="minutes of installing and training; set FULL_TESTS=1")
def test_its_commands_run_in_what_it_copies(tmp_path):
    """The environment is this one's, whose stamp is put beside it: nothing is installed, everything else is as in the image."""
    for folder in ("engine", "tools", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("accelerate", "-m accelerate.commands.accelerate_cli ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def bash(script: str) -> str:
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (script, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    bash("source tools/environment.sh; stamp_of .venv/bin/python >.venv/installed")
    (prepare,) = (rest for word, rest in instructions() if word == "RUN" and "prepare_environment" in rest)
    assert "installing" not in bash(prepare)
    small = "training.max_steps=4 evaluation.steps=4 checkpoint.steps=4 data.max_validation_samples=8 data.max_test_samples=8"
    printed = bash(
        f"{shlex.join(json.loads(instructions()[-1][1]))} {small} generation.num_beams=1 generation.max_new_tokens=8"
    )
    assert "run folder:" in printed and list(tmp_path.glob("experiments/*/*/test_summaries.csv"))
