"""Read recipes: YAML with `base:`, overrides, the origin of every value, all errors at once.

Layers, later ones win: defaults, base files in order, the recipe, `--debug`, the command line. The order goes from what
is shared to what was said last: a recipe refines its bases, `--debug` makes any recipe small without an edit, and what a
person types now is meant now. Sections merge key by key, dictionaries (`model.config`) merge too, lists are replaced: a
list that grew could never lose an item.

Each value keeps its origin (file and line), because an error, or a surprising value, is of use only with the place where
it can be corrected, and that is often a base file that the reader has not opened.
"""

from __future__ import annotations

import difflib
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from engine.errors import EngineError
from engine.recipe import shipped, yaml_subset
from engine.recipe.rules import findings
from engine.recipe.schema import LARGEST, SECTIONS, Recipe, Section, admits, field_of
from engine.recipe.synonyms import suggest, suggest_section

MAX_BYTES = 1 << 20
MAX_BASES, MAX_LAYERS = 16, 64
SHOWN_PROBLEMS = 50
DEBUG_RECIPE = shipped.RECIPES / "base" / "debug.yaml"
COMMAND_LINE = "command line"
Overrides = Iterable[str] | Mapping[str, object]
Key = tuple[str, ...]
Origins = dict[str, tuple[int, str]]  # section.key, or deeper -> (number of the layer, place in it)


@dataclass
class Layer:
    """Values of one source: {section: {key: value}} as written, with the origin of each key path."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def origin(self, path: Key) -> str:
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")


# --- the public face -------------------------------------------------------------------------------------------------


def load_recipe(path: str | os.PathLike[str], overrides: Overrides = (), *, debug: bool = False) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: a YAML file, or the name of a recipe that comes with the package: kobart.
        overrides: "section.key=value" strings as on the command line, or a mapping, flat or nested.
        debug: lay recipes/base/debug.yaml over the recipe, below the overrides.

    Raises:
        EngineError: E2.1 when a file cannot be read as YAML, E2.2 listing everything that is wrong with the values.
    """
    problems: list[str] = []
    layers = _file_layers(shipped.find(Path(path)), problems, ())
    if debug:
        layers += _file_layers(DEBUG_RECIPE, problems, ())
    layers.append(_override_layer(overrides, problems))
    return _build(layers, problems)


def with_overrides(recipe: Recipe, overrides: Overrides, open_to: tuple[str, ...] = ()) -> Recipe:
    """A checked copy of `recipe` with some values changed.

    With `open_to` (sections, or single keys as `section.key`) nothing else may be named, and only rules about a changed key are
    applied: prediction changes `generation.*` of a recipe whose training files need not exist any more, or of a model folder
    that came without one.
    """
    problems: list[str] = []
    below = Layer(recipe.model_dump())
    for section, keys in below.values.items():
        below.origins |= {(section, key): recipe.origin(f"{section}.{key}") for key in keys}
    below.origins |= {tuple(key.split(".")): where for key, (_, where) in recipe._origins.items()}
    above = _override_layer(overrides, problems)
    problems += _closed(above, open_to) if open_to else []
    changed = {f"{section}.{key}" for section, keys in above.values.items() if isinstance(keys, dict) for key in keys}
    return _build([below, above], problems, changed if open_to else None)


def _closed(layer: Layer, open_to: tuple[str, ...]) -> Iterator[str]:
    """What a layer of overrides names that may not be changed. Unknown names are reported when the layers are merged."""
    for section, keys in layer.values.items():
        if section in open_to or section not in SECTIONS:
            continue
        allowed = [key for key in open_to if key.startswith(f"{section}.")]
        if not allowed:
            sections = dict.fromkeys(f"{key.partition('.')[0]}.*" for key in open_to)
            yield f"{COMMAND_LINE}: {section}.* cannot be changed here, only {', '.join(sections)}"
            continue
        known = SECTIONS[section].model_fields.keys() & (keys if isinstance(keys, dict) else ())
        for key in sorted({f"{section}.{name}" for name in known} - set(allowed)):
            yield f"{COMMAND_LINE}: {key} changes nothing here; of {section} only {', '.join(allowed)} do"


# --- reading files ---------------------------------------------------------------------------------------------------


def _label(path: Path) -> str:
    """The path as a person would write it from here."""
    try:
        text = str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        text = str(path)
    return "".join(character if character.isprintable() else "?" for character in text)


def _unreadable(where: str, what: str, hint: str = "") -> EngineError:
    where = where if len(where) <= 300 else "..." + where[-297:]
    return EngineError("E2.1", f"{where}: {what}", "", hint)


