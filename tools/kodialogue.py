#!/usr/bin/env python3
"""Fine-tune, judge and use Korean dialogue summarisers: one name for training, prediction and the tools beside this file.

    kodialogue COMMAND ...              what an installed package brings
    python tools/kodialogue.py ...      the same from a checkout, with nothing installed

A recipe is a file, or the name of one that comes with the package: kodialogue train quickstart. On several GPUs:
accelerate launch engine/train.py RECIPE.yaml, or accelerate launch -m engine.train RECIPE.yaml from an installed package.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

import engine  # noqa: E402
from engine.errors import EngineError  # noqa: E402

# In the order of a researcher's day; a command is there where its file is.
_SCRIPTS = {
    "inspect": "inspect_data.py",
    "augment": "augment.py",
    "pseudo-label": "pseudo_label.py",
    "vary": "vary_dialogues.py",
    "show-batch": "show_batch.py",
    "screen": "screen.py",
    "train": "engine/train.py",
    "sweep": "sweep.py",
    "kfold": "kfold.py",
    "compare": "compare.py",
    "results": "results_table.py",
    "tune": "tune_decoding.py",
    "average": "average_checkpoints.py",
    "ensemble": "ensemble.py",
    "predict": "engine/predict.py",
    "merge": "merge_adapter.py",
    "convert": "convert_weights.py",
    "export": "export.py",
    "push": "push_to_hub.py",
    "demo": "demo.py",
}
_COMPLETION = 'Print a completion script: eval "$(kodialogue completion bash)", or zsh; in fish ... fish | source.'
_EXITS = """\
exit codes:
  0 done, 1 a bug of ours, 2 recipe or command line, 3 data, 4 model, 5 checkpoint, 6 storage, 7 numerics, 8 memory,
  9 another process; 75 stopped on request and saved, 76 not saved

environment:
  HF_HUB_OFFLINE=1 asks no hub; HF_HOME is where downloaded models lie; CUDA_VISIBLE_DEVICES names the GPUs
"""


def scripts() -> dict[str, Path]:
    """Commands and their files, those that are there."""
    files = {name: ROOT / file if "/" in file else TOOLS / file for name, file in _SCRIPTS.items()}
    return {name: file for name, file in files.items() if file.is_file()}


def usage() -> str:
    """The page of `kodialogue --help`: each command with the first line of its script, which is read and not run."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    lines = ["usage: kodialogue [-h] [--version] COMMAND ...", "", *__doc__.strip().splitlines(), "", "commands:"]
    texts = {name: file.read_text(encoding="utf-8") for name, file in scripts().items()}
    about = {name: text.split('"""', 2)[1].splitlines()[0] for name, text in texts.items()}
    for name, text in (about | {"completion": _COMPLETION}).items():
        lines += textwrap.wrap(text, width, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16)
    return "\n".join([*lines, "", "kodialogue COMMAND --help tells the rest.", "", _EXITS])


def load(command: str) -> ModuleType:
    """The command's module, as if its file had been started: its own name in its help, its neighbours importable."""
    file = scripts()[command]
    if file.parent == TOOLS:
        sys.path.insert(0, str(TOOLS))
    module = import_module(file.stem if file.parent == TOOLS else f"engine.{file.stem}")
    for name in scripts():  # its help speaks of scripts, also of others
        script = _SCRIPTS[name] if "/" in _SCRIPTS[name] else f"tools/{_SCRIPTS[name]}"
        module.__doc__ = (module.__doc__ or "").replace(f"python {script}", f"kodialogue {name}")
    return module


def run(command: str, arguments: Sequence[str]) -> int:
    module = load(command)
    sys.argv = [f"kodialogue {command}", *arguments]  # parsers take their name from here
    return module.main(list(arguments))


