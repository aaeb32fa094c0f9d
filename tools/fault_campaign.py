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
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fault_lab
from fault_lab import Lab, Plan, Setting

_IO = ("ENOSPC", "EIO")
_RAISED = {"error": 1, "memory": 8}  # exit codes
_ALLOWED = {  # exit statuses of the ranks, negative where a signal ended one
    "kill": {-signal.SIGKILL, 9, 0},
    "stop": {-signal.SIGKILL, 9, 0},
    "term": {75, 76, 0, -signal.SIGTERM},  # 76 and the bare signal: before the first update
    "interrupt": {76, 1},
    **{action: {code} for action, code in _RAISED.items()},  # the same code on every rank
    **{action: {6} for action in _IO},
}
_COUNTED = {
    "kill": "kills",
    "term": "stops",
    "stop": "freezes",
    "interrupt": "interrupts",
    "record": "records",
    "none": "?",
}
_COUNTED |= dict.fromkeys(_IO, "I/O errors") | dict.fromkeys(_RAISED, "errors of one rank")


@dataclass
class Reference:
    """An uninterrupted run: what it logged, how long it took, and what it passed through."""

    rows: list[dict[str, Any]]
    weights: str
    names: set[str]
    best: int
    size: int
    seconds: float
    save_seconds: float
    points: list[tuple[str, str]] = field(default_factory=list)


