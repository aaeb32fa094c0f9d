#!/usr/bin/env python3
"""Training on one rank and on two, as whole copies and sharded, beside transformers' trainer; and 8 to 64 GPUs on paper.

    python tools/bench/ranks.py --data DIALOGUES.csv --tokenizer FOLDER [--source TOKENS] [--updates N] [--rounds N]
                                [--output FILE.json]

The `bart` of `tools/bench/train.py`, 16 rows an update on any number of ranks (gloo on CPUs). In each round every contender
trains in processes of its own, one after the other; rates are of all ranks, peaks of one. Then two runs count the bytes of
every collective in an update. The estimate takes these bytes per parameter to larger models and more GPUs; it is arithmetic
under the assumptions that it prints, and nothing of it was measured on GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import traffic
import train

CONTENDERS = [("ours", 1), ("trainer", 1), ("ours", 2), ("ours, fsdp", 2), ("trainer", 2)]
PAIRS = [
    ("ours x 1", "trainer x 1"),
    ("ours x 2", "trainer x 2"),
    ("ours, fsdp x 2", "trainer x 2"),
    ("ours x 2", "ours x 1"),
    ("ours, fsdp x 2", "ours x 2"),
]
# All, and those outside the layers: a sharded model gathers the layers' twice an update, forward and backward, the others once.
PARAMETERS = {"KoBART": (123_859_968, 24_622_080), "Llama-3.2-3B": (3_212_749_824, 394_005_504)}
RANKS = (8, 16, 32, 64)
ASSUMED = {
    "form": "ring collectives, float32, one micro-batch an update, full fine-tuning, nothing overlaps with work",
    "bytes_per_second_within_a_node_of_8": traffic.LINKS["within"],
    "bytes_per_second_between_nodes": traffic.LINKS["between"],
    "seconds_per_hop": traffic.LATENCY,
    "calls": "as many as the small model made; larger ones make more, of larger tensors",
}


def measured(options: argparse.Namespace, name: str, ranks: int, model: Path) -> dict[str, float]:
    print(f"{name}, {ranks} ranks", file=sys.stderr, flush=True)
    return train.measured(argparse.Namespace(**vars(options) | {"ranks": ranks}), name, model)


def compared(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    medians = {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in first}
        for name, first in rounds[0].items()
    }
    rates = {name: value["real_tokens_per_second"] for name, value in medians.items()}
    return {"medians": medians, "ratios": {f"{one} / {other}": rates[one] / rates[other] for one, other in PAIRS}}


def on_paper(volume: dict[str, float], sizes: dict[str, int]) -> dict[str, Any]:
    """The measured volume of an update, taken to larger models and more GPUs."""
    own, outside = sum(sizes.values()), sum(size for name, size in sizes.items() if ".layers." not in name)
    estimates: dict[str, Any] = {}
    for model, (total, beside) in PARAMETERS.items():
        scaled = {name: count * total / own for name, count in volume.items() if name.endswith("_bytes")}
        if "all_gather_bytes" in volume:
            scaled["all_gather_bytes"] = volume["all_gather_bytes"] * (2 * total - beside) / (2 * own - outside)
        estimates[model] = {ranks: traffic.estimate(volume | scaled, ranks) for ranks in RANKS}
    return estimates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CSV with dialogue and summary columns")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer of at most 30,000 tokens")
    parser.add_argument("--source", type=int, default=512, help="most tokens of a dialogue")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="0: count and estimate only")
    parser.add_argument("--tiny", action="store_true", help="a toy instead, of which no figure means anything")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.data, options.precision = options.data.resolve(), "fp32"
    options.shape = "kobart" if options.tiny else "bart"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        train.write_model(options.shape, options.tokenizer, model, tiny=options.tiny)
        volumes = {name: measured(options, f"{name}, counted", 2, model) for name in ("ours", "ours, fsdp")}
        record = described(options, volumes, train.sizes_of(model))
        for _ in range(options.rounds):
            one = {f"{name} x {ranks}": measured(options, name, ranks, model) for name, ranks in CONTENDERS}
            record["all_rounds"].append(one)
            written(record | compared(record["all_rounds"]), options.output)
    if options.rounds == 0:
        written(record, options.output)
    return 0


def described(options: argparse.Namespace, volumes: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "shape": options.shape,
        "parameters": sum(sizes.values()),
        "source": options.source,
        "updates": options.updates,
        "processors": os.cpu_count(),
        "collectives_of_an_update": volumes,
        "estimate": {"measured": False, "assumed": ASSUMED}
        | {"gpus": {name: on_paper(volume, sizes) for name, volume in volumes.items()}},
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
        "all_rounds": [],
    }


def written(record: dict[str, Any], output: Path | None) -> None:
    """After each round: what is measured so far is kept."""
    text = json.dumps(record, indent=2) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
