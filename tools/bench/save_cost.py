#!/usr/bin/env python3
"""What a checkpoint costs the training loop: time in `CheckpointStore.save`, in the background and in the foreground.

    python tools/bench/save_cost.py [--parameters MILLIONS] [--device cpu|cuda] [--saves N] [--folder DIR]

A stack of linear layers with AdamW state (12 bytes a parameter) stands for the model. Prints seconds per save that the loop
waits, and how long the save takes in all.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


def measure(device: str, millions: int, saves: int, folder: Path, sync: bool) -> tuple[list[float], list[float]]:
    """Seconds that each save blocks, and seconds until it is complete."""
    import torch
    from safetensors.torch import save_file

    from engine.checkpoints import CheckpointStore, EngineState, weights_of
    from engine.ranks import RankGroup
    from engine.runfolder import RunStatus

    width = 2048
    layers = [torch.nn.Linear(width, width, device=device) for _ in range(max(1, millions * 10**6 // width**2))]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    runtime = SimpleNamespace(ranks=RankGroup(), status=RunStatus(), abandon=[])
    store = CheckpointStore(folder, runtime, save_total_limit=1, sync=sync, identity={})
    blocked, total = [], []
    for step in range(saves):
        state = EngineState({"step": step}, None, optimizer.state_dict(), {}, {}, {"torch": torch.get_rng_state()})
        began = time.perf_counter()
        store.save(
            step,
            state,
            weights=lambda: weights_of(model),
            write_model=lambda path, weights: save_file(dict(weights), path / "model.safetensors"),
        )
        blocked.append(time.perf_counter() - began)
        store.wait()
        total.append(time.perf_counter() - began)
    return blocked, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=124, metavar="MILLIONS", help="KoBART has 124")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="save-cost-", dir=options.folder))
    try:
        for name, sync in (("background", False), ("foreground", True)):
            folder = work / name
            folder.mkdir()
            blocked, total = measure(options.device, options.parameters, options.saves, folder, sync)
            later = blocked[1:] or blocked
            print(
                f"{name}: the loop waits {blocked[0]:.3f} s for the first save (buffers are made), "
                f"{sum(later) / len(later):.3f} s for each later one; complete after {max(total):.2f} s"
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
