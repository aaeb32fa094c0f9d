#!/usr/bin/env python3
"""Kill and fault campaign: prove that no training run is lost and that every resume is exact.

    python tools/fault_campaign.py [--trials N] [--seed S] [--ranks 1|2] [--keep FOLDER]

A tiny model trains a dozen updates over and over. Each run is killed (SIGKILL at a named point of a save, at a random
instant, or at a random instant of a save; on one rank, or on either of two), stopped (SIGTERM), frozen (SIGSTOP of one of
two ranks), its disk fails (ENOSPC or EIO at every point of a save), or one rank raises an error in data, update, evaluation
or save, then resumed with `--resume auto`, killed again, and
so on until it ends. After every kill all checkpoints are verified; at the end everything logged and the final weights must
equal an uninterrupted run bit for bit, and the folder must hold what that run's folder holds.

Processes are forked from one that has imported everything, so a trial takes seconds. Exits 1 on any finding.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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

    model: str  # "full", "adapter", "qlora"
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


@dataclass
class Reference:
    """An uninterrupted run: what it logged, how long it took, and what it passed through."""

    rows: list[dict[str, Any]]
    weights: str
    names: set[str]
    size: int
    seconds: float
    save_seconds: float
    points: list[tuple[str, str]] = field(default_factory=list)


class Campaign:
    """Counts and findings of all trials, in a working folder."""

    def __init__(self, work: Path, seed: int, overrides: Sequence[str] = ()) -> None:
        self.work, self.random, self.overrides = work, random.Random(seed), list(overrides)
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.references: dict[Setting, Reference] = {}
        self.limit: int | None = None  # most points of a save tried for each setting and fault

    # One attempt

    def attempt(self, setting: Setting, run: Path, plan: Plan, resume: str = "auto") -> list[int]:
        """Run (or resume) once under a plan; returns the ranks' exit statuses (negative: ended by that signal)."""
        server, port = _host_store() if setting.ranks > 1 else (None, 0)
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
                _become_rank(rank, setting, port, log, plan, run, [*recipe, "--resume", resume])
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

        def inside_save(elapsed: float) -> bool:
            for name in _names(run):
                if name.startswith(".tmp-checkpoint"):
                    seen.setdefault(name, elapsed)
            began = sorted(seen.values())
            return len(began) > plan.turn and elapsed - began[plan.turn] >= plan.delay

        return inside_save

    # One run: attempts until it ends

    def trial(self, setting: Setting, plans: Iterator[Plan], name: str) -> None:
        """Train to the end through the given faults, checking after each; compare with the reference."""
        run, ever_valid = self.work / "runs" / name, False
        run.parent.mkdir(exist_ok=True)
        self.counts["runs"] += 1
        before = len(self.findings)
        for attempt, plan in enumerate(plans):
            old = {path.name: _tree(path) for path in run.glob("checkpoint-*")} if plan.action in _IO else {}
            told = _told(run)
            statuses = self.attempt(setting, run, plan)
            if plan.action in _RAISED and any(statuses) and _told(run) - told != 1:
                self.findings.append(
                    f"{setting}: {plan}: told {_told(run) - told} times, see {run.with_suffix('.log')}"
                )
            self.counts["resumes"] += attempt > 0 and ever_valid
            self._judge(setting, run, plan, statuses, old)
            valid = self._verify(setting, run, plan)
            if ever_valid and not valid:
                self.counts["runs without a valid checkpoint"] += 1
                self.findings.append(f"{setting}: {plan}: no valid checkpoint left in {run}")
            ever_valid = ever_valid or valid
            if _status(run).get("code") == 0 or len(self.findings) > before:
                break
        else:
            statuses = self.attempt(setting, run, Plan())
            self.counts["resumes"] += ever_valid
            if any(statuses):
                self.findings.append(f"{setting}: the last resume ended with {statuses}, see {run.with_suffix('.log')}")
        self._compare(setting, run)
        if len(self.findings) == before:
            shutil.rmtree(run)
            run.with_suffix(".log").unlink()

    def _judge(self, setting: Setting, run: Path, plan: Plan, statuses: list[int], old: dict[str, Any]) -> None:
        """Exit codes of everyone, as they left them in the status files and as the parent saw them."""
        if not any(statuses):
            return
        self.counts[_COUNTED[plan.action]] += 1
        if plan.action in ("kill", "stop"):
            self.counts[f"{_COUNTED[plan.action]}: {setting.model}, rank {plan.victim} of {setting.ranks}"] += 1
            allowed = {-signal.SIGKILL, 9, 0}
        elif plan.action == "term":
            allowed = {75, 76, 0, -signal.SIGTERM}  # 76 and the bare signal: before the first update
        elif plan.action == "interrupt":
            allowed = {76, 1}
        elif plan.action in _RAISED:
            allowed = {_RAISED[plan.action]}  # the same code on every rank
        else:
            allowed = {6}
            for name, files in old.items():
                if (run / name).is_dir() and _tree(run / name) != files:
                    self.findings.append(f"{setting}: {plan}: {name} was changed")
        if not set(statuses) <= allowed:
            self.findings.append(f"{setting}: {plan}: exit codes {statuses}, see {run.with_suffix('.log')}")

    def _verify(self, setting: Setting, run: Path, plan: Plan) -> bool:
        """Every final name must hold a whole checkpoint; at most one unfinished save may lie about."""
        names = _names(run)
        whole = [_is_whole(run / name) for name in names if name.startswith("checkpoint-")]
        if not all(whole):
            self.findings.append(f"{setting}: {plan}: an incomplete checkpoint has a final name in {run}")
        unfinished = [name for name in names if name.startswith((".tmp-", ".trash-"))]
        if len(unfinished) > 2:
            self.counts["leftovers"] += 1
            self.findings.append(f"{setting}: {plan}: leftovers pile up: {unfinished}")
        return any(whole)

    def _compare(self, setting: Setting, run: Path) -> None:
        """Bit for bit: every row of the log, the final weights, and the names in the folder."""
        reference = self.references[setting]
        rows, problems = read_rows(run), []
        if rows != reference.rows:
            first = next((a for a, b in zip(rows, reference.rows, strict=False) if a != b), f"{len(rows)} rows")
            problems.append(f"logged rows differ: {first}")
        if read_weights(run) != reference.weights:
            problems.append("final weights differ")
        if problems:
            self.counts["mismatches"] += 1
        names = {name for name in _names(run) if not name.startswith("run_status.rank")}
        if names != reference.names:
            self.counts["leftovers"] += 1
            problems.append(f"names differ: {sorted(names ^ reference.names)}")
        if _size(run) > 1.2 * reference.size:
            problems.append("the folder has grown")
        self.findings += [f"{setting}: {problem} in {run}" for problem in problems]

    # The reference, and the plans

    def prepare(self, setting: Setting) -> None:
        """The uninterrupted run, once; its timing and its points shape the plans."""
        name = f"reference-{setting.model}-{setting.precision}-{setting.ranks}"
        run = self.work / name
        began = time.monotonic()
        if any(statuses := self.attempt(setting, run, Plan("point", "record"))):
            sys.exit(f"the uninterrupted run of {setting} ended with {statuses}; see {run.with_suffix('.log')}")
        seconds = time.monotonic() - began
        lines = (self.work / f"{name}.points").read_text().splitlines()
        record = [json.loads(line) for line in lines]
        begins = [entry[2] for entry in record if entry[0] == "temp-made"]
        ends = [entry[2] for entry in record if entry[0] == "after-best"]
        save_seconds = sorted(end - begin for begin, end in zip(begins, ends, strict=False))[len(ends) // 2]
        points = sorted({(point, _stable(file)) for point, file, _ in record})
        facts = {"names": _names(run) - {"run_status.rank1.json"}, "size": _size(run)}
        self.references[setting] = Reference(read_rows(run), read_weights(run), **facts, seconds=seconds,
                                             save_seconds=save_seconds, points=points)  # fmt: skip
        print(
            f"{setting}: {seconds:.1f} s uninterrupted, a save {save_seconds:.3f} s, {len(points)} points", flush=True
        )

    def random_plan(self, setting: Setting, victim: int, action: str = "kill") -> Plan:
        """A random instant: of the whole attempt, or of one of its saves."""
        reference = self.references[setting]
        if self.random.random() < 0.6:
            turn, delay = self.random.randrange(4), self.random.uniform(0, 1.2 * reference.save_seconds)
            return Plan("save", action, victim, turn=turn, delay=delay)
        return Plan("time", action, victim, delay=self.random.uniform(0.1, 1.0) * reference.seconds)

    def some(self, plans: list[Plan]) -> list[Plan]:
        """A random choice of so many, for a short campaign; all of them otherwise."""
        return plans if self.limit is None else self.random.sample(plans, min(self.limit, len(plans)))

    def point_plans(self, setting: Setting, action: str, victim: int = 0) -> Iterator[Plan]:
        """One plan for each point of a save, each at a random one of the saves."""
        points = self.references[setting].points
        if victim:
            points = [(point, file.replace("rank0", f"rank{victim}")) for point, file in points if "rng-rank0" in file]
        for point in points:
            yield Plan("point", action, victim, point, turn=self.random.randrange(3))


_IO = ("ENOSPC", "EIO")
_RAISED = {"error": 1, "memory": 8}  # exit codes
SITES = (("engine.job", "Job.load_window"), ("engine.losses", "summed_cross_entropy"), ("engine.validation", "evaluate"),
         ("engine.checkpoints", "CheckpointStore._write_rank_files"))  # fmt: skip
_COUNTED = {
    "kill": "kills",
    "term": "stops",
    "stop": "freezes",
    "interrupt": "interrupts",
    "record": "records",
    "none": "?",
}
_COUNTED |= dict.fromkeys(_IO, "I/O errors") | dict.fromkeys(_RAISED, "errors of one rank")


# In the forked process


def _host_store() -> tuple[int, int]:
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


def _become_rank(
    rank: int, setting: Setting, port: int, log: Path, plan: Plan, run: Path, arguments: list[str]
) -> None:  # never returns
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if setting.ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setting.ranks))
            os.environ.update(LOCAL_WORLD_SIZE=str(setting.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        if plan.kind == "point" and plan.victim == rank:
            _install(plan, run.with_suffix(".points"))

        if plan.kind == "site" and plan.victim == rank:
            _break(plan)

        from engine.outcomes import main_guard
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
    from engine import storage

    passed = Counter()

    def meet(point: str, path: Path) -> None:
        if plan.action == "record":
            with record.open("a") as handle:
                handle.write(json.dumps([point, path.name, time.monotonic()]) + "\n")
            return
        key = (point, _stable(path.name))
        passed[key] += 1
        if key == plan.point and passed[key] > plan.turn:
            _act(plan.action)

    storage.fail_points.append(meet)


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


def _stable(name: str) -> str:
    """A name without what differs from save to save."""
    return name.split("checkpoint-")[0] + "checkpoint" if "checkpoint-" in name else name


# Reading a run folder


def _names(run: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(run)}
    except FileNotFoundError:
        return set()


def _tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _is_whole(folder: Path) -> bool:
    """The contract's check, written apart from the engine's own."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        there = _tree(folder)
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
    hashes |= {f"last/{name}": digest for name, digest in _tree(last).items() if name.endswith(".safetensors")}
    return json.dumps(hashes, sort_keys=True)


def _size(run: Path) -> int:
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and path.name != "train.log")


def _told(run: Path) -> int:
    """How often the log of a run's output tells an injected error in its one line."""
    log = run.with_suffix(".log")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return sum("error E" in line and "injected" in line for line in lines)


def _status(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "run_status.json").read_text())
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
        from engine import models
        from engine.recipe_reader import load_recipe
        from engine.runtime import start

        recipe = load_recipe(work / f"make-{folder}.yaml")
        with start(recipe) as runtime:
            bundle = models.build(recipe, device=runtime.device, precision="fp32")
            models.save_model(bundle, work / folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# The whole campaign


def chains(campaign: Campaign, setting: Setting, plans: list[Plan], length: int) -> Iterator[list[Plan]]:
    """Faults of one setting, a few to each run: a run is killed, resumed, killed again, ..."""
    campaign.random.shuffle(plans)
    for index in range(0, len(plans), length):
        yield plans[index : index + length]


def kills(campaign: Campaign, settings: list[Setting], trials: int) -> None:
    """`trials` kills at random instants and one at every point, spread evenly over settings and victims."""
    corners = [(setting, victim) for setting in settings for victim in range(setting.ranks)]
    share = -(-trials // len(corners))
    for setting, victim in corners:
        plans = [campaign.random_plan(setting, victim) for _ in range(share)]
        plans += campaign.some(list(campaign.point_plans(setting, "kill", victim)))
        for index, chain in enumerate(chains(campaign, setting, plans, 4)):
            campaign.trial(setting, iter(chain), f"kill-{setting.model}-{setting.ranks}-{victim}-{index}")
        print(f"kills of rank {victim}, {setting}: {dict(campaign.counts)}", flush=True)


def faults(campaign: Campaign, settings: list[Setting], stops: int) -> None:
    """I/O errors and interrupts at every point, stops at random instants, and frozen ranks."""
    for setting in settings:
        for action in ("ENOSPC", "EIO", "interrupt"):
            plans = campaign.some([p for p in campaign.point_plans(setting, action) if "trash" not in p.point[0]])
            for index, chain in enumerate(chains(campaign, setting, plans, 3)):
                campaign.trial(setting, iter(chain), f"{action}-{setting.model}-{setting.ranks}-{index}")
        for index in range(stops):
            victim = campaign.random.randrange(setting.ranks)
            plans = [campaign.random_plan(setting, victim, "term") for _ in range(2)]
            campaign.trial(setting, iter(plans), f"term-{setting.model}-{setting.ranks}-{index}")
        for victim in range(setting.ranks if setting.ranks > 1 else 0):
            plans = [campaign.random_plan(setting, victim, "stop") for _ in range(max(1, stops // 3))]
            campaign.trial(setting, iter(plans), f"stop-{setting.model}-{victim}")
        for victim in range(setting.ranks):
            plans = [
                Plan("site", action, victim, site, campaign.random.randrange(3)) for site in SITES for action in _RAISED
            ]
            for index, chain in enumerate(chains(campaign, setting, campaign.some(plans), 4)):
                campaign.trial(setting, iter(chain), f"error-{setting.model}-{setting.ranks}-{victim}-{index}")
        print(f"faults, {setting}: {dict(campaign.counts)}", flush=True)


def report(campaign: Campaign, seconds: float) -> int:
    for name in ("runs", "kills", "freezes", "stops", "I/O errors", "interrupts", "errors of one rank", "resumes"):
        print(f"{name:>36}: {campaign.counts[name]}")
    for name in sorted(campaign.counts):
        if ": " in name:
            print(f"{name:>36}: {campaign.counts[name]}")
    for name in ("mismatches", "runs without a valid checkpoint", "leftovers"):
        print(f"{name:>36}: {campaign.counts[name]}")
    print(f"{'findings':>36}: {len(campaign.findings)}")
    print(f"{'minutes':>36}: {seconds / 60:.1f}")
    for finding in campaign.findings:
        print(f"FINDING {finding}")
    return int(bool(campaign.findings))


def import_once() -> None:
    """Everything that a trial needs, so that none has to import it; and no pool of threads, which forks do not survive."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    import engine.assembly
    import engine.results  # noqa: F401

    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=240, help="kills at random instants, beside one at every point")
    parser.add_argument("--stops", type=int, default=6, help="SIGTERM trials of each setting (a third as many freezes)")
    parser.add_argument("--points", type=int, help="try only so many points of a save for each setting and fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["full", "adapter"], choices=["full", "adapter", "qlora"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--keep", metavar="FOLDER", help="work there and keep the runs with findings")
    options = parser.parse_args()

    import_once()
    began = time.monotonic()
    work = Path(options.keep or tempfile.mkdtemp(prefix="faults-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, {options.trials} random kills, in {work}", flush=True)
    write_inputs(work)
    campaign = Campaign(work, options.seed)
    campaign.limit = options.points
    settings = [Setting(model, ranks) for model in options.models for ranks in options.ranks]
    for setting in settings:
        campaign.prepare(setting)
    kills(campaign, settings, options.trials)
    faults(campaign, settings, options.stops)
    code = report(campaign, time.monotonic() - began)
    if code == 0 and not options.keep:
        shutil.rmtree(work)
    return code


if __name__ == "__main__":
    sys.exit(main())
