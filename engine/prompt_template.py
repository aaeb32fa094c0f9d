"""A prompt of one's own: a text that names {dialogue}, and {topic} or {instruction} where it wants them."""

from __future__ import annotations

import re
from collections.abc import Mapping

NAMES = ("dialogue", "topic", "instruction")
_NAME = re.compile(r"\{(\w+)\}")  # other braces are text


def names_in(template: str) -> list[str]:
    """Names in braces, in their order."""
    return _NAME.findall(template)


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its names replaced, once: a dialogue that says {topic} is just text."""
    return _NAME.sub(lambda found: values[found[1]], template)


def fault_of(template: str | None) -> str | None:
    """What is wrong with a template, in words that follow its name; None where nothing is."""
    if template is None:
        return "is missing; write a text with {dialogue} in it"
    names = names_in(template)
    if "summary" in names:
        return "names {summary}, which is what the model writes: it follows the template by itself"
    if unknown := [name for name in names if name not in NAMES]:
        return f"names {{{unknown[0]}}}; there are {', '.join(f'{{{name}}}' for name in NAMES)}"
    if names.count("dialogue") != 1:
        return f"must name {{dialogue}} once, not {names.count('dialogue')} times"
    return None
