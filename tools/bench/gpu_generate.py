#!/usr/bin/env python3
"""Decoding on one CUDA GPU: the cases of `generate.py` that need one, each in a process of its own.

    python tools/bench/gpu_generate.py            # writes tools/bench/results/generate-gpu-<case>.json

KoBART's shape in float32 (16 dialogues x 5 beams, and all 499 test dialogues), Llama-3.2-3B's shape in bfloat16
(16 prompts x 4 beams); each with our plain step and with CUDA graphs. Nothing is written without a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = {
    "kobart": ["kobart", "--rounds", "5"],
    "kobart-499": ["kobart", "--examples", "499", "--rounds", "3"],
    "trained-like": ["trained-like", "--rounds", "3"],
    "llama-3b": ["llama-3b", "--dtype", "bfloat16", "--rounds", "3"],
}


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to measure", file=sys.stderr)
        return 2
    failed = 0
    for name, arguments in RUNS.items():
        output = HERE / "results" / f"generate-gpu-{name}.json"
        command = [sys.executable, str(HERE / "generate.py"), *arguments, "--device", "cuda", "--output", str(output)]
        print(f"== {name}", flush=True)
        failed += subprocess.run(command, check=False).returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
