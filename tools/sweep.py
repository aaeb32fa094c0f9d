#!/usr/bin/env python3
"""Search for better settings: a training run for each trial, compared by the recipe's dev metric.

    python tools/sweep.py RECIPE.yaml --set training.learning_rate=1e-4,2e-4 lora.r=16,32
    python tools/sweep.py RECIPE.yaml --search tpe --trials 20 --set training.learning_rate=1e-5..1e-3 lora.r=8..64

Values are choices (a,b,c) or, for the searches random and tpe, a range (low..high; of numbers with a decade or more between
them on a log scale). Optuna searches and keeps its study in study.db of the sweep's folder. There are also a run folder and
a log for each trial, trials.csv, and best.yaml, the best trial's recipe. The same command goes on with a sweep that was
killed, or adds trials where --trials is higher; tpe stops trials that are worse than the median at the same step.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed


def in_words(rows: Sequence[dict[str, Any]], metric: str) -> list[str]:
    """The table for a terminal."""
    from compare import table
    from sweeping import ranked

    def shown(key: str, value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4f}" if key == metric else f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = ranked(rows, metric)
    keys = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    lines = table([keys, *([shown(key, row[key]) for key in keys] for row in rows)])
    if rows[0]["status"] == "done":
        lines[1] += "  best"
    return lines


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from engine.recipe.flags import parse_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a file, or a name: kobart")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every trial")
    parser.add_argument("--set", nargs="+", required=True, metavar="KEY=VALUES", help="a,b,c or low..high")
    parser.add_argument("--search", choices=("grid", "random", "tpe"), help="default: tpe where there is a range")
    parser.add_argument("--trials", type=int, help="how many; default: the whole grid")
    parser.add_argument("--metric", help="evaluation.metric of every trial; default: the recipe's")
    parser.add_argument("--parallel", type=int, help="trials at once; default: one for each GPU")
    parser.add_argument("--output", type=Path, help="the sweep's folder; default: experiments/sweep_<recipe>")
    options = parse_options(parser, arguments)
    if min(1 if number is None else number for number in (options.trials, options.parallel)) < 1:
        parser.error("--trials and --parallel are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    from search_space import make_plan

    given = [*options.overrides, *([f"evaluation.metric={options.metric}"] if options.metric else [])]
    plan = make_plan(options.recipe, options.set, given, options.search, options.trials)
    root = Path(plan.recipe_of(next(plan.examples())).experiment.output_root)
    folder = options.output or root / f"sweep_{Path(options.recipe).stem}"

    from sweeping import Sweep  # torch: what is refused is refused before it is loaded

    gpus = devices()
    with Sweep(folder, plan) as sweep:
        sweep.run(gpus, options.parallel or len(gpus) or 1)
        rows = sweep.rows()
        print("\n".join(["", *in_words(rows, sweep.metric), f"written to {folder / 'trials.csv'}"]))
        best = sweep.write_best()
        print(f"best recipe: {best}")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
