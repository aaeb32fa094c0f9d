"""Every command of the README: what can run here runs, of the others script and options exist; both languages show the same."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import kodialogue
import pytest

from engine.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "recipes/README.md", "CONTRIBUTING.md", "SECURITY.md")
FILES = {f"engine/{name}.py": f"engine.{name}" for name in ("train", "predict")}
OTHERS = {"pip", "python", "git", "tensorboard", "eval", "accelerate", "torchrun", "bash", "source", "cd"}


def commands(document: str) -> list[str]:
    """The lines of its bash and console blocks, with continued lines joined and comments dropped."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(?:bash|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line) for line in lines) if line]


def parts_of(line: str) -> list[list[str]]:
    """The commands of a line, each as words, without variables before them and without a launcher and its options."""
    found = []
    for part in re.split("&&|;", line.strip(" ()")):
        words = shlex.split(re.sub(r"^\s*([A-Z_]+=\S+ )+", "", part))
        scripts = [at for at, word in enumerate(words) if re.match(r"(engine|tools)/.*\.py$", word)]
        found.append(words[scripts[0] :] if scripts else words)
    return [words for words in found if words]


EVERY = [(document, command) for document in DOCUMENTS for command in commands(document)]


def test_the_documents_have_commands():
    assert len(EVERY) > 45 and {document for document, _ in EVERY} == set(DOCUMENTS)


def parser_of(script: str):
    """The parser of engine/train.py, tools/compare.py, ...; None where a tool's `main` takes no arguments."""
    named = {Path(file).name: name for name, file in kodialogue._SCRIPTS.items()}
    name = None if "bench" in script else named.get(Path(script).name)
    return kodialogue.parser_of(name) if name else None


def options_of(parser) -> set[str]:
    inner = [
        choice for action in parser._actions if isinstance(action.choices, dict) for choice in action.choices.values()
    ]
    return set(parser._option_string_actions).union(*(options_of(one) for one in inner if hasattr(one, "_actions")))


@pytest.mark.parametrize(("document", "command"), EVERY, ids=[command[:60] for _, command in EVERY])
def test_script_and_options_exist(document, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for words in parts_of(command):
        if words[0] == "kodialogue":
            assert words[1] in {*kodialogue.scripts(), "completion", "--help"}, document
            words = [kodialogue._SCRIPTS.get(words[1], "kodialogue.py"), *words[2:]]
        if words[0].endswith(".py"):
            check(words[0] if "/" in words[0] else f"tools/{words[0]}", words[1:])
        else:
            assert words[0] in OTHERS and (words[0] != "bash" or (ROOT / words[1]).is_file()), document


def check(script: str, words: list[str]) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    parser = parser_of(script)
    known = options_of(parser) if parser else set(re.findall(r'"(--[\w-]+)"', text))
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert given <= known, f"{script} has no {given - known}"
    settings = [word for word in words if re.match(r"[a-z]+\.[a-z_0-9]+=", word)]
    if script == "engine/train.py":
        load_recipe("kobart", settings)


def _runs_here(command: str) -> bool:
    """Reads shipped files alone and trains nothing."""
    shown = "--print-recipe" in command or "--help" in command or "--version" in command or "completion" in command
    return shown and " RUN" not in command and "mine.yaml" not in command


@pytest.mark.parametrize("command", [command for _, command in EVERY if _runs_here(command)])
def test_it_runs_as_it_stands(command, tmp_path):
    """In the checkout, with `kodialogue` and `python` being those of this environment."""
    for name, script in (("python", ""), ("kodialogue", f"{ROOT}/tools/kodialogue.py ")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} {script}"$@"\n', encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip() and (done.stdout or "eval" in command)


@pytest.mark.slow
def test_the_readers_way_runs(trained, tmp_path, capsys):
    """The lines that need a run, as they stand but for the names of files: predict, compare, vary, inspect."""
    folder, _ = trained
    for copy in ("RUN", "RUN-2", "RUN-3"):
        shutil.copytree(folder / "run", tmp_path / copy)
    stand_ins = {
        "test.csv": str(folder / "test.jsonl"),
        "dev.csv": str(folder / "dev.jsonl"),
    }
    stand_ins |= {f"my/{name}.csv": str(folder / f"{name}.jsonl") for name in ("train", "dev", "test")}
    stand_ins |= {"recipes/mine.yaml": str(folder / "recipe.yaml"), "models/kobart": str(folder / "model")}
    outputs = {"--output": "summaries.csv", "--html": "page.html", "--output-dir": "versions"}
    wanted = (
        "predict.py RUN --input test.csv --output summaries.csv",
        "compare.py",
        "vary_dialogues.py",
        "show_batch.py",
    )
    wanted += ("inspect_data.py my", "train.py recipes/mine.yaml --dry-run")
    lines = [parts_of(command)[0] for command in commands("README.md") if any(part in command for part in wanted)]
    assert len(lines) >= len(wanted)
    for script, *words in lines:
        if script == "kodialogue":
            script, *words = kodialogue._SCRIPTS[words[0]], *words[1:]
        others = iter(("RUN", "RUN-2", "RUN-3"))  # compare refuses a run that is named twice
        given = [str(tmp_path / next(others)) if word == "RUN" else stand_ins.get(word, word) for word in words]
        for at, word in enumerate(given[:-1]):
            given[at + 1] = str(tmp_path / outputs[word]) if word in outputs else given[at + 1]
        module = import_module(FILES.get(script, Path(script).stem))
        assert not module.main(given), (script, given)
        assert capsys.readouterr().out
        (tmp_path / "summaries.csv").unlink(missing_ok=True)


def blocks(name: str) -> list[str]:
    """Every fenced block without its comments, which are translated."""
    found = re.findall(r"^```\w*\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [re.sub(r" +#(?!Person).*", "", block) for block in found]


def test_both_languages_have_the_same_sections_blocks_and_links():
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    assert blocks("README.md") == blocks("README.ko.md")
    for pattern in (r"^#+ ", r"^!\[.*\]\((.*)\)", r"^\| \[(\w+)\]", r"^\| `([^`]+)` \|"):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(pattern, korean, re.MULTILINE), pattern
    targets = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.ko.md"} for text in (english, korean)]
    assert targets[0] == targets[1]
    numbers = [[set(re.findall(r"\d[\d,.]*\d", part)) for part in text.split("\n## ")] for text in (english, korean)]
    assert numbers[0] == numbers[1], "a figure of one language is missing, or another, in the other"