def _read_text(path: Path, named_by: str) -> str:
    """The text of a local, regular, reasonably small UTF-8 file."""
    where = named_by or str(path)
    shown = f"base {path}" if named_by else "the recipe"
    try:
        if "\0" in str(path):
            raise _unreadable("recipe", "the path holds a NUL character")
        if not path.exists():
            tried = f"looked for {os.path.abspath(path)}; a base: is relative to the file that names it"
            known = f"a file, or one of {', '.join(shipped.names())}"
            raise _unreadable(where, f"{shown} does not exist", tried if named_by else known)
        if not path.is_file():
            raise _unreadable(where, f"{shown} is not a regular file")
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unreadable(where, f"{shown} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise _unreadable(where, f"{shown} is larger than {MAX_BYTES} bytes, which is no recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _unreadable(f"{_label(path)}:{line}", "is not UTF-8", f"iconv -f CP949 -t UTF-8 {path}") from None


def _file_layers(path: Path, problems: list[str], chain: tuple[Path, ...], named_by: str = "") -> list[Layer]:
    """The layers of a file, its bases first. `chain` holds the files that led here, to find cycles."""
    text = _read_text(path, named_by)
    real, label = path.resolve(), _label(path)
    if real in chain:
        names = " -> ".join(_label(link) for link in (*chain, real))
        raise _unreadable(named_by, f"base files form a cycle: {names}")
    if len(chain) >= MAX_BASES:
        raise _unreadable(named_by, f"more than {MAX_BASES} base files in a row")
    document = yaml_subset.parse(text)
    if document.problems:
        lines = [f"{label}:{line}: {what}" for line, what in document.problems]
        raise EngineError("E2.1", lines[0], "", problems=lines[:SHOWN_PROBLEMS])
    if not isinstance(document.value, dict):
        raise _unreadable(f"{label}:1", "a recipe is a mapping of sections, such as `training:` with keys below it")
    values, origins = document.value, {key: f"{label}:{line}" for key, line in document.lines.items()}
    shipped.with_data(values, real)
    layers = []
    for name in _base_names(values.pop("base", None), origins.get(("base",), ""), problems):
        layers += _file_layers(shipped.find(path.parent / name, name), problems, (*chain, real), origins[("base",)])
        if len(layers) > MAX_LAYERS:  # two bases with two bases each, and so on: 16 levels would be 65,536 readings
            raise _unreadable(f"{label}:1", f"more than {MAX_LAYERS} base files in all")
    return [*layers, Layer(values, origins)]


def _base_names(base: object, where: str, problems: list[str]) -> list[str]:
    if base is None:
        return []
    names = base if isinstance(base, list) else [base]
    good = [isinstance(name, str) and "://" not in name and name.endswith((".yaml", ".yml")) for name in names]
    if not names or not all(good):
        problems.append(f"{where}: base: needs a local .yaml file or a list of them; got {_shown(base)}")
        return []
    return names


# --- overrides -------------------------------------------------------------------------------------------------------


def _override_layer(overrides: Overrides, problems: list[str]) -> Layer:
    """Command-line strings or a mapping from Python as the uppermost layer."""
    layer = Layer()
    if isinstance(overrides, str):
        overrides = [overrides]
    pairs = _from_mapping(overrides, problems) if isinstance(overrides, Mapping) else _from_strings(overrides, problems)
    seen: set[Key] = set()
    for path, value in pairs:
        if any(path[: len(other)] == other[: len(path)] for other in seen):
            problems.append(f"{COMMAND_LINE}: {'.'.join(path)} is given twice; one of the values would be dropped")
            continue
        seen.add(path)
        _put(layer.values, path, value)
        layer.origins |= {path[:depth]: COMMAND_LINE for depth in range(1, len(path) + 1)}
    return layer


def _from_strings(items: Iterable[str], problems: list[str]) -> Iterator[tuple[Key, object]]:
    for item in items:
        name, equals, text = str(item).partition("=")
        path = tuple(name.strip().split("."))
        if not equals or not all(path):
            problems.append(f"{COMMAND_LINE}: {_shown(item)} is not section.key=value")
        elif len(path) == 1:
            problems.append(f"{COMMAND_LINE}: {path[0]}={_cut(text)} names no section{suggest_section(path[0])}")
        elif not text.strip() and not text:
            problems.append(f"{COMMAND_LINE}: {name}= has no value; write null for none or '\"\"' for empty text")
        else:
            yield from _from_string(path, text, problems)


def _from_string(path: Key, text: str, problems: list[str]) -> Iterator[tuple[Key, object]]:
    """Lists, dictionaries and quoted text are YAML; anything else is one scalar, colons and hashes included."""
    if text.lstrip()[:1] not in tuple("[{\"'"):
        value = yaml_subset.plain_scalar(text.strip())
        yield path, text if isinstance(value, str) else value
        return
    document = yaml_subset.parse(text)
    if document.problems:
        problems.extend(f"{COMMAND_LINE}: {'.'.join(path)}: {what}" for _, what in document.problems)
    else:
        yield path, document.value


def _from_mapping(items: Mapping[str, object], problems: list[str]) -> Iterator[tuple[Key, object]]:
    for name, value in items.items():
        path = tuple(str(name).split("."))
        if len(path) == 1 and isinstance(value, Mapping):
            yield from (((path[0], *str(key).split(".")), _native(inner)) for key, inner in value.items())
        elif len(path) == 1 or not all(path):
            problems.append(f"{COMMAND_LINE}: {_shown(name)} names no section and key{suggest_section(str(name))}")
        else:
            yield path, _native(value)


def _native(value: object) -> object:
    """Values from Python as YAML would give them: paths as text, tuples as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _native(item) for key, item in value.items()}
    return [_native(item) for item in value] if isinstance(value, (list, tuple, set)) else value


def _put(values: dict[str, object], path: Key, value: object) -> None:
    """Set a nested value; what is no dictionary on the way becomes one, and fails the type check if it may not."""
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[path[-1]] = value


# --- merging and checking --------------------------------------------------------------------------------------------


class _Merged:
    """Values of all layers laid over one another, and for each the layer that it comes from."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
        self.origins: Origins = {}

    def lay(self, layer: Layer, rank: int, problems: list[str]) -> None:
        for section, key, value in _known(layer, problems):
            old = self.values[section].get(key)
            self.values[section][key] = self._over(old, value, (section, key), layer, rank)

    def _over(self, old: object, new: object, path: Key, layer: Layer, rank: int) -> object:
        """`new` over `old`: dictionaries key by key, everything else replaced, and with it what stood below."""
        if not (isinstance(old, dict) and isinstance(new, dict)):
            name = ".".join(path)
            self.origins = {key: at for key, at in self.origins.items() if not key.startswith(name + ".")}
            self.origins[name] = (rank, layer.origin(path))
            old = {}
        if not isinstance(new, dict):
            return new
        return old | {key: self._over(old.get(key), item, (*path, key), layer, rank) for key, item in new.items()}


def _build(layers: list[Layer], problems: list[str], changed: set[str] | None = None) -> Recipe:
    """Merge the layers, check types, check rules (given `changed`, only those about these keys); raise once for all of it."""
    merged = _Merged()
    for rank, layer in enumerate(layers, start=1):
        merged.lay(layer, rank, problems)
    mistyped: set[str] = set()
    recipe = Recipe(
        **{name: _section(name, values, merged.origins, problems, mistyped) for name, values in merged.values.items()}
    )
    recipe._origins = merged.origins
    problems += _broken_rules(recipe, mistyped, layers, changed)
    if not problems:
        return recipe
    unique = list(dict.fromkeys(problems))
    more = [f"and {len(unique) - SHOWN_PROBLEMS} more"] if len(unique) > SHOWN_PROBLEMS else []
    raise EngineError("E2.2", unique[0], problems=unique[:SHOWN_PROBLEMS] + more)


def _broken_rules(recipe: Recipe, mistyped: set[str], layers: list[Layer], changed: set[str] | None) -> Iterator[str]:
    """One line for each broken rule; a rule about a key of the wrong type has nothing to look at."""
    for keys, message in findings(recipe):
        concerned = changed is None or changed.intersection(keys)
        if concerned and not mistyped.intersection(".".join(key.split(".")[:2]) for key in keys):
            yield f"{_blame(recipe, keys, layers)}: {keys[0]} {message}"


def _blame(recipe: Recipe, keys: list[str], layers: list[Layer]) -> str:
    """Where a broken rule is best corrected: at the key that was set last. A missing value is the whole recipe's fault."""
    latest = max(keys, key=recipe.layer)
    if recipe.layer(latest):
        return recipe.origin(latest)
    files = [origin.rpartition(":")[0] for layer in layers for origin in layer.origins.values() if ":" in origin]
    return files[-1] if files else "recipe"


def _known(layer: Layer, problems: list[str]) -> Iterator[tuple[str, str, object]]:
    """The (section, key, value) triples of a layer that the schema knows; the rest becomes problems."""
    for section, values in layer.values.items():
        where = layer.origin((section,))
        if section not in SECTIONS:
            if section == "base" and where == COMMAND_LINE:
                problems.append(f"{where}: base: belongs into a recipe file")
            else:
                problems.append(f"{where}: {_shown(section)[1:-1]} is not a section{suggest_section(section)}")
        elif values is not None and not isinstance(values, dict):
            problems.append(f"{where}: {section} is a section and needs keys below it; got {_shown(values)}")
        else:
            yield from _known_keys(layer, section, values or {}, problems)


def _known_keys(
    layer: Layer, section: str, values: dict[str, object], problems: list[str]
) -> Iterator[tuple[str, str, object]]:
    for key, value in values.items():
        where = layer.origin((section, key))
        if key not in SECTIONS[section].model_fields:
            problems.append(f"{where}: {section}.{_shown(key)[1:-1]} is not a key of {section}{suggest(section, key)}")
        elif (fault := _unfit(value)) is not None:
            problems.append(f"{where}: {section}.{key} {fault}")
        else:
            yield section, key, value


def _unfit(value: object) -> str | None:
    """What no key may hold: infinities, NUL, half characters, objects from Python."""
    if isinstance(value, (list, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return next((fault for item in items if (fault := _unfit(item)) is not None), None)
    if isinstance(value, float):
        return None if math.isfinite(value) else f"must be a finite number; got {value}"
    if isinstance(value, str):
        broken = "\0" in value or any("\ud800" <= character <= "\udfff" for character in value)
        return "holds a NUL or a broken character" if broken else None
    return None if value is None or isinstance(value, (bool, int)) else f"cannot hold a {type(value).__name__}"


def _section(
    name: str, values: dict[str, object], origins: Origins, problems: list[str], mistyped: set[str]
) -> Section:
    """The typed section. Keys with wrong values are reported and stand at their defaults for the other checks."""
    try:
        return SECTIONS[name](**values)
    except ValidationError as error:
        wrong = {str(fault["loc"][0]) for fault in error.errors(include_url=False)}
    for key in [key for key in values if key in wrong]:
        where = origins[f"{name}.{key}"][1]
        hint = _nearest_value(name, key, values[key])
        problems.append(f"{where}: {name}.{key} must be {expected(name, key)}; got {_shown(values[key])}{hint}")
        mistyped.add(f"{name}.{key}")
    return SECTIONS[name](**{key: value for key, value in values.items() if key not in wrong})


# --- words for people ------------------------------------------------------------------------------------------------


def expected(section: str, key: str) -> str:
    """What a key accepts, in words, from its declaration."""
    declared = field_of(section, key)
    extra = declared.json_schema_extra
    words = extra["expected"] if isinstance(extra, dict) and "expected" in extra else None
    return str(words or _words(declared.annotation, declared.metadata))


def _words(annotation: object, metadata: Iterable[object] = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for extra in parts[1:] for item in getattr(extra, "metadata", [extra])]
        return _words(parts[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part, metadata if part is not type(None) else ()) for part in parts)
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(str(part) for part in parts)
    if origin is list:
        return f"a list, each item {_words(parts[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if annotation in (int, float):
        return names[annotation] + _bounds(metadata)
    return names.get(annotation, "a mapping" if origin is dict else "a value")


def _bounds(metadata: Iterable[object]) -> str:
    phrases = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [(words, getattr(item, name, None)) for item in metadata for name, words in phrases.items()]
    found = [f"{words} {limit}" for words, limit in limits if limit not in (None, LARGEST)]
    return " " + " and ".join(found) if found else ""


def _nearest_value(section: str, key: str, value: object) -> str:
    """A hint for a misspelt choice, quoted number or unquoted text."""
    annotation = field_of(section, key).annotation
    if isinstance(value, str) and admits(annotation, list) and not admits(annotation, str):
        return f"; write a list: {yaml_subset.flow([value])}" if "," not in value else "; write a list: [...]"
    choices = {str(part).lower(): part for part in _choices(annotation)}
    if isinstance(value, str):
        if close := difflib.get_close_matches(value.lower(), choices, n=1):
            return f"; did you mean {choices[close[0]]}?"
        number = isinstance(yaml_subset.plain_scalar(value), (int, float)) and not admits(annotation, str)
        return "; write it without quotes" if number else ""
    numeric = isinstance(value, (bool, int, float)) and admits(annotation, str)
    return "; put it in quotes" if numeric else ""


def _choices(annotation: object) -> list[object]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _shown(value: object) -> str:
    """A value as the user wrote it, cut to a readable length."""
    try:
        return _cut(repr(value) if isinstance(value, str) else yaml_subset.flow(value))
    except yaml.YAMLError:  # an object from Python
        return type(value).__name__


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
