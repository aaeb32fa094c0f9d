#!/usr/bin/env python3
"""Fused AdamW beside torch's default one, and bf16 beside fp32: step and whole update, in turns on one model.

    python tools/bench/optim.py [--shapes bart kobart] [--ways unfused fused "fused, bf16"] [--rounds N] [--output FILE.json]

`bart` is 3 + 3 layers of width 256, updates of 16 rows; `kobart` has KoBART's 6 + 6 layers of width 768, updates of 4. Weights
and tokens are random. A round is one update in each way, in changing order; times are medians over rounds: wall time on a GPU,
on a CPU this process's CPU time, which other work on the machine disturbs less. Ratios are to the way before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

VOCABULARY = 30_000
SOURCE, TARGET = 192, 48  # tokens of a row
SHAPES = {"bart": (256, 3, 4, 16), "kobart": (768, 6, 16, 4)}  # width, layers of each half, heads, rows of an update
WAYS = {"unfused": (False, "fp32"), "fused": (True, "fp32"), "fused, bf16": (True, "bf16")}  # optimizer, precision


def build(shape: str) -> nn.Module:
    import torch
    from transformers import AutoModelForSeq2SeqLM, BartConfig

    width, layers, heads, _ = SHAPES[shape]
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
    )
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).train()


def make_batch(rows: int) -> dict[str, Tensor]:
    import torch

    ids = torch.randint(5, VOCABULARY, (rows, SOURCE))
    labels = torch.randint(5, VOCABULARY, (rows, TARGET))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "decoder_input_ids": labels}


def update(
    model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, precision: str
) -> dict[str, float]:
    """Seconds of one whole update, and of the optimizer's step in it."""
    import torch

    from engine.loss.cross_entropy import summed_cross_entropy

    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    started = clock()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = summed_cross_entropy(model, batch)
    (loss / (batch["labels"].numel())).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    wait()
    stepping = clock()
    optimizer.step()
    wait()
    ended = clock()
    optimizer.zero_grad(set_to_none=True)
    return {"update": ended - started, "step": ended - stepping}


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from engine.recipe.schema import Training
    from engine.training import optim

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(shape).to(device)
    batch = {name: tensor.to(device) for name, tensor in make_batch(SHAPES[shape][3]).items()}
    optimizers = {
        way: optim.build_optimizer(optim.parameter_groups(model, 0.01), Training(), device, fused=fused)
        for way, (fused, _) in WAYS.items()
        if way in options.ways
    }
    for way, optimizer in optimizers.items():  # the first step makes the moments
        update(model, batch, optimizer, WAYS[way][1])
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in optimizers}
    for turn in range(options.rounds):
        for way in list(optimizers)[:: -1 if turn % 2 else 1]:
            seconds[way].append(update(model, batch, optimizers[way], WAYS[way][1]))
    result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for part in ("step", "update"):
        medians = {way: statistics.median(one[part] for one in values) for way, values in seconds.items()}
        ratios = {f"{before} / {way}": medians[before] / medians[way] for before, way in pairwise(optimizers)}
        result[part] = {"median_seconds": medians, "ratios": ratios}
    return result | {"all_seconds": seconds}


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "rounds": options.rounds,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "shapes": {},
    }
    for shape in options.shapes:
        record["shapes"][shape] = found = measure(shape, options)
        for part in ("step", "update"):
            figures = [f"{way} {value:.3f} s" for way, value in found[part]["median_seconds"].items()]
            figures += [f"{ways} {ratio:.2f}" for ways, ratio in found[part]["ratios"].items()]
            print(f"{shape:7} {part:7} {'  '.join(figures)}", flush=True)
        if options.output:
            options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
