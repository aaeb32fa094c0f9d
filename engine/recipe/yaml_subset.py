"""YAML for recipes, in and out: a small, strict part of YAML 1.2, built on PyYAML's parser events.

PyYAML's constructors are never called, so no tag can build an object. What users trip over is decided here: `1e-5` and
`1e5` are numbers, `no` and `12:30` are text, `010` is not eight, a key given twice is an error, and so are anchors,
aliases, merge keys and tags, with which 1 KiB of YAML can describe gigabytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_DEPTH = 16
MAX_NODES = 20_000
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_WORDS: dict[str, Any] = {"": None, "~": None}
for _word, _value in (("null", None), ("true", True), ("false", False)):
    _WORDS |= {_word: _value, _word.capitalize(): _value, _word.upper(): _value}
for _word in (".inf", ".Inf", ".INF"):
    _WORDS |= {_word: math.inf, "+" + _word: math.inf, "-" + _word: -math.inf}
_WORDS |= dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan)

Path = tuple[str, ...]


class _TooMuch(Exception):
    """Deeper or longer than any recipe."""


@dataclass
class Document:
    """What one YAML text says: the value, the line of every key in it, and what is wrong with it."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    nodes: int = 0


def plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar: null, true/false, a decimal number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text)
    if len(text) <= 64 and _FLOAT.match(text):
        return float(text)
    return text


def parse(text: str) -> Document:
    """Read one document. Problems are collected; after a syntax error the rest of the text is left unread."""
    document = Document()
    try:
        _read(yaml.parse(text, Loader=yaml.SafeLoader), document)
    except yaml.YAMLError as error:
        document.problems.append(_syntax_error(error, text))
    except _TooMuch as error:
        document.problems.append((1, str(error)))
    except (ValueError, OverflowError, IndexError) as error:  # PyYAML on escapes such as "\UFFFFFFFF" and broken tags
        document.problems.append((1, f"is not valid YAML: {error}"))
    return document


def _read(events: Iterator[yaml.Event], document: Document) -> None:
    for event in events:
        if not isinstance(event, yaml.DocumentStartEvent):
            continue
        if document.nodes:
            document.problems.append((_line(event), "a recipe is one YAML document; drop what follows `---`"))
            return
        if event.version or event.tags:
            document.problems.append((_line(event), "YAML directives (%) are refused"))
        document.value = _node(next(events), events, document, ())


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or "syntax error"
        last = max(1, text.count("\n") + (not text.endswith("\n")))  # PyYAML counts the end as a line of its own
        return min(mark.line + 1, last), f"is not valid YAML at column {mark.column + 1}: {problem}"
    position = getattr(error, "position", 0)
    character = getattr(error, "character", "")
    name = f"character {character!r}" if isinstance(character, str) else f"character U+{character:04X}"
    return text.count("\n", 0, position) + 1, f"is not valid YAML: {name} is not allowed"


def _node(event: yaml.Event, events: Any, document: Document, path: Path) -> Any:
    document.nodes += 1
    if len(path) > MAX_DEPTH or document.nodes > MAX_NODES:
        raise _TooMuch(f"is refused: more than {MAX_DEPTH} levels or {MAX_NODES} values are no recipe")
    if isinstance(event, yaml.AliasEvent):
        document.problems.append((_line(event), f"alias *{event.anchor} is refused; write the value out, or use base:"))
        return None
    if event.anchor:
        document.problems.append(
            (_line(event), f"anchor &{event.anchor} is refused; write the value out, or use base:")
        )
    if event.tag is not None:
        document.problems.append((_line(event), f"tag {event.tag!r} is refused; recipes hold plain values only"))
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, document, path)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_node(item, events, document, (*path, str(len(items)))))
        return items
    return plain_scalar(event.value) if event.style is None else event.value


def _mapping(events: Any, document: Document, path: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent) or event.anchor or event.tag:
            document.problems.append((_line(event), "a key must be plain text"))
            _node(event, events, document, (*path, "?"))
            _node(next(events), events, document, (*path, "?"))
            continue
        key, line = event.value, _line(event)
        if key == "<<" and event.style is None:
            document.problems.append((line, "merge key << is refused; use base:"))
        if key in values:
            where = ".".join((*path, key))
            document.problems.append((line, f"{where} is given twice (first on line {document.lines[(*path, key)]})"))
            _node(next(events), events, Document(nodes=document.nodes, problems=document.problems), (*path, key))
            continue
        document.lines[(*path, key)] = line
        values[key] = _node(next(events), events, document, (*path, key))
    return values


class _Writer(yaml.SafeDumper):
    """Plain values only. Text that either `parse` or a reader of YAML 1.1 would take for something else is quoted."""

    yaml_representers = {
        kind: yaml.SafeDumper.yaml_representers[kind] for kind in (type(None), bool, int, float, str, list, dict)
    }

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')

    def represent_list(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=len(str(items)) <= 80)


_Writer.add_representer(str, _Writer.represent_str)
_Writer.add_representer(list, _Writer.represent_list)
_Writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))  # `1e5` is text in YAML 1.1


def write(value: dict[Any, Any], *, flow_style: bool = False) -> str:
    """YAML that `parse` reads back as the same value. Raises: yaml.YAMLError for objects."""
    text = yaml.dump(
        value, Dumper=_Writer, default_flow_style=flow_style, allow_unicode=True, sort_keys=False, width=math.inf
    )
    # Characters that do not print stand in double quotes by now. Escaped, none can change how a terminal shows the line.
    return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08X}" for c in text)


def flow(value: Any) -> str:
    """A value on one line, as it is written inside brackets."""
    return write({0: value}, flow_style=True)[len("{0: ") : -len("}\n")]
