#!/usr/bin/env python3
"""Versions of a file's dialogues with some turns left out: test-time augmentation for a consensus.

    python tools/vary_dialogues.py test.csv --output-dir versions --copies 3
    for n in 1 2 3; do python engine/predict.py RUN --input versions/test-$n.csv --output versions/summary-$n.csv; done
    python engine/predict.py RUN --input test.csv --output summary.csv
    python tools/ensemble.py mbr summary.csv versions/summary-*.csv --weights 2 1 1 1 --output together.csv

Ids, order and references stay as they are. A turn is one line; a dialogue of fewer than four turns is left whole. Which
turns go depends on the seed, the copy and the row's id, and on nothing else in the file. Where a dialogue says everything
once, a consensus over versions can lose: try it on rows with references first.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

if TYPE_CHECKING:
    from engine.data.rows import Example
    from engine.recipe.schema import Data

FEWEST_TURNS = 4  # below, every turn counts


def without_some_turns(dialogue: str, share: float, draw: random.Random) -> str:
    """The dialogue without a random `share` of its turns (rounded, one at least), the others in their order."""
    from engine.data.prompts import split_turns

    turns = split_turns(dialogue)
    if len(turns) < FEWEST_TURNS:
        return dialogue
    gone = set(draw.sample(range(len(turns)), max(1, round(share * len(turns)))))
    return "\n".join(turn for place, turn in enumerate(turns) if place not in gone)


def version(examples: Sequence[Example], settings: Data, share: float, seed: str) -> list[dict[str, str]]:
    """The rows under the input's own column names, every dialogue shortened; several references take a column each."""
    from written_rows import as_row

    rows = []
    for example in examples:
        shorter = without_some_turns(example.dialogue, share, random.Random(f"{seed}/{example.id}"))
        rows.append(as_row(replace(example, dialogue=shorter), settings))
    used = [name for name in rows[0] if any(row[name] for row in rows)]  # test rows have no summaries
    return [{name: row[name] for name in used} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="CSV, JSONL or parquet file with dialogues")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="how to read it: data.text_column=대화")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets <name>-1.csv, <name>-2.csv, ...")
    parser.add_argument("--copies", type=int, default=3, help="files to write (default: 3)")
    parser.add_argument("--share", type=float, default=0.15, help="of the turns that each copy leaves out")
    parser.add_argument("--seed", type=int, default=42, help="decides which turns go (default: 42)")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    options = parser.parse_intermixed_args(argv)
    if options.copies < 1 or not 0 < options.share <= 0.5:
        parser.error("--copies must be at least 1, and --share above 0 and at most 0.5")

    from written_rows import write_rows

    from engine.data.rows import read_examples
    from engine.recipe.load import with_overrides
    from engine.recipe.schema import Recipe

    settings = with_overrides(Recipe(), options.overrides, ("data",)).data
    examples = read_examples(options.input, settings, require_summary=False)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    stem = Path(options.input).name.split(".")[0]
    for copy in range(1, options.copies + 1):
        path = options.output_dir / f"{stem}-{copy}.csv"
        write_rows(path, version(examples, settings, options.share, f"{options.seed}/{copy}"))
        print(path)
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
