"""The command line's options: ours, and an answer to those that other trainers have and we write as section.key=value."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

_PRECISIONS = ("bf16", "fp16")
_SETTING = re.compile(r"([a-z_]+)\.[\w.]+=")


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, sections: Sequence[str] = ()
) -> argparse.Namespace:
    """The parsed command line. Exits with code 2 for an unknown option, naming the setting that it probably means.

    Settings (section.key=value) may stand anywhere, and come to `overrides`.

    Args:
        sections: those whose keys come first where a name stands for several.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if sys.argv[0].startswith("kodialogue "):
        parser.prog = sys.argv[0]
    rest, settings = settings_apart(parser, arguments)
    options, unknown = parser.parse_known_intermixed_args(rest)
    options.overrides = [*options.overrides, *settings]
    if unknown:  # what follows an unknown option is in the list as well
        flags = [argument for argument in unknown if argument.startswith("-")] or unknown
        parser.error("; ".join(_advice(flag, arguments, sections) for flag in flags))
    return options


def settings_apart(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other words, the settings): an option that takes any number of words would swallow the settings behind it.

    What an option wants for its own stays: the one word of an option that takes one, and any of those of an option whose
    metavar says KEY=.
    """
    rest: list[str] = []
    settings: list[str] = []
    keys = wanted = False  # the option before the word takes settings; wants this word
    for word in arguments:
        if word.startswith("--"):
            action = parser._option_string_actions.get(word)
            keys = action is not None and "KEY=" in str(action.metavar)
            wanted = action is not None and (keys or action.nargs is None)
        elif not wanted and _is_setting(word):
            settings.append(word)
            continue
        else:
            wanted = wanted and keys
        rest.append(word)
    return rest, settings


def _is_setting(word: str) -> bool:
    named = _SETTING.match(word)
    if named is None:
        return False
    from engine.recipe.schema import SECTIONS  # pydantic: without settings the command line does without it

    return named[1] in SECTIONS


def _advice(flag: str, arguments: Sequence[str], sections: Sequence[str]) -> str:
    from engine.recipe.schema import field_of  # pydantic: `--help` does without it
    from engine.recipe.synonyms import NOT_NEEDED, keys_of

    name, _, value = flag.partition("=")
    bare = name.lstrip("-").lower().replace("-", "_")
    if bare in NOT_NEEDED:
        return f"{name}: not needed: {NOT_NEEDED[bare]}"
    keys = keys_of(bare, sections) if name.startswith("--") else []
    if not keys:
        return f"{name}: no such option; settings are written section.key=value"
    if bare in _PRECISIONS:
        value = bare
    following = arguments[arguments.index(flag) + 1 :][:1]
    if not value and following and not following[0].startswith("--") and "=" not in following[0]:
        value = following[0]
    if not value:
        value = "true" if field_of(*keys[0].split(".", 1)).annotation is bool else "..."
    return f"{name}: write {' or '.join(f'{key}={value}' for key in keys)}"