def unknown(command: str) -> EngineError:
    names = [*scripts(), "completion"]
    close = difflib.get_close_matches(command, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else f"; the commands are {', '.join(names)}"
    return EngineError("E2.90", f"{command!r} is not a command{hint}", "command line", "kodialogue --help")


def main(arguments: Sequence[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(usage(), end="")
    elif command == "--version":
        print(f"kodialogue {engine.__version__}")
    elif command == "completion":
        print(completion(rest), end="")
    elif command in scripts():
        return run(command, rest)
    else:
        raise unknown(command)
    return 0


# --- completion ------------------------------------------------------------------------------------------------------


class _Asked(Exception):
    """Carries a command's parser out of its `main`."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that the command's `main` makes, caught where it would print its help."""

    def caught(parser: argparse.ArgumentParser, file: object = None) -> None:
        raise _Asked(parser)

    original, argv = argparse.ArgumentParser.print_help, sys.argv
    argparse.ArgumentParser.print_help = caught
    try:
        run(command, ["--help"])
    except _Asked as asked:
        return asked.args[0]
    finally:
        argparse.ArgumentParser.print_help, sys.argv = original, argv
    raise AssertionError(f"{command} --help printed no help")


def words_of(command: str) -> list[str]:
    """What may follow the command: its options, recipes where it takes one, keys where it takes settings."""
    from engine.recipe.schema import SECTIONS
    from engine.recipe.shipped import names

    actions, words = list(parser_of(command)._actions), []
    for action in actions:  # grows by the options of commands within the command
        if action.help == argparse.SUPPRESS:
            continue
        inner = action.choices if isinstance(action, argparse._SubParsersAction) else {}
        actions += [one for parser in inner.values() for one in parser._actions]
        words += [*action.option_strings, *inner]
        taken = f"{action.metavar} {action.dest}".lower()
        words += names() if "recipe" in taken and action.nargs != 0 else []
        sections = SECTIONS if "section.key" in taken else [name for name in SECTIONS if f"{name}.key" in taken]
        words += [f"{section}.{key}=" for section in sections for key in SECTIONS[section].model_fields]
    return list(dict.fromkeys(words))


def completion(arguments: Sequence[str]) -> str:
    """The script for a shell; it holds every word, so that no Python starts at a tab."""
    if list(arguments) in (["-h"], ["--help"]):
        return f"{_COMPLETION}\n"
    if len(arguments) != 1 or arguments[0] not in ("bash", "zsh", "fish"):
        raise EngineError("E2.90", "completion takes one of bash, zsh, fish", "command line", _COMPLETION)
    words = {name: words_of(name) for name in scripts()} | {"completion": ["bash", "zsh", "fish"]}
    if arguments[0] == "fish":
        lines = ["complete -c kodialogue -n __fish_use_subcommand -f -a '" + " ".join(words) + "'"]
        for name, following in words.items():
            lines.append(f"complete -c kodialogue -n '__fish_seen_subcommand_from {name}' -a '{' '.join(following)}'")
        return "\n".join([*lines, ""])
    cases = "\n".join(f'      {name}) offered="{" ".join(following)}" ;;' for name, following in words.items())
    settings = " ".join(word for word in words["train"] if word.endswith("="))
    zsh = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" if arguments[0] == "zsh" else ""
    return f"""{zsh}_kodialogue() {{
  local offered="{" ".join(words)}"
  local settings="{settings}"
  if ((COMP_CWORD > 1)); then
    case ${{COMP_WORDS[1]}} in
{cases.replace(settings, "$settings")}
      *) offered= ;;
    esac
  fi
  [[ ${{COMP_WORDS[COMP_CWORD-1]}} == "=" ]] && offered=  # the value of a setting: a file, perhaps
  COMPREPLY=($(compgen -W "$offered" -- "${{COMP_WORDS[COMP_CWORD]}}"))
  [[ ${{COMPREPLY[0]-}} == *"=" ]] && compopt -o nospace 2>/dev/null
  return 0
}}
complete -o default -F _kodialogue kodialogue
"""


def entry() -> int:
    """What the installed command calls."""
    from engine.runtime.exits import main_guard

    return main_guard(main)


if __name__ == "__main__":
    sys.exit(entry())
