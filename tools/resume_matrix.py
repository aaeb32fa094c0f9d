#!/usr/bin/env python3
"""Resume matrix: from every update of a dozen, the rest of the run must equal the uninterrupted one bit for bit.

    python tools/resume_matrix.py [--every N] [--models full adapter qlora] [--ranks 1 2] [--precisions fp32 fp16]

Each setting trains once with a checkpoint after every update (short last windows, epoch ends and evaluations included).
Then the folder is copied and resumed from `checkpoint-<k>` for each k; losses, gradient norms, learning rates, loss scales,
hashes of sample ids, evaluations, final weights and optimizer states are compared. fp16 runs on the CPU with a real loss
scaler. Exits 1 on any difference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time

import fault_lab
from fault_lab import UPDATES, Lab, Plan, Setting

EVERY_UPDATE = ["checkpoint.steps=1", "checkpoint.save_total_limit=null", "evaluation.steps=5"]


def check(lab: Lab, setting: Setting, every: int) -> list[str]:
    """Resume one setting from each `every`-th update; returns the differences found."""
    reference = lab.work / f"matrix-{setting.model}-{setting.precision}-{setting.ranks}"
    if any(statuses := lab.attempt(setting, reference, Plan())):
        return [f"{setting}: the uninterrupted run ended with {statuses}, see {reference.with_suffix('.log')}"]
    findings, rows = [], fault_lab.read_rows(reference)
    skipped = max(row.get("skipped_updates", 0) for row in rows)
    for step in range(1, UPDATES, every):
        run = lab.work / f"{reference.name}-from-{step}"
        shutil.copytree(reference, run)
        # What the run had not yet done when it stood at this update
        shutil.rmtree(run / "final_model")
        for name in ("run_status.json", "results.json"):
            (run / name).unlink()
        statuses = lab.attempt(setting, run, Plan(), resume=str(run / f"checkpoint-{step}"))
        problems = [f"ended with {statuses}, see {run.with_suffix('.log')}"] if any(statuses) else []
        if not problems and fault_lab.read_rows(run) != rows:
            problems.append("logged rows differ")
        if not problems and fault_lab.read_weights(run) != fault_lab.read_weights(reference):
            problems.append("final weights or optimizer states differ")
        findings += [f"{setting}: resumed at update {step}: {problem} in {run}" for problem in problems]
        if not problems:
            shutil.rmtree(run)
            run.with_suffix(".log").unlink()
    print(f"{setting}: {len(range(1, UPDATES, every))} resumes, {len(findings)} different, "
          f"{skipped} skipped updates", flush=True)  # fmt: skip
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="resume from every N-th update only")
    parser.add_argument("--models", nargs="+", default=["full", "full_adamw8bit", "adapter", "qlora"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE",
                        help="for every run, such as distributed.strategy=fsdp")  # fmt: skip
    parser.add_argument("--keep", metavar="FOLDER", help="work there and keep the runs with findings")
    options = parser.parse_args()
    began = time.monotonic()
    work = fault_lab.open_workplace(options.keep, "matrix-")
    lab = Lab(work, [*EVERY_UPDATE, *options.overrides])
    findings = []
    for model in options.models:
        for precision in options.precisions:
            for ranks in options.ranks:
                findings += check(lab, Setting(model, ranks, precision), options.every)
    findings += lab.findings
    for finding in findings:
        print(f"FINDING {finding}")
    print(f"{len(findings)} findings in {(time.monotonic() - began) / 60:.1f} minutes")
    if not findings and not options.keep:
        shutil.rmtree(work)
    return int(bool(findings))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
