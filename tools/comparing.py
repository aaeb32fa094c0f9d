"""Runs side by side, in numbers: what `compare.py` shows in a terminal and on a page.

Runs are compared on the rows that their prediction files hold, so that nothing is decoded again and no weights are needed.
The first run is the one that the others are held against.
"""

from __future__ import annotations

import difflib
import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.files import read_table
from engine.errors import EngineError
from engine.recipe import yaml_subset
from engine.reporting.tracking import read_rows, rows_sha256
from engine.runtime.atomic import read_json
from engine.scoring import intervals, rouge
from engine.scoring.baselines import turns_of
from engine.scoring.intervals import Difference, Interval

METRICS = (*rouge.METRICS, "rouge_mean")
CURVES = {
    "Loss": {"train": "loss", "dev": "loss"},
    "ROUGE mean on dev": {"dev": "rouge_mean"},
    "Learning rate": {"train": "learning_rate"},
    "Gradient norm": {"train": "grad_norm"},
    "Tokens per second": {"train": "tokens_per_second"},
}
ABSENT = "-"  # a key that a run's recipe does not have
_NAMES = ("name", "output_dir", "output_root")  # of `experiment`: where a run lies, not what it is
_MOST_POINTS, _MOST_BUCKETS, _MOST_TOPICS, _FEWEST_ROWS = 600, 4, 8, 5
_PIECES = ("id", "dialogue", "reference", "prediction")
_SAFE = "nothing was written"


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder as it is compared. `rows` and `scores` are of the same dialogues, in order."""

    name: str
    folder: Path
    recipe: dict[str, Any]  # "section.key" -> value
    results: dict[str, Any]  # {} while the run goes on
    history: list[dict[str, Any]]  # rows of metrics.jsonl
    step: int
    rows: list[dict[str, str]]  # of the prediction file
    scores: list[dict[str, float]]  # METRICS of each row, F1 x 100

    @property
    def tokenizer(self) -> str:
        return str(self.recipe.get("evaluation.rouge_tokenizer", "mecab"))

    @property
    def kind(self) -> str:
        return str(self.results.get("kind") or self.results.get("stop_reason") or "unfinished")

    def values(self, metric: str) -> list[float]:
        return [row[metric] for row in self.scores]


def read_runs(folders: Sequence[Path], split: str) -> list[Run]:
    """Read runs under names that tell them apart.

    Raises: EngineError: E2.75 no run folder, E2.76 not scored on the same rows, E2.77 the same folder twice, E3 for
    prediction files that are missing, damaged or without references.
    """
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise EngineError("E2.77", "the same run folder is named twice", ", ".join(map(str, folders)), safe=_SAFE)
    runs = [_read_run(folder, split) for folder in places]
    _refuse_other_rows(runs, split)
    named = (
        [str(run.recipe.get("experiment.name")) for run in runs],
        [run.folder.name for run in runs],
        map(str, places),
    )
    names = next(tuple(names) for names in map(list, named) if len(set(names)) == len(runs))
    tokenizer = runs[0].tokenizer
    return [replace(run, name=name, scores=_scores(run, tokenizer)) for run, name in zip(runs, names, strict=True)]


def _read_run(folder: Path, split: str) -> Run:
    recipe = recipe_of(folder)
    try:
        results = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
        step = results.get("best_step") if results else read_json(folder / "best.json").get("step")
    except (OSError, ValueError) as error:
        raise EngineError("E2.75", f"no run that has been evaluated: {error}", str(folder), safe=_SAFE) from error
    if not isinstance(step, int):
        raise EngineError("E2.75", "results.json is not as a run leaves it", str(folder), safe=_SAFE)
    rows = _read_predictions(folder / "predictions" / f"{split}-step{step}.csv")
    return Run("", folder, recipe, results, read_rows(folder / "metrics.jsonl"), step, rows, [])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError("E2.75", f"no run folder: {error}", str(path.parent), safe=_SAFE) from error


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{above}{key}.") if isinstance(item, dict) and item else {f"{above}{key}": item}
    return flat


def _read_predictions(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        advice = "another --split, or runs that decode at their evaluations (evaluation.generate)"
        raise EngineError("E3.60", "the run kept no predictions of that split", str(path), advice, safe=_SAFE)
    table = read_table(path, columns=_PIECES)
    if missing := [column for column in _PIECES if column not in table.columns]:
        raise EngineError("E3.61", f"no column {', '.join(missing)}", str(path), safe=_SAFE)
    bad = next((record for record in table.records if record.problem), None)
    if bad is not None:
        raise EngineError("E3.61", f"row {bad.row}: {bad.problem}", str(path), safe=_SAFE)
    rows = [dict(record.values) for record in table.records]
    if not rows or not all(row["reference"].strip() for row in rows):
        raise EngineError("E3.62", "rows without a reference cannot be scored", str(path), "--split dev", safe=_SAFE)
    return rows


def _refuse_other_rows(runs: Sequence[Run], split: str) -> None:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(rows_sha256(run.rows), []).append(run)
    if len(kinds) > 1:
        groups = "; ".join(
            f"{len(group[0].rows)} rows (sha256 {digest[:8]}): {', '.join(run.folder.name for run in group)}"
            for digest, group in kinds.items()
        )
        what = f"the runs were scored on different {split} rows, so no score of one says anything about another"
        raise EngineError("E2.76", what, groups, "compare runs of one group", safe=_SAFE)


def _scores(run: Run, tokenizer: str) -> list[dict[str, float]]:
    """As the run kept them for each row; counted anew where it did not, or with another tokenizer."""
    if run.tokenizer == tokenizer and all(key in run.rows[0] for key in rouge.METRICS):
        try:
            kept = [{key: float(row[key]) for key in rouge.METRICS} for row in run.rows]
        except ValueError as error:
            raise EngineError("E3.61", f"a score is no number: {error}", str(run.folder), safe=_SAFE) from error
        return [row | {"rouge_mean": sum(row.values()) / len(row)} for row in kept]
    references = references_of([row["reference"] for row in run.rows], run.recipe)
    return rouge.rouge_rows([row["prediction"] for row in run.rows], references, tokenizer)


def recipe_of(run: Path) -> dict[str, Any]:
    """A run's recipe as "section.key" -> value, also of a version whose keys were others. Raises: EngineError E2.75."""
    recipe = yaml_subset.parse(_text(run / "recipe.yaml")).value
    if not isinstance(recipe, dict):
        raise EngineError("E2.75", "recipe.yaml is not as a run leaves it", str(run), safe=_SAFE)
    return _flat(recipe)


