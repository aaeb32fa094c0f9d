"""Where runs are made to fail: forked training processes with a fault planned for one of them, and what they leave behind.

`fault_campaign.py` and `resume_matrix.py` are the programs; this is their common ground. A tiny model trains a dozen updates
in processes forked from one that has imported everything, so that an attempt takes seconds.
"""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

UPDATES, SAVE_EVERY, EVALUATE_EVERY = 12, 2, 3
TIMEOUT = 4  # seconds that a rank waits for another
PATIENCE = TIMEOUT + 10  # seconds within which the survivors of a killed rank must be gone
LONGEST = 120  # seconds after which a trial counts as hung
TIMING = {"tokens_per_second", "samples_per_second", "seconds", "peak_memory_gib"}


@dataclass(frozen=True)
class Setting:
    """What is trained: the model by its name here, and on how many ranks."""

    model: str  # "full", "full_adamw8bit", "adapter", "qlora"
    ranks: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


@dataclass(frozen=True)
class Plan:
    """What happens to one attempt, and to which rank.

    kind: "none"; "point": `action` at the `turn`-th passage of `point`; "time": `action` after `delay` seconds; "save":
    `action` `delay` seconds into the `turn`-th save; "site": an exception in the `turn`-th call of the function `point`.
    """

    kind: str = "none"
    action: str = "kill"  # kill, term, stop, ENOSPC, EIO, interrupt, error, memory
    victim: int = 0
    point: tuple[str, str] = ("", "")
    turn: int = 0
    delay: float = 0.0

    def __str__(self) -> str:
        at = f"at {'/'.join(self.point)} #{self.turn}"
        where = {"point": at, "site": at, "time": f"after {self.delay:.2f} s"}
        return (
            f"{self.action} of rank {self.victim} {where.get(self.kind, f'{self.delay:.3f} s into save {self.turn}')}"
        )


SITES = (
    ("engine.training.job", "Job.load_window"),
    ("engine.loss.cross_entropy", "summed_cross_entropy"),
    ("engine.evaluation.evaluate", "evaluate"),
    ("engine.checkpoints.store", "CheckpointStore._write_rank_files"),
)


class Lab:
    """Runs attempts in a working folder, and collects what should not have happened.

    Args:
        work: holds recipes, models and runs; see `write_inputs`.
        overrides: for every run.
    """

    def __init__(self, work: Path, overrides: Sequence[str] = ()) -> None:
        self.work, self.overrides = work, list(overrides)
        self.findings: list[str] = []

    def attempt(self, setting: Setting, run: Path, plan: Plan, resume: str = "auto") -> list[int]:
        """Run (or resume) once under a plan; returns the ranks' exit statuses (negative: ended by that signal)."""
        server, port = host_store() if setting.ranks > 1 else (None, 0)
        try:
            return self._attempt(setting, run, plan, port, resume)
        finally:
            if server is not None:
                os.kill(server, signal.SIGKILL)
                os.waitpid(server, 0)

    def _attempt(self, setting: Setting, run: Path, plan: Plan, port: int, resume: str) -> list[int]:
        log = run.with_suffix(".log")
        pids = []
        for rank in range(setting.ranks):
            pid = os.fork()
            if pid == 0:
                recipe = [str(self.work / f"{setting.model}.yaml"), *_overrides(setting, run), *self.overrides]
                become_rank(rank, setting, port, log, plan, run, [*recipe, "--resume", resume])
            pids.append(pid)
        statuses: list[int | None] = [None] * setting.ranks
        strike = self._strike(plan, run)
        began, struck = time.monotonic(), None
        while None in statuses:
            for rank, pid in enumerate(pids):
                if statuses[rank] is None:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    statuses[rank] = os.waitstatus_to_exitcode(status) if done else None
            now = time.monotonic()
            if struck is None and strike(now - began):
                struck = now
                self._hit(pids, statuses, plan)
            if statuses[plan.victim] is not None and struck is None and plan.kind == "point":
                struck = now
            if None in statuses and self._overdue(plan, now - began, struck and now - struck):
                self._give_up(pids, statuses, f"{setting}: {plan}: hung, see {log}")
            time.sleep(0.001)
        return statuses  # type: ignore[return-value]

    @staticmethod
    def _overdue(plan: Plan, elapsed: float, since_strike: float | None) -> bool:
        lethal = plan.action in ("kill", "stop")
        return elapsed > LONGEST or (lethal and since_strike is not None and since_strike > PATIENCE)

    def _give_up(self, pids: list[int], statuses: list[int | None], finding: str) -> None:
        self.findings.append(finding)
        for rank, pid in enumerate(pids):
            if statuses[rank] is None:
                os.kill(pid, signal.SIGABRT)  # every thread's place goes to the log
                time.sleep(2)
                os.kill(pid, signal.SIGKILL)
                statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _hit(self, pids: list[int], statuses: list[int | None], plan: Plan) -> None:
        signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
        if statuses[plan.victim] is None:
            os.kill(pids[plan.victim], signals[plan.action])
            if plan.action == "stop":
                self._outlive(pids, statuses, plan.victim)

    def _outlive(self, pids: list[int], statuses: list[int | None], frozen: int) -> None:
        """The others must end by themselves while one rank is frozen; then that one goes too."""
        other, deadline = 1 - frozen, time.monotonic() + PATIENCE
        while time.monotonic() < deadline and statuses[other] is None:
            done, status = os.waitpid(pids[other], os.WNOHANG)
            statuses[other] = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.01)
        if statuses[other] is None:
            self.findings.append(f"a rank did not notice within {PATIENCE} s that rank {frozen} is frozen")
            os.kill(pids[other], signal.SIGKILL)
        os.kill(pids[frozen], signal.SIGKILL)

    def _strike(self, plan: Plan, run: Path) -> Callable[[float], bool]:
        """Says, when asked again and again, whether the time to strike has come."""
        if plan.kind == "time":
            return lambda elapsed: elapsed >= plan.delay
        if plan.kind != "save":
            return lambda elapsed: False
        seen: dict[str, float] = {}
        left_behind = {name for name in names(run) if name.startswith(".tmp-")}  # by the kill before this one

        def inside_save(elapsed: float) -> bool:
            for name in names(run):
                if name.startswith(".tmp-checkpoint") and name not in left_behind:
                    seen.setdefault(name, elapsed)
            began = sorted(seen.values())
            return len(began) > plan.turn and elapsed - began[plan.turn] >= plan.delay

        return inside_save


