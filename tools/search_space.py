"""What a sweep searches: the values of each key, tried on the recipe before anything starts."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.recipe.load import load_recipe
from engine.recipe.yaml_subset import plain_scalar

if TYPE_CHECKING:
    import optuna

    from engine.recipe.schema import Recipe

MOST_COMBINATIONS = 500
# Runs that differ in these do not compare: they are scored on other rows, in other words, or by something else.
_SAME_FOR_ALL = re.compile(
    r"experiment\..*|data\.(validation_file|max_validation_samples)"
    r"|evaluation\.(metric|max_samples|rouge_tokenizer|bertscore_\w+)"
)


@dataclass(frozen=True)
class Axis:
    """Values of one key: choices as they are written on a command line, or without them a range, both ends included."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0

    @property
    def examples(self) -> tuple[str, ...]:
        """The values that are tried on the recipe before anything starts."""
        return self.choices or (repr(self.low), repr(self.high))

    def suggest(self, trial: optuna.Trial) -> str:
        """The trial's value, as an override has it."""
        if self.choices:
            return str(trial.suggest_categorical(self.key, self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return repr(trial.suggest_int(self.key, self.low, self.high))
        log = self.low > 0 and self.high >= 10 * self.low
        return repr(trial.suggest_float(self.key, self.low, self.high, log=log))


def parse_axis(text: str) -> Axis:
    """`key=a,b,c` or `key=low..high`. Raises: EngineError E2.79 for what is neither, or may not differ between trials."""
    key, _, written = (part.strip() for part in text.partition("="))
    choices = tuple(part.strip() for part in re.split(r",(?![^\[{]*[\]}])", written))  # not within [a,b]
    low, dots, high = written.partition("..")
    ends = [plain_scalar(end) for end in (low, high)]
    if dots and all(type(end) in (int, float) for end in ends):
        if ends[0] < ends[1]:
            return Axis(key, (), *ends)
        why = "a range goes from the lower to the higher number"
    elif len(choices) > 1 and _SAME_FOR_ALL.fullmatch(key):
        why = "is the same for all trials of a sweep, or their scores would not compare"
    elif not key or "" in choices:
        why = "write key=value,value or key=low..high"
    elif len(set(choices)) < len(choices):
        why = "a value is there twice"
    else:
        return Axis(key, choices)
    raise EngineError("E2.79", f"{text}: {why}", "--set")


@dataclass(frozen=True)
class Plan:
    """What a sweep is, apart from where it runs and how far it has come. `fixed`: overrides of every trial."""

    recipe: str
    axes: tuple[Axis, ...]
    search: str
    trials: int
    fixed: tuple[str, ...]

    def overrides(self, values: Sequence[str]) -> list[str]:
        return [*self.fixed, *(f"{axis.key}={value}" for axis, value in zip(self.axes, values, strict=True))]

    def recipe_of(self, values: Sequence[str]) -> Recipe:
        return load_recipe(self.recipe, self.overrides(values))

    def examples(self) -> Iterator[tuple[str, ...]]:
        """Values to try on the recipe: all combinations of a grid, else those of one axis after the other."""
        if self.search == "grid":
            yield from itertools.product(*(axis.examples for axis in self.axes))
            return
        first = tuple(axis.examples[0] for axis in self.axes)
        yield first
        for place, axis in enumerate(self.axes):
            yield from ((*first[:place], value, *first[place + 1 :]) for value in axis.examples[1:])


def make_plan(
    recipe: str,
    written: Sequence[str],
    fixed: Sequence[str] = (),
    search: str | None = None,
    trials: int | None = None,
) -> Plan:
    """A plan whose recipes have been loaded: every combination of a grid; else each value, and both ends of ranges, in turn.

    Args:
        written: `key=a,b,c` or `key=low..high`; one value alone is an override like those of `fixed`.
        search: None: tpe where there is a range, else grid.
        trials: None: all of the grid.

    Raises:
        EngineError: E2 for keys and values that the recipe does not take, or a search that does not fit them.
    """
    every = [parse_axis(text) for text in written]
    axes = tuple(axis for axis in every if len(axis.choices) != 1)
    fixed = (*fixed, *(f"{axis.key}={axis.choices[0]}" for axis in every if len(axis.choices) == 1))
    ranges = [axis.key for axis in axes if not axis.choices]
    search = search or ("tpe" if ranges else "grid")
    size = math.prod(len(axis.choices) for axis in axes)
    if any(text.startswith("experiment.output_dir=") for text in fixed):
        raise EngineError("E2.79", "each trial has a folder of its own", "experiment.output_dir", "use --output")
    if len({axis.key for axis in axes}) < len(axes) or not axes:
        raise EngineError("E2.79", "name keys with several values, each key once", "--set")
    if search == "grid" and (ranges or size > MOST_COMBINATIONS):
        why = f"{', '.join(ranges)}: a range has no grid" if ranges else f"a grid of {size} trials"
        raise EngineError("E2.79", why, "--set", "use --search random or tpe, with --trials")
    if search != "grid" and trials is None:
        raise EngineError("E2.79", f"--search {search} needs a number of trials", "", "add --trials 20")
    plan = Plan(recipe, axes, search, min(size, trials or size) if search == "grid" else int(trials or 0), fixed)
    for values in plan.examples():
        _refuse_unscored(plan.recipe_of(values), recipe)
    return plan


def _refuse_unscored(recipe: Recipe, where: str) -> None:
    if recipe.data.validation_file is None or recipe.evaluation.strategy == "no":
        what = "trials are compared on dev rows, and this recipe evaluates none"
        raise EngineError("E2.79", what, where, "set data.validation_file and evaluation.strategy")