def references_of(cells: Sequence[str], recipe: Mapping[str, Any]) -> list[list[str]]:
    """The references in the `reference` cells of a run's predictions: one in each line where it has several summary columns."""
    several = isinstance(recipe.get("data.summary_column"), list)
    return [cell.split("\n") if several else [cell] for cell in cells]


# --- all of them ------------------------------------------------------------------------------------------------------


def recipe_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all runs, with each run's value as a recipe writes it."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    named = {f"experiment.{name}" for name in _NAMES}
    rows = [(key, [_written(run.recipe, key) for run in runs]) for key in keys if key not in named]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _written(recipe: Mapping[str, Any], key: str) -> str:
    return yaml_subset.flow(recipe[key]) if key in recipe else ABSENT


class Score(NamedTuple):
    """One run's score in one metric; `gain` over the first run, None for that run itself."""

    interval: Interval
    gain: Difference | None


def scores_of(runs: Sequence[Run]) -> list[dict[str, Score]]:
    """For each run its METRICS with bootstrap intervals, and the paired bootstrap against the first run."""
    first = runs[0]
    return [
        {
            metric: Score(
                intervals.bootstrap_interval(run.values(metric)),
                None if run is first else intervals.paired_difference(run.values(metric), first.values(metric)),
            )
            for metric in METRICS
        }
        for run in runs
    ]


def best_of(scores: Sequence[Mapping[str, Score]]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i]["rouge_mean"].interval.mean)


def floors_of(runs: Sequence[Run], split: str) -> list[tuple[str, dict[str, float]]]:
    """What the scores are held against, by the first run that measured it with the tokenizer of this comparison."""
    for run in runs:
        try:
            found = run.results["baselines"][split]
            turns, text = found["lead"]["turns"], found["constant"]["text"]
            if found["lead"]["rouge_tokenizer"] == runs[0].tokenizer:
                lead = "the first turn" if turns == 1 else f"the first {turns} turns"
                names = {"lead": lead, "constant": f"always: {text}"}
                return [(name, {key: float(found[floor][key]) for key in METRICS}) for floor, name in names.items()]
        except (KeyError, TypeError, ValueError):  # an earlier version's results, or somebody's edit
            continue
    return []


class Curve(NamedTuple):
    """A metric of one run over its updates; `split` is train, dev, or the name of a floor."""

    run: int
    split: str
    x: list[int]
    y: list[float]