def import_once() -> None:
    """Everything that a trial needs, so that none has to import it; and no pool of threads, which forks do not survive."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that this project keeps out
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    import engine.training.finish
    import engine.training.setup  # noqa: F401

    torch.set_num_threads(1)


def open_workplace(keep: str | None, prefix: str) -> Path:
    """The folder of all trials with their inputs, a temporary one unless `keep` names it; everything is imported."""
    import_once()
    work = Path(keep or tempfile.mkdtemp(prefix=prefix)).absolute()
    work.mkdir(parents=True, exist_ok=True)
    write_inputs(work)
    return work


# In the forked process


def host_store() -> tuple[int, int]:
    """A process that holds the ranks' key-value store, as a launcher's agent does: its pid and its port."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while True:
            signal.pause()
    os.close(writing)
    port = int(os.read(reading, 16))
    os.close(reading)
    return pid, port


def become_rank(
    rank: int, setting: Setting, port: int, log: Path, plan: Plan, run: Path, arguments: list[str]
) -> None:  # never returns
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        faulthandler.enable(2)
        if setting.ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setting.ranks))
            os.environ.update(LOCAL_WORLD_SIZE=str(setting.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        if plan.kind == "point" and plan.victim == rank:
            _install(plan, run.with_suffix(".points"))

        if plan.kind == "site" and plan.victim == rank:
            _break(plan)

        from engine.runtime.exits import main_guard
        from engine.train import main

        code = main_guard(lambda: main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _overrides(setting: Setting, run: Path) -> list[str]:
    chosen = [f"experiment.output_dir={run}", f"training.precision={setting.precision}"]
    if setting.precision == "fp16":
        chosen.append("runtime.emulate_fp16_on_cpu=true")
    return [*chosen, f"training.per_device_train_batch_size={4 // setting.ranks}"]


def _install(plan: Plan, record: Path) -> None:
    from engine.runtime import atomic

    passed = Counter()

    def meet(point: str, path: Path) -> None:
        if plan.action == "record":
            with record.open("a") as handle:
                handle.write(json.dumps([point, path.name, time.monotonic()]) + "\n")
            return
        key = (point, stable(path.name))
        passed[key] += 1
        if key == plan.point and passed[key] > plan.turn:
            _act(plan.action)

    atomic.fail_points.append(meet)


def _break(plan: Plan) -> None:
    """Let the `turn`-th call of a function of the engine raise."""
    from importlib import import_module

    import torch

    module, name = plan.point
    owner = import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name.split(".")[-1]), iter(range(1_000_000))
    error = ValueError("injected") if plan.action == "error" else torch.OutOfMemoryError("injected")

    def broken(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == plan.turn:
            raise error
        return original(*arguments, **settings)

    setattr(owner, name.split(".")[-1], broken)


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "interrupt":
        raise KeyboardInterrupt
    raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)))


