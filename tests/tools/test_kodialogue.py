"""One command: the same mains under one name, a help that is quick and whole, completion, and an installed wheel."""

from __future__ import annotations

import argparse
import configparser
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import kodialogue
import pytest

from engine.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "kodialogue.py"
HEAVY = {"torch", "transformers", "accelerate", "pandas", "pydantic", "numpy", "yaml", "jinja2"}
COMMANDS = sorted(kodialogue.scripts())


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """A command changes the process it runs in: its arguments and the modules' own help."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_commands_are_there():
    assert {"train", "predict", "compare", "sweep", "tune", "inspect", "ensemble", "merge"} <= set(COMMANDS)


def test_help_is_free(capsys):
    code = f"import sys, kodialogue; kodialogue.main(['--help']); assert not set(sys.modules) & {HEAVY!r}"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.split("commands:\n")[1].splitlines() if line[:3].strip()]
    assert set(listed) >= {*COMMANDS, "completion"}
    assert kodialogue.main(["--version"]) == 0 and "0." in capsys.readouterr().out


def actions_of(parser):
    """Its own actions and those of its sub-commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions_of(inner)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_is_a_page(command):
    """What it does, an example under this name, and a word on every option."""
    parser = kodialogue.parser_of(command)
    assert parser.prog == f"kodialogue {command}"
    page = parser.format_help()
    assert f"kodialogue {command} " in page.replace(parser.format_usage(), "") and len(page.splitlines()) > 12
    unsaid = [action.dest for action in actions_of(parser) if not action.help and action.dest != "kind"]
    assert not unsaid, f"{command}: no help for {unsaid}"


def test_a_command_is_the_script_of_that_name(monkeypatch):
    for command, module in (("compare", "compare"), ("train", "engine.train")):
        monkeypatch.setattr(import_module(module), "main", lambda given: given)
        assert kodialogue.main([command, "one", "--two"]) == ["one", "--two"]
        assert sys.argv == [f"kodialogue {command}", "one", "--two"]


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("pred", "predict"), ("xyz", "the commands are")])
def test_an_unknown_command_is_answered(typed, meant):
    with pytest.raises(EngineError, match=meant) as error:
        kodialogue.main([typed])
    assert error.value.exit_code == 2


def test_a_stopped_run_goes_on_by_the_same_name(monkeypatch):
    from engine.runtime import resume_hint

    monkeypatch.setattr(sys, "argv", ["kodialogue train", "kobart"])
    words = resume_hint.resume_command(["kobart"], "run", {})
    assert words == ["kodialogue", "train", "kobart", "--resume", "auto", "experiment.output_dir=run"]


def completed(words: str) -> list[str]:
    """What bash offers at the end of `words`."""
    script = kodialogue.completion(["bash"])
    ask = f"{script}\nCOMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n_kodialogue\n"
    done = subprocess.run(
        ["bash", "-c", ask + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_recipes_and_keys():
    assert completed("kodialogue tr") == ["train"]
    assert completed("kodialogue train --res") == ["--resume"]
    assert completed("kodialogue train kob") == ["kobart"]
    assert completed("kodialogue train training.learn") == ["training.learning_rate="]
    assert completed("kodialogue ensemble mb") == ["mbr"]
    assert completed("kodialogue compare kob") == [], "compare takes runs: bash goes on with files"
    assert completed("kodialogue train data.train_file = tr") == [], "a value: files"
    for shell in ("zsh", "fish"):
        assert "kobart" in kodialogue.completion([shell])
    with pytest.raises(EngineError, match="one of bash, zsh, fish"):
        kodialogue.completion(["tcsh"])


@pytest.mark.parametrize(("shell", "check"), [("zsh", "-n"), ("fish", "--no-execute")])
def test_other_shells_read_their_script(shell, check, tmp_path):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on this machine")
    (tmp_path / "script").write_text(kodialogue.completion([shell]), encoding="utf-8")
    assert subprocess.run([program, check, tmp_path / "script"], timeout=30).returncode == 0


def test_the_package_holds_every_room_recipe_and_template():
    """setup.cfg lists what a wheel takes along: the short form of the test below."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    packages = set(setup["options"]["packages"].split())
    rooms = {"engine"} | {f"engine.{path.parent.name}" for path in (ROOT / "engine").glob("*/__init__.py")}
    assert packages == rooms | {"engine.recipes", "kodialogue_tools"}
    for package, folder in (("engine.recipes", "recipes"), ("kodialogue_tools", "tools")):
        patterns = setup["options.package_data"][package].split()
        taken = {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}
        wanted = {path for suffix in ("*.yaml", "*.j2", "*.csv") for path in (ROOT / folder).rglob(suffix)}
        assert wanted and wanted <= taken, wanted - taken


@pytest.mark.slow
def test_a_launcher_takes_the_module(tmp_path):
    launcher = (
        "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    words = [sys.executable, *launcher.split(), "-m", "engine.train", "quickstart", "--print-recipe"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "  name: quickstart " in done.stdout, done.stderr[-1000:]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel of this checkout installed in it, and no checkout in sight."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("engine", "tools", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run(wheel, check=True, timeout=200, stdout=subprocess.DEVNULL)
    (found,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, found], check=True, timeout=200)
    shutil.rmtree(source)
    return target


@pytest.mark.slow
def test_the_wheel_works_in_another_folder(installed, tmp_path):
    import runs

    environment = os.environ | {"PYTHONPATH": str(installed)}

    def command(*arguments: str) -> str:
        words = [sys.executable, installed / "bin" / "kodialogue", *arguments]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (arguments, done.stdout[-1000:], done.stderr[-1000:])
        return done.stdout

    assert f"{installed}/engine/recipes/quickstart.yaml:" in command("train", "quickstart", "--print-recipe")
    assert "updates" in command("train", "quickstart", "--dry-run")
    recipe = runs.write_recipe(tmp_path)
    command("train", str(recipe), "--debug", f"experiment.output_dir={tmp_path / 'run'}")
    command("predict", "run", "--input", "dev.jsonl", "--output", "summaries.csv")
    command("sweep", str(recipe), "--set", "training.learning_rate=1e-3,2e-3", "--output", "swept")
    pages = ["swept/trial-000", "swept/trial-001", "--html", "page.html"]
    assert "gain over" in command("compare", *pages)
    assert (tmp_path / "summaries.csv").is_file() and (tmp_path / "page.html").stat().st_size > 10_000