def curves_of(runs: Sequence[Run]) -> dict[str, list[Curve]]:
    """By the title of their chart, those of CURVES that some run has; at most 600 points each, evenly spaced."""
    charts = {}
    for title, keys in CURVES.items():
        curves = [_curve(run, number, split, key) for number, run in enumerate(runs) for split, key in keys.items()]
        if title.startswith("ROUGE"):
            longest = max(runs, key=lambda run: max((row["step"] for row in run.history), default=0))
            floors = ("lead", "constant")
            curves += [_curve(longest, 0, "dev", f"{name}_rouge_mean")._replace(split=name) for name in floors]
        charts[title] = [curve for curve in curves if curve.x]
    return {title: curves for title, curves in charts.items() if curves}


def _curve(run: Run, number: int, split: str, key: str) -> Curve:
    rows = [row for row in run.history if row["split"] == split and _is_number(row.get(key))]
    count = min(len(rows), _MOST_POINTS)
    kept = [rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count)]
    return Curve(number, split, [row["step"] for row in kept], [row[key] for row in kept])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- where the errors are ---------------------------------------------------------------------------------------------


class Bucket(NamedTuple):
    """Rows that have something in common, and each run's `rouge_mean` on them."""

    label: str
    rows: int
    intervals: list[Interval]


def errors_of(runs: Sequence[Run], topics: Mapping[str, str]) -> dict[str, list[Bucket]]:
    """By what may make a dialogue hard: buckets of rows, in order; nothing where all rows are alike."""
    rows = runs[0].rows
    turns = [turns_of(row["dialogue"]) for row in rows]
    kinds: dict[str, list[str]] = {
        "Length of the dialogue, characters": _ranges([len(row["dialogue"]) for row in rows]),
        "Turns": _ranges([len(found) for found in turns]),
        "Speakers": _ranges([len({speaker for speaker, _ in found}) for found in turns]),
        "Placeholders in the reference": _ranges([len(set(_placeholders(row["reference"]))) for row in rows]),
    }
    if topics:
        named = [topics.get(row["id"], "") for row in rows]
        common = {topic for topic, count in Counter(named).most_common(_MOST_TOPICS) if count >= _FEWEST_ROWS and topic}
        kinds["Topic"] = [topic if topic in common else "others" for topic in named]
    found = {kind: _buckets(runs, labels) for kind, labels in kinds.items()}
    return {kind: buckets for kind, buckets in found.items() if len(buckets) > 1}