class Campaign:
    """Counts of all trials, on top of the lab's findings."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.work, self.findings = lab, lab.work, lab.findings
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.references: dict[Setting, Reference] = {}
        self.limit: int | None = None  # most points of a save tried for each setting and fault

    def through(self, setting: Setting, plans: list[Plan], name: str, length: int = 4) -> None:
        """All faults of one setting, a few to each run: a run is killed, resumed, killed again, and so on.

        A plan that did not strike, because the run had ended before, gets another run and an earlier turn.
        """
        self.random.shuffle(plans)
        queue = [(plan, 0) for plan in plans]
        for number in range(1_000_000):
            if not queue:
                return
            chain, queue = queue[:length], queue[length:]
            struck = self.trial(setting, [plan for plan, _ in chain], f"{name}-{number}")
            missed = [entry for entry, hit in zip(chain, struck, strict=True) if not hit]
            queue += [(self._sooner(setting, plan), tries + 1) for plan, tries in missed if tries < 5]
            never = [plan for plan, tries in missed if tries >= 5]
            self.counts["faults that never struck"] += len(never)
            for plan in never:
                print(f"never struck: {setting}: {plan}", flush=True)

    def _sooner(self, setting: Setting, plan: Plan) -> Plan:
        if plan.kind in ("point", "site"):
            return replace(plan, turn=0)
        delay = self.random.uniform(0, 1.2 * self.references[setting].save_seconds)
        return Plan("save", plan.action, plan.victim, turn=0, delay=delay)

    def trial(self, setting: Setting, plans: list[Plan], name: str) -> list[bool]:
        """Train to the end through the given faults, checking after each; compare with the reference.

        Returns which of the plans struck.
        """
        run, before = self.work / "runs" / name, len(self.findings)
        run.parent.mkdir(exist_ok=True)
        self.counts["runs"] += 1
        struck, valid, after_the_end = [False] * len(plans), False, False
        for index, plan in enumerate(plans):
            struck[index], valid = self._endure(setting, run, plan, valid)
            done = fault_lab.read(run / "run_status.json").get("code") == 0
            if done or len(self.findings) > before:
                after_the_end = done and struck[index]
                break
        else:
            statuses = self.lab.attempt(setting, run, Plan())
            self.counts["resumes"] += valid
            if any(statuses):
                self.findings.append(f"{setting}: the last resume ended with {statuses}, see {run.with_suffix('.log')}")
        self._compare(setting, run, after_the_end)
        if len(self.findings) == before:
            shutil.rmtree(run)
            run.with_suffix(".log").unlink()
        return struck

    def _endure(self, setting: Setting, run: Path, plan: Plan, valid: bool) -> tuple[bool, bool]:
        """One attempt under one fault, and what it left: whether it struck, whether a valid checkpoint is there."""
        old = {path.name: fault_lab.tree(path) for path in run.glob("checkpoint-*")} if plan.action in _IO else {}
        told = fault_lab.told(run)
        self.counts["resumes"] += valid
        statuses = self.lab.attempt(setting, run, plan)
        told = fault_lab.told(run) - told
        if plan.action in _RAISED and any(statuses) and told != 1:
            self.findings.append(f"{setting}: {plan}: told {told} times, see {run.with_suffix('.log')}")
        self._judge(setting, run, plan, statuses, old)
        still_valid = self._verify(setting, run, plan)
        if valid and not still_valid:
            self.counts["runs without a valid checkpoint"] += 1
            self.findings.append(f"{setting}: {plan}: no valid checkpoint left in {run}")
        return any(statuses), still_valid

    def _judge(self, setting: Setting, run: Path, plan: Plan, statuses: list[int], old: dict[str, Any]) -> None:
        """Exit codes of everyone, as they left them in the status files and as the parent saw them."""
        if not any(statuses):
            return
        self.counts[_COUNTED[plan.action]] += 1
        if plan.action in ("kill", "stop"):
            self.counts[f"{_COUNTED[plan.action]}: {setting.model}, rank {plan.victim} of {setting.ranks}"] += 1
        if not set(statuses) <= _ALLOWED[plan.action]:
            self.findings.append(f"{setting}: {plan}: exit codes {statuses}, see {run.with_suffix('.log')}")
        changed = [name for name in old if (run / name).is_dir() and fault_lab.tree(run / name) != old[name]]
        self.findings += [f"{setting}: {plan}: {name} was changed" for name in changed]

    def _verify(self, setting: Setting, run: Path, plan: Plan) -> bool:
        """Every final name must hold a whole checkpoint; at most one unfinished save may lie about."""
        names = fault_lab.names(run)
        whole = [fault_lab.is_whole(run / name) for name in names if name.startswith("checkpoint-")]
        if not all(whole):
            self.findings.append(f"{setting}: {plan}: an incomplete checkpoint has a final name in {run}")
        unfinished = [name for name in names if name.startswith((".tmp-", ".trash-"))]
        if len(unfinished) > 2:
            self.counts["leftovers"] += 1
            self.findings.append(f"{setting}: {plan}: leftovers pile up: {unfinished}")
        return any(whole)

    def _compare(self, setting: Setting, run: Path, after_the_end: bool) -> None:
        """Bit for bit: every row of the log, the final weights, and the names in the folder.

        A kill after the run was done may come before the lock's file is removed; the lock itself, the kernel's, is gone.
        """
        reference = self.references[setting]
        rows, problems = fault_lab.read_rows(run), []
        if rows != reference.rows:
            first = next((a for a, b in zip(rows, reference.rows, strict=False) if a != b), f"{len(rows)} rows")
            problems.append(f"logged rows differ: {first}")
        if fault_lab.read_weights(run) != reference.weights:
            problems.append("final weights differ")
        if problems:
            self.counts["mismatches"] += 1
        names = {name for name in fault_lab.names(run) if not name.startswith("run_status.rank")}
        names -= {".lock", ".lock.json"} if after_the_end else set()
        saved, expected = ({n for n in some if n.startswith("checkpoint-")} for some in (names, reference.names))
        if names - saved != reference.names - expected or len(saved) > len(expected):
            self.counts["leftovers"] += 1
            problems.append(f"names differ: {sorted(names ^ reference.names)}")
        # A stop saves at a step of its own, which then counts among the latest two; the last and the best are always there.
        best = fault_lab.read(run / "best.json").get("step")
        if not {f"checkpoint-{fault_lab.UPDATES}", f"checkpoint-{best}"} <= saved or best != reference.best:
            problems.append(f"best is {best}, saved are {sorted(saved)}")
        if fault_lab.size(run) > 1.2 * reference.size:
            problems.append("the folder has grown")
        self.findings += [f"{setting}: {problem} in {run}" for problem in problems]

    # The reference, and the plans

    def prepare(self, setting: Setting) -> None:
        """The uninterrupted run, once; its timing and its points shape the plans."""
        name = f"reference-{setting.model}-{setting.precision}-{setting.ranks}"
        run = self.work / name
        began = time.monotonic()
        if any(statuses := self.lab.attempt(setting, run, Plan("point", "record"))):
            sys.exit(f"the uninterrupted run of {setting} ended with {statuses}; see {run.with_suffix('.log')}")
        seconds = time.monotonic() - began
        lines = (self.work / f"{name}.points").read_text().splitlines()
        record = [json.loads(line) for line in lines]
        begins = [entry[2] for entry in record if entry[0] == "temp-made"]
        ends = [entry[2] for entry in record if entry[0] == "after-best"]
        save_seconds = sorted(end - begin for begin, end in zip(begins, ends, strict=False))[len(ends) // 2]
        points = sorted({(point, fault_lab.stable(file)) for point, file, _ in record})
        facts = {"names": fault_lab.names(run) - {"run_status.rank1.json"}, "size": fault_lab.size(run)}
        facts["best"] = fault_lab.read(run / "best.json")["step"]
        self.references[setting] = Reference(fault_lab.read_rows(run), fault_lab.read_weights(run), **facts, seconds=seconds,
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


# The whole campaign


def kills(campaign: Campaign, settings: list[Setting], trials: int) -> None:
    """`trials` kills at random instants and one at every point, spread evenly over settings and victims."""
    corners = [(setting, victim) for setting in settings for victim in range(setting.ranks)]
    share = -(-trials // len(corners))
    for setting, victim in corners:
        plans = [campaign.random_plan(setting, victim) for _ in range(share)]
        plans += campaign.some(list(campaign.point_plans(setting, "kill", victim)))
        campaign.through(setting, plans, f"kill-{setting.model}-{setting.ranks}-{victim}")
        print(f"kills of rank {victim}, {setting}: {dict(campaign.counts)}", flush=True)


def faults(campaign: Campaign, settings: list[Setting], stops: int) -> None:
    """I/O errors and interrupts at every point, stops at random instants, frozen ranks, and errors of one rank."""
    for setting in settings:
        name = f"{setting.model}-{setting.ranks}"
        for action in (*_IO, "interrupt"):
            plans = [plan for plan in campaign.point_plans(setting, action) if "trash" not in plan.point[0]]
            campaign.through(setting, campaign.some(plans), f"{action}-{name}", 3)
        plans = [campaign.random_plan(setting, index % setting.ranks, "term") for index in range(stops)]
        campaign.through(setting, plans, f"term-{name}", 3)
        if setting.ranks > 1:
            plans = [campaign.random_plan(setting, index % 2, "stop") for index in range(-(-stops // 2))]
            campaign.through(setting, plans, f"stop-{name}", 3)
        plans = [
            Plan("site", action, victim, site, campaign.random.randrange(3))
            for site in fault_lab.SITES
            for action in _RAISED
            for victim in range(setting.ranks)
        ]
        campaign.through(setting, campaign.some(plans), f"error-{name}")
        print(f"faults, {setting}: {dict(campaign.counts)}", flush=True)


def report(campaign: Campaign, seconds: float) -> int:
    for name in ("runs", "kills", "freezes", "stops", "I/O errors", "interrupts", "errors of one rank", "resumes"):
        print(f"{name:>36}: {campaign.counts[name]}")
    for name in sorted(campaign.counts):
        if ": " in name:
            print(f"{name:>36}: {campaign.counts[name]}")
    for name in ("faults that never struck", "mismatches", "runs without a valid checkpoint", "leftovers"):
        print(f"{name:>36}: {campaign.counts[name]}")
    print(f"{'findings':>36}: {len(campaign.findings)}")
    print(f"{'minutes':>36}: {seconds / 60:.1f}")
    for finding in campaign.findings:
        print(f"FINDING {finding}")
    return int(bool(campaign.findings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="kills at random instants, beside one at every point")
    parser.add_argument("--stops", type=int, default=12, help="SIGTERM trials of each setting (half as many freezes)")
    parser.add_argument("--points", type=int, help="try only so many points of a save for each setting and fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["full", "adapter"], choices=["full", "adapter", "qlora"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE",
                        help="for every run, such as distributed.strategy=fsdp")  # fmt: skip
    parser.add_argument("--keep", metavar="FOLDER", help="work there and keep the runs with findings")
    options = parser.parse_args()

    began = time.monotonic()
    work = fault_lab.open_workplace(options.keep, "faults-")
    print(f"seed {options.seed}, {options.trials} random kills, in {work}", flush=True)
    campaign = Campaign(Lab(work, options.overrides), options.seed)
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
