#!/usr/bin/env python3
"""The LM head on supervised positions only, against plain `model(**batch, labels=...)`, side by side.

    python tools/bench/loss_head.py [--rows 4] [--length 256] [--answer 48] [--rounds 7] [--output FILE.json]

A small Qwen3 with random weights and the real vocabulary of 151,936 tokens, float32. Forward and backward alternate between
the two ways; times are medians. Each way's peak memory is read from a process of its own, above what that process held
before its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCABULARY = 151_936
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
LEAST_SPEEDUP, MOST_MEMORY = 2.5, 0.5


def build(hidden: int, layers: int) -> nn.Module:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def make_batch(rows: int, length: int, answer: int) -> dict[str, Tensor]:
    """Rows of `length` tokens of which the last `answer` are supervised, as a causal LM's collator makes them."""
    import torch

    from engine.data.collate import IGNORE_INDEX

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length - answer] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).loss


def ours(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    from engine.loss.cross_entropy import summed_cross_entropy, supervised_tokens

    return summed_cross_entropy(model, batch) / supervised_tokens(batch)


WAYS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Tensor]] = {"plain": plain, "ours": ours}


def step(way: str, model: nn.Module, batch: dict[str, Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    loss = WAYS[way](model, batch)
    loss.backward()
    return loss.item()


def compare(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """Relative differences of the loss and of the gradients (largest element against the tensor's largest)."""
    losses, gradients = {}, {}
    for way in WAYS:
        losses[way] = step(way, model, batch)
        gradients[way] = {name: p.grad.clone() for name, p in model.named_parameters()}
    worst = max(
        float((gradients["ours"][name] - g).abs().max() / g.abs().max().clamp_min(1e-30))
        for name, g in gradients["plain"].items()
    )
    relative = abs(losses["ours"] - losses["plain"]) / losses["plain"]
    return {"loss": losses["plain"], "loss_difference": relative, "gradient_difference": worst}


def times(model: nn.Module, batch: dict[str, Tensor], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        step(way, model, batch)
    for _ in range(rounds):
        for way in WAYS:
            started = time.perf_counter()
            step(way, model, batch)
            found[way].append(time.perf_counter() - started)
    return found


def memory_line(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is now, VmHWM the peak (getrusage's peak is inherited from a parent)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_of(way: str, options: argparse.Namespace) -> dict[str, int]:
    """Runs in a child: peak memory of three steps, above what the process held before them."""
    model, batch = build(options.hidden, options.layers), make_batch(options.rows, options.length, options.answer)
    before = memory_line("VmRSS")
    for _ in range(3):
        step(way, model, batch)
    peak = memory_line("VmHWM")
    return {"step": peak - before, "process": peak}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    model, batch = build(options.hidden, options.layers), make_batch(options.rows, options.length, options.answer)
    same = compare(model, batch)
    seconds = times(model, batch, options.rounds)
    del model
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    peaks = {way: in_child(way) for way in WAYS}
    ratios = [slow / fast for slow, fast in zip(seconds["plain"], seconds["ours"], strict=True)]
    return {
        "shape": {key: getattr(options, key) for key in ("hidden", "layers", "rows", "length", "answer", "rounds")}
        | {"vocabulary": VOCABULARY},
        **same,
        "median_seconds": medians,
        "speedup": medians["plain"] / medians["ours"],
        "speedup_per_round": {"min": min(ratios), "max": max(ratios)},
        "peak_bytes": peaks,
        "step_memory_ratio": peaks["ours"]["step"] / peaks["plain"]["step"],
        "process_memory_ratio": peaks["ours"]["process"] / peaks["plain"]["process"],
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def in_child(way: str) -> dict[str, int]:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(result: dict[str, Any]) -> tuple[str, bool]:
    """The lines to print, and whether every goal is met."""
    rows = [
        ("loss, relative difference", result["loss_difference"], LOSS_TOLERANCE, False),
        ("gradients, relative difference", result["gradient_difference"], GRADIENT_TOLERANCE, False),
        ("time, plain over ours", result["speedup"], LEAST_SPEEDUP, True),
        ("memory of a step, ours over plain", result["step_memory_ratio"], MOST_MEMORY, False),
        ("memory of the process, the same", result["process_memory_ratio"], MOST_MEMORY, False),
    ]
    lines, good = [], True
    for name, value, limit, at_least in rows:
        met = value >= limit if at_least else value <= limit
        good = good and met
        lines.append(
            f"{name:36} {value:10.3g}   goal {'>=' if at_least else '<='} {limit:g}  {'met' if met else 'MISSED'}"
        )
    return "\n".join(lines), good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--answer", type=int, default=48, help="supervised tokens of a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(json.dumps(peak_of(options.peak_of, options)))
        return 0
    result = measure(options)
    text, good = report(result)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