def _ranges(values: Sequence[int]) -> list[str]:
    """A label for each value: the value itself where there are few, else one of four ranges with about as many rows."""
    ordered = sorted(values)
    cuts = sorted({ordered[len(ordered) * part // _MOST_BUCKETS] for part in range(1, _MOST_BUCKETS)})
    places = values if len(set(values)) <= _MOST_BUCKETS else [bisect_right(cuts, value) for value in values]
    inside: dict[int, list[int]] = {}
    for place, value in zip(places, values, strict=True):
        inside.setdefault(place, []).append(value)
    ends = {place: (min(found), max(found)) for place, found in inside.items()}
    return [f"{low}" if low == high else f"{low} to {high}" for low, high in (ends[place] for place in places)]


def _buckets(runs: Sequence[Run], labels: Sequence[str]) -> list[Bucket]:
    numbers = {label: [i for i, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)}

    def order(label: str) -> tuple[bool, float, str]:
        start = label.split(" ")[0]
        return label == "others", int(start) if start.isdecimal() else -len(numbers[label]), label

    return [
        Bucket(
            label,
            len(numbers[label]),
            [intervals.bootstrap_interval([run.scores[i]["rouge_mean"] for i in numbers[label]]) for run in runs],
        )
        for label in sorted(numbers, key=order)
    ]


class Placeholder(NamedTuple):
    """One placeholder: rows whose reference holds it; for each run the share of those whose summary does too, and the
    rows whose summary holds it though neither dialogue nor reference does."""

    name: str
    rows: int
    kept: list[float]
    invented: list[int]


def placeholders_of(runs: Sequence[Run]) -> list[Placeholder]:
    """The most frequent of the references first."""
    rows = runs[0].rows
    wanted = [set(_placeholders(row["reference"])) for row in rows]
    known = [set(_placeholders(row["dialogue"])) | names for row, names in zip(rows, wanted, strict=True)]
    written = [[set(_placeholders(row["prediction"])) for row in run.rows] for run in runs]
    counts = Counter(itertools.chain.from_iterable(wanted))
    for name in itertools.chain.from_iterable(itertools.chain.from_iterable(written)):
        counts.setdefault(name, 0)
    found = []
    for name, count in counts.most_common():
        kept = [sum(name in w and name in p for w, p in zip(wanted, own, strict=True)) for own in written]
        invented = [sum(name in p and name not in k for k, p in zip(known, own, strict=True)) for own in written]
        found.append(Placeholder(name, count, [number / count if count else 0.0 for number in kept], invented))
    return found


def _placeholders(text: str) -> list[str]:
    return rouge.PLACEHOLDER.findall(text)


def topics_of(run: Run, split: str) -> dict[str, str]:
    """Topics by id, from the data file that the run's recipe names; {} where it is gone or has none."""
    key = {"dev": "data.validation_file", "test": "data.test_file"}[split]
    columns = run.recipe.get("data.id_column"), run.recipe.get("data.topic_column") or "topic"
    if not run.recipe.get(key) or columns[0] is None:
        return {}
    try:
        table = read_table(str(run.recipe[key]), columns=columns)
    except EngineError:
        return {}
    values = [record.values for record in table.records if all(column in record.values for column in columns)]
    return {str(row[columns[0]]): str(row[columns[1]]) for row in values}


# --- dialogues --------------------------------------------------------------------------------------------------------


class Words(NamedTuple):
    """A stretch of a text; `differs`: it is not in the text that it is held against."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Dialogue:
    """One row as it is browsed: the reference with the words that no run found, each summary with those that it added."""

    id: str
    topic: str
    text: str
    reference: list[Words]
    summaries: list[list[Words]]
    scores: list[float]  # rouge_mean of each run
    disagreement: float  # 0..100


def dialogues_of(runs: Sequence[Run], topics: Mapping[str, str]) -> list[Dialogue]:
    """All rows in their order."""
    found = []
    for number, row in enumerate(runs[0].rows):
        texts = [run.rows[number]["prediction"] for run in runs]
        scores = [run.scores[number]["rouge_mean"] for run in runs]
        reference = row["reference"]
        missed = set.intersection(*({i for i, _ in _only_in(reference, text)} for text in texts))
        words = _marked(reference, missed)
        summaries = [_marked(text, {i for i, _ in _only_in(text, reference)}) for text in texts]
        apart = disagreement(texts, runs[0].tokenizer)
        found.append(Dialogue(row["id"], topics.get(row["id"], ""), row["dialogue"], words, summaries, scores, apart))
    return found


def disagreement(texts: Sequence[str], tokenizer: str) -> float:
    """100 minus the mean `rouge_mean` of all pairs of texts: 0 where all runs wrote the same."""
    pairs = list(itertools.combinations(texts, 2))
    alike = sum(100.0 if a == b else rouge.similarity(a, b, "rouge_mean", tokenizer) for a, b in pairs)
    return 100.0 - alike / len(pairs) if pairs else 0.0


def _only_in(text: str, other: str) -> list[tuple[int, str]]:
    """Words of `text`, with their places, that have no partner in `other` in the same order."""
    mine, theirs = text.split(), other.split()
    blocks = difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks()
    matched = {place for block in blocks for place in range(block.a, block.a + block.size)}
    return [(place, word) for place, word in enumerate(mine) if place not in matched]


def _marked(text: str, places: set[int]) -> list[Words]:
    words = [Words(word, place in places) for place, word in enumerate(text.split())]
    groups = itertools.groupby(words, key=lambda word: word.differs)
    return [Words(" ".join(word.text for word in group), differs) for differs, group in groups]


def sort_keys(runs: Sequence[Run]) -> list[tuple[str, str, Callable[[Dialogue], float]]]:
    """Orders of the dialogues, the largest first: a name for the address, one for people, and the value."""
    keys: list[tuple[str, str, Callable[[Dialogue], float]]] = [
        ("disagreement", "disagreement of the runs", lambda row: row.disagreement)
    ]
    for i, run in enumerate(runs[1:], start=1):
        keys += [
            (f"gain-{i}", f"gain of {run.name} over {runs[0].name}", lambda row, i=i: row.scores[i] - row.scores[0]),
            (f"loss-{i}", f"loss of {run.name} against {runs[0].name}", lambda row, i=i: row.scores[0] - row.scores[i]),
        ]
    for i, run in enumerate(runs):
        keys.append((f"worst-{i}", f"lowest score of {run.name}", lambda row, i=i: -row.scores[i]))
    return keys
