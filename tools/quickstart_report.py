#!/usr/bin/env python3
"""Say what a finished quickstart run learnt: scores by evaluation, the lead-2 baseline, facts kept, a few summaries.

python tools/quickstart_report.py RUN_DIR [--data recipes/quickstart]
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

SAMPLES = 3


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def first_turns(dialogue: str, turns: int = 2) -> str:
    """The first turns as they stand, speakers' names included."""
    return "\n".join(dialogue.splitlines()[:turns])


def dev_evaluations(run: Path) -> list[dict]:
    rows = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    return [row for row in rows if row["split"] == "dev" and "rouge_mean" in row]


def report(run: Path, data: Path) -> list[str]:
    from engine.scoring import rouge
    from engine.scoring.baselines import fact_share, lead_baseline

    evaluations = dev_evaluations(run)
    best_step = json.loads((run / "best.json").read_text(encoding="utf-8"))["step"]
    best = next(row for row in evaluations if row["step"] == best_step)
    tokenizer = best["rouge_tokenizer"]

    lines = [
        f"Dev scores (F1 x 100, tokens: {best['rouge_tokenizer_version']})",
        "    step   ROUGE-1  ROUGE-2  ROUGE-L     mean",
    ]
    for row in evaluations:
        scores = "".join(f"{row[key]:9.2f}" for key in ("rouge1", "rouge2", "rougeL", "rouge_mean"))
        lines.append(f"{row['step']:8d} {scores}{'  <- best' if row is best else ''}")

    dev = read_csv(run / "predictions" / f"dev-step{best_step}.csv")
    references = [row["reference"] for row in dev]
    lines += ["", "The first two turns as the summary (same split, same scorer)"]
    baselines = {"speakers kept": first_turns, "speakers removed": lead_baseline}
    for name, baseline in baselines.items():
        mean = rouge.rouge([baseline(row["dialogue"]) for row in dev], references, tokenizer)["rouge_mean"]
        lines.append(f"  {name:17s} mean {mean:6.2f}   the model has {best['rouge_mean'] / mean:.2f} times that")

    facts = {row["fname"]: row["facts"].split("|") for row in read_csv(data / "dev.csv")}
    share = fact_share([row["prediction"] for row in dev], [facts[row["id"]] for row in dev])
    lines += ["", f"Facts kept right in the best dev summaries: {100 * share:.1f} %"]

    tests = sorted((run / "predictions").glob("test-step*.csv"), key=lambda path: path.stat().st_mtime)
    for row in read_csv(tests[-1])[:SAMPLES] if tests else []:
        lines += [
            "",
            row["dialogue"],
            f"  reference:  {row.get('reference', '')}",
            f"  prediction: {row['prediction']}",
        ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Summarise a finished quickstart run.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "recipes" / "quickstart", help="folder with dev.csv and its facts"
    )
    arguments = parser.parse_args()
    try:
        lines = report(arguments.run, arguments.data)
    except (OSError, StopIteration, KeyError, ValueError) as error:
        print(f"no report for {arguments.run}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
