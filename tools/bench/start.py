#!/usr/bin/env python3
"""What the data of a run cost before its first update, the first time and the second, when its token ids are kept.

    python tools/bench/start.py --data DIALOGUES.csv --tokenizer FOLDER [--rows N] [--style plain|chat] [--rounds N]
                                [--output FILE.json]

`--rows` dialogues are written, each of the drawn turns of one of `--data`'s. A start is a process of its own, which reads and
checks the rows, has their token ids, plans its batches and logs their lengths, as a run does; the imports and the model are not
counted. In each round the kept token ids are deleted and two starts follow each other; figures are medians.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

COLUMNS = ("fname", "dialogue", "summary")


def write_rows(data: Path, path: Path, count: int) -> None:
    """`count` dialogues of shuffled turns, no two alike, with their summaries."""
    with data.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number in range(count):
            row = rows[number % len(rows)]
            turns = row["dialogue"].splitlines()
            draw.shuffle(turns)
            writer.writerow((f"row_{number}", "\n".join([*turns, f"#Person1#: {number}번."]), row["summary"]))


def start(data: Path, tokenizer: Path, style: str) -> None:
    """One start, in this process: a line of JSON on stdout, seconds of wall and CPU."""
    from engine.data.encode import TextEncoder, length_report
    from engine.data.feature_cache import FeatureCache
    from engine.data.prompts import PromptSettings
    from engine.data.rows import rows_fingerprint
    from engine.models import tokenization
    from engine.recipe.schema import Recipe
    from engine.runtime.ranks import RankGroup
    from engine.training.batch_size import plan_line, window_sampler
    from engine.training.setup import read_splits

    columns = {"id_column": "fname", "text_column": "dialogue", "summary_column": "summary"}
    lengths = {"max_source_length": 512, "max_target_length": 128}
    recipe = Recipe(data={"train_file": str(data), **columns, **lengths})
    prepared = tokenization.prepare(tokenization.load_tokenizer(tokenizer), [], name=tokenizer.name)
    family = "seq2seq" if style == "plain" else "causal"
    encoder = TextEncoder(prepared, family, PromptSettings(style=style), **lengths)
    wall, cpu = time.perf_counter(), time.process_time()
    examples = read_splits(recipe, SimpleNamespace(ranks=RankGroup())).train
    features = FeatureCache(encoder, keep=True).training(examples)
    plan_line(window_sampler(recipe, features))
    length_report(features, encoder)
    rows_fingerprint(examples)
    print("RESULT", json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CSV with dialogue and summary columns")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--rows", type=int, default=12_457)
    parser.add_argument(
        "--style", choices=["plain", "chat"], default="plain", help="chat: as a causal LM with a template"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.start, options.tokenizer, options.style)
        return 0
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder) / "rows.csv", Path(folder) / "cache"
        write_rows(options.data, data, options.rows)
        command = [sys.executable, __file__, "--data", options.data, "--tokenizer", options.tokenizer]
        command += ["--style", options.style, "--start", data]
        environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
        environment = {name: value for name, value in environment.items() if name != "HF_HUB_CACHE"}
        for _ in range(options.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            rounds.append({name: measured(command, environment) for name in ("first", "second")})
            print(rounds[-1], file=sys.stderr)
    record: dict[str, Any] = {"rows": options.rows, "tokenizer": options.tokenizer.name, "style": options.style}
    for name in ("first", "second"):
        record[name] = {key: round(statistics.median(one[name][key] for one in rounds), 2) for key in ("wall", "cpu")}
    record |= {"rounds": rounds, "processors": os.cpu_count()}
    record["versions"] = {name: version(name) for name in ("transformers", "tokenizers", "pandas")}
    record["versions"]["python"] = platform.python_version()
    print(json.dumps({key: record[key] for key in ("rows", "first", "second")}))
    if options.output:
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def measured(command: list[Any], environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"the start failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


if __name__ == "__main__":
    sys.exit(main())
