#!/usr/bin/env python3
"""What a checkpoint costs training: the time in which the loop waits for it, and what it slows down beside it.

    python tools/bench/save_cost.py [--device cpu|cuda] [--updates N] [--rounds N] [--folder DIR] [--output FILE]

A Bart of KoBART's shape (124 million parameters, AdamW) makes `--updates` updates of 4 rows x 128 tokens, with one
checkpoint saved at the beginning and then without any, in turns. The first save of each way, which makes buffers, is not
counted. The difference is the whole price of a save, waiting and sharing the processors included; its share falls with the
updates between two saves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

ROWS, TOKENS = 4, 128


class Subject:
    """A model in training, and its checkpoints."""

    def __init__(self, device: str, folder: Path) -> None:
        import torch
        from transformers import BartConfig, BartForConditionalGeneration
        from transformers.utils.logging import disable_progress_bar

        from engine.checkpoints.store import CheckpointStore
        from engine.runtime.ranks import RankGroup
        from engine.runtime.run_status import RunStatus

        disable_progress_bar()
        torch.manual_seed(0)
        shape = {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 16, "decoder_attention_heads": 16}
        config = BartConfig(vocab_size=30_000, d_model=768, encoder_ffn_dim=3072, decoder_ffn_dim=3072, **shape)
        self.model = BartForConditionalGeneration(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.ids = torch.randint(10, 30_000, (ROWS, TOKENS), device=device)
        self.device, self.step = device, 0
        runtime = SimpleNamespace(ranks=RankGroup(), status=RunStatus(), when_giving_up=lambda undo: None)
        self.stores = {
            way: CheckpointStore(
                _made(folder / way), runtime, save_total_limit=1, sync=way == "foreground", identity={}
            )
            for way in ("background", "foreground")
        }

    def update(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, way: str) -> float:
        """Returns the seconds in which the loop waited."""
        import torch

        from engine.checkpoints.store import EngineState
        from engine.models.weights import weights_of

        self.step += 1
        rng = {"torch": torch.get_rng_state()}
        state = EngineState({"step": self.step}, None, self.optimizer.state_dict(), {}, {}, rng)
        began = time.perf_counter()
        self.stores[way].save(
            self.step,
            state,
            weights=lambda: weights_of(self.model),
            write_model=lambda path, weights: self.model.save_pretrained(path, state_dict=dict(weights)),
        )
        return time.perf_counter() - began

    def finish(self) -> None:
        for store in self.stores.values():
            store.wait()

    def wait_for_device(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def timed(subject: Subject, updates: int, way: str | None) -> tuple[float, float]:
    """Seconds of so many updates and of the save that went with them, and of these the seconds of waiting."""
    subject.wait_for_device()
    began = time.perf_counter()
    waited = subject.save(way) if way else 0.0
    for _ in range(updates):
        subject.update()
    subject.wait_for_device()
    if way:
        subject.finish()
    return time.perf_counter() - began, waited


def measure(subject: Subject, updates: int, rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    subject.update()
    for way in subject.stores:
        subject.save(way)
        subject.finish()
    ways = (None, "background", "foreground")
    seconds: dict[str | None, list[float]] = {way: [] for way in ways}
    waits: dict[str, list[float]] = {way: [] for way in subject.stores}
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            taken, waited = timed(subject, updates, way)
            seconds[way].append(taken)
            if way:
                waits[way].append(waited)
            tell(f"round {number + 1}: {way or 'no save':10} {taken:7.2f} s, waited {waited:.3f} s")
    update = statistics.median(seconds[None]) / updates
    found: dict[str, Any] = {"seconds_of_an_update": update, "updates": updates, "rounds": rounds}
    for way in subject.stores:
        price = statistics.median(a - b for a, b in zip(seconds[way], seconds[None], strict=True))
        found[way] = {
            "seconds_waited": statistics.median(waits[way]),
            "seconds_in_all": price,
            "updates_worth": price / update,
            "updates_between_saves_for_2_percent": max(1, round(price / update / 0.02)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--updates", type=int, default=12, help="updates in a round; a save should end within them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="save-cost-", dir=options.folder))
    try:
        subject = Subject(options.device, work)
        found = measure(subject, options.updates, options.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        shutil.rmtree(work)
    import torch

    found |= {"device": options.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
