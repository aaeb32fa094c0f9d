"""The command line's options: ours, and an answer to those that other trainers have and we write as section.key=value."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_PRECISIONS = ("bf16", "fp16")


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, sections: Sequence[str] = ()
) -> argparse.Namespace:
    """The parsed command line. Exits with code 2 for an unknown option, naming the setting that it probably means.

    Args:
        sections: those whose keys come first where a name stands for several.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if sys.argv[0].startswith("kodialogue "):
        parser.prog = sys.argv[0]
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:  # what follows an unknown option is not taken for a setting any more, and is in the list as well
        flags = [argument for argument in unknown if argument.startswith("-")] or unknown
        parser.error("; ".join(_advice(flag, arguments, sections) for flag in flags))
    return options


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