def stable(name: str) -> str:
    """A name without what differs from save to save."""
    return name.split("checkpoint-")[0] + "checkpoint" if "checkpoint-" in name else name


# Reading a run folder


def names(run: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(run)}
    except FileNotFoundError:
        return set()


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_whole(folder: Path) -> bool:
    """The contract's check, written apart from the engine's own."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        there = tree(folder)
        del there["manifest.json"]
        return there == {name: entry["sha256"] for name, entry in files.items()}
    except (OSError, ValueError, KeyError):
        return False


def read_rows(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def read_weights(run: Path) -> str:
    """Hashes of the final model and of the last checkpoint's weights and optimizer."""
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("final_model/*.safetensors")
    }
    last = run / f"checkpoint-{UPDATES}"
    hashes |= {f"last/{name}": digest for name, digest in tree(last).items() if name.endswith(".safetensors")}
    return json.dumps(hashes, sort_keys=True)


def size(run: Path) -> int:
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and path.name != "train.log")


def told(run: Path) -> int:
    """How often the log of a run's output tells an injected error in its one line."""
    log = run.with_suffix(".log")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return sum("error E" in line and "injected" in line for line in lines)


def read(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


# Data and models


RECIPE = """
experiment: {{name: campaign, output_root: {work}}}
model: {{name_or_path: {work}/{folder}, dropout: 0.1}}
tokenizer: {{added_tokens: []}}
data: {{train_file: {work}/train.csv, validation_file: {work}/dev.csv, max_source_length: 48, max_target_length: 16,
       allow_overlap: true}}
training: {{max_steps: {updates}, gradient_accumulation_steps: 2, learning_rate: 1e-3, warmup_steps: 3, logging_steps: 1,
           early_stopping_patience: 50}}
evaluation: {{strategy: steps, steps: {evaluate}, metric: loss, generate: false}}
checkpoint: {{strategy: steps, steps: {save}, save_total_limit: 2}}
tracking: {{report_to: [], progress: false}}
runtime: {{device: cpu, timeout_seconds: {timeout}, num_threads: 1}}
"""
LORA = "lora: {enabled: true, r: 4, dropout: 0.1}\n"
MODELS = {
    "seq2seq": "{model_type: bart, d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32, max_position_embeddings: 128}",
    "causal": "{model_type: llama, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 256}",
}


def write_inputs(work: Path) -> None:
    """The rows, the base models and the recipes of the campaign, made by the engine itself in a forked process."""
    import csv

    source = ROOT / "recipes" / "quickstart" / "train.csv"
    with source.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))[:30]
    for name, part in (("train", rows[:26]), ("dev", rows[26:])):
        with (work / f"{name}.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(part)
    common = {"work": work, "updates": UPDATES, "evaluate": EVALUATE_EVERY, "save": SAVE_EVERY, "timeout": TIMEOUT}
    plain = RECIPE.format(folder="seq2seq", **common)
    (work / "full.yaml").write_text(plain)
    (work / "full_adamw8bit.yaml").write_text(plain.replace("training: {", "training: {optim: adamw_8bit, "))
    (work / "adapter.yaml").write_text(plain.replace("/seq2seq", "/causal") + LORA)
    (work / "qlora.yaml").write_text(
        plain.replace("/seq2seq", "/causal") + LORA + "quantization: {load_in_4bit: true}\n"
    )
    for folder, config in MODELS.items():
        text = plain.replace(f"name_or_path: {work}/seq2seq", f"init: random, config: {config}")
        text = text.replace("added_tokens: []", "added_tokens: [], train_vocab_size: 700")
        (work / f"make-{folder}.yaml").write_text(text)
        pid = os.fork()
        if pid == 0:
            _make_model(work, folder)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"could not build the {folder} model")


def _make_model(work: Path, folder: str) -> None:  # never returns
    code = 1
    try:
        from engine.models.build import build_model
        from engine.models.bundle import save_model
        from engine.recipe.load import load_recipe
        from engine.runtime.process import start

        recipe = load_recipe(work / f"make-{folder}.yaml")
        with start(recipe) as runtime:
            bundle = build_model(recipe, device=runtime.device, precision="fp32")
            save_model(bundle, work / folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
