"""What two sharded ranks hold in memory while they build a model, save it and take a checkpoint up: a line of JSON each.

python tests/measured_ranks.py FOLDER [whole]       (`whole`: every rank builds all of it, nothing is spooled)

Counted is anonymous memory, in MiB above what was held before: pages of mapped files can be dropped at any time. Run it under
MALLOC_MMAP_THRESHOLD_=65536: by default glibc keeps what is freed in pieces of less than 32 MiB, which real layers exceed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 128}


def held() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


@contextmanager
def peak(figures: dict[str, float], name: str) -> Iterator[None]:
    before, done, most = held(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    done.set()
    watcher.join()
    figures[name] = round(max(most[0], held()) - before, 1)


def save(rank: int, folder: Path, whole: bool, bundle, optimizer) -> None:
    import checkpoint_toys

    from engine.checkpoints.spool import Spool
    from engine.checkpoints.store import EngineState
    from engine.models import sharding
    from engine.models.bundle import save_model
    from engine.models.weights import weights_of

    spool = Spool(folder)
    keep = None if whole else spool.keep
    moments = sharding.gathered(optimizer.state_dict(), keep)
    live = weights_of(bundle.model, keep)
    spool.check()
    if rank == 0:
        store = checkpoint_toys.open_store(folder / "run", sync=False, copied=not whole)
        write = lambda place, tensors: save_model(bundle, place, state_dict=tensors)  # noqa: E731
        store.save(1, EngineState({}, None, moments, {}, {}, {}), weights=lambda: live, write_model=write)
        store.wait()


def measure(rank: int, folder: Path, whole: bool) -> dict[str, float]:
    import built
    import torch

    from engine.checkpoints.state_files import read_state
    from engine.models import sharding
    from engine.models.build import build_model
    from engine.models.weights import load_weights

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    figures: dict[str, float] = {}
    cpu, meta = torch.device("cpu"), torch.device("meta")
    build_model(built.recipe(folder / "model"), device=meta, precision="fp32")  # imports what it needs
    with peak(figures, "build"):
        place = cpu if whole or rank == 0 else meta
        bundle = build_model(built.recipe(folder / "model"), device=place, precision="fp32")
        model = bundle.model
        sharding.shard(model, cpu, param_dtype=None, cpu_offload=False, from_first=not whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    with peak(figures, "save"):
        save(rank, folder, whole, bundle, optimizer)
    torch.distributed.barrier()
    with peak(figures, "resume"):
        saved = folder / "run" / "checkpoint-1"
        load_weights(model, saved)
        moments = read_state(saved / "engine_state", "optimizer")
        optimizer.load_state_dict(sharding.parts_of_moments(optimizer, moments))
        del moments
    figures["part"] = sum(p.to_local().nbytes for p in model.parameters()) / 2**20
    figures["whole"] = sum(p.nbytes for p in model.parameters()) / 2**20
    torch.distributed.barrier()
    return figures


def main(folder: Path, whole: bool) -> int:
    import tiny

    if not (folder / "model").is_dir():
        tiny.model("llama", **SHAPE).bfloat16().save_pretrained(
            folder / "model"
        )  # read into float32: not mapped as it is
        tiny.tokenizer("llama").save_pretrained(folder / "model")
    pids = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            print(json.dumps({"rank": rank} | measure(rank, folder, whole)), flush=True)
            os._exit(0)
        pids.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] == ["whole"]))
