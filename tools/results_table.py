#!/usr/bin/env python3
"""The table of results in recipes/README.md, from records of real runs and from nothing else.

    python tools/results_table.py RUN RUN ...                                        # print the rows of finished runs
    python tools/results_table.py RUN --keep recipes/records                         # keep what a table needs of it
    python tools/results_table.py recipes/records/*.json --write recipes/README.md   # write the table anew

RUN is a run folder, its results.json, or a record that was kept. A kept record holds no path, no dialogue and no summary. The
table replaces what stands between the two marker comments. Debug and stopped runs are no results and are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

BEGIN, END = "<!-- results: written by tools/results_table.py -->", "<!-- end of results -->"
HEAD = ("recipe", "split", "tokenizer", "ROUGE-1 / 2 / L", "mean", "95 % interval", "first turns", "one sentence")
HEAD += ("time", "trained rows/s", "machine", "code")
_SAFE = "nothing was written"
_SCORES = ("rouge1", "rouge2", "rougeL", "rouge_mean", "rouge_tokenizer", "rouge_tokenizer_version", "loss")
_KEPT = ("recipe", "kind", "best_step", "epochs", "evaluation_share", "data", "intervals", "speeds", "world_size")
_KEPT += ("code", "versions", "hardware")


def read_record(path: Path) -> dict[str, Any]:
    """What the table needs of a run. Raises: EngineError E5.62 for what is no record, E2.131 for a run that is no result."""
    from engine.recipe.schema import SECTIONS
    from engine.runtime.atomic import read_json
    from engine.runtime.faults import blaming

    path = path / "results.json" if path.is_dir() else path
    with blaming("E5.62", "no record of a finished run with scores", path, "name run folders", safe=_SAFE):
        record = kept(read_json(path))
        line(record)
        SECTIONS["experiment"](name=record["recipe"]["name"])  # it becomes a file's name
    if record["kind"] != "done":
        what = f"the run's kind is {record['kind']}: its scores are no result of the recipe"
        raise EngineError("E2.131", what, str(path), "train the recipe to its end", safe=_SAFE)
    return record


def kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of results.json that may be shown to anybody: no paths, and no sentence of the training data."""
    small = {key: record[key] for key in _KEPT}
    for key in ("metrics", "test_metrics"):
        small[key] = record[key] and {name: record[key][name] for name in _SCORES if name in record[key]}
    small["baselines"] = {
        split: {name: {"rouge_mean": floors[name]["rouge_mean"]} for name in ("lead", "constant")}
        for split, floors in record["baselines"].items()
    }
    names = ("model_type", "parameters", "trainable_parameters", "precision")
    return small | {"model": {name: record["model"][name] for name in names}}


def line(record: Mapping[str, Any]) -> list[str]:
    """One row of the table: the dev scores of the best step."""
    from engine.prediction.export import code
    from engine.runtime.console import duration

    metrics, machine, made = record["metrics"], record["hardware"], record["code"]
    low, high = record["intervals"]["dev"]
    floors = [f"{record['baselines']['dev'][name]['rouge_mean']:.2f}" for name in ("lead", "constant")]
    commit = f"{made['commit'][:12]}{' (changed)' if made['dirty'] else ''}" if made["commit"] else made["version"]
    where = f"{machine['gpus']} x {machine['gpu']}" if machine["gpu"] else f"{machine['threads']} CPU thread(s)"
    return [
        code(record["recipe"]["name"]),
        f"dev, {record['data']['dev_rows']} rows",
        metrics["rouge_tokenizer"],
        " / ".join(f"{metrics[key]:.2f}" for key in ("rouge1", "rouge2", "rougeL")),
        f"{metrics['rouge_mean']:.2f}",
        f"{low:.2f} to {high:.2f}",
        *floors,
        duration(record["speeds"]["wall_seconds"]),
        f"{record['speeds']['train_samples_per_second']:.1f}",
        where,
        commit,
    ]


def places_of(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Where each record is kept: <recipe>.json, with eight digits of a hash where that is another run's.

    Raises: EngineError E2.77 for the same record twice.
    """
    names = [record["recipe"]["name"] for record in records]
    places = []
    for name, record in zip(names, records, strict=True):
        plain = folder / f"{name}.json"
        there = read_record(plain) if plain.exists() else None
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
        own = there == record or (there is None and names.count(name) == 1)
        places.append(plain if own else folder / f"{name}-{digest}.json")
    if len(set(places)) < len(places):
        raise EngineError("E2.77", "the same run is named twice", ", ".join(names), "name it once", safe=_SAFE)
    return places


def table_of(records: Sequence[Mapping[str, Any]]) -> str:
    from engine.prediction.card import table

    return table(HEAD, [line(record) for record in records])


def replaced(text: str, table: str, where: Path) -> str:
    """The document with the table between its marks. Raises: EngineError E2.132 without exactly one pair of marks."""
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end) or BEGIN in after + before or END in after + before:
        advice = f"put the lines {BEGIN} and {END} where the table belongs, once each"
        raise EngineError("E2.132", "no place for the table", str(where), advice, safe=_SAFE)
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or kept records")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table between the marks of this file")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="write a small record of each run, <recipe>.json or <recipe>-<hash>.json",
    )
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parser.parse_args(arguments)

    from engine.runtime.atomic import write_json_atomically, write_text_atomically

    records = [read_record(path) for path in options.runs]
    table = table_of(records)
    places = places_of(records, options.keep) if options.keep else []
    if options.write:
        text = replaced(options.write.read_text(encoding="utf-8"), table, options.write)
        write_text_atomically(options.write, text)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    for record, place in zip(records, places, strict=True) if places else ():
        write_json_atomically(place, record)
        print(f"kept: {place}", file=sys.stderr)
    print(table)
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
