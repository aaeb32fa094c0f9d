#!/usr/bin/env python3
"""Say what the QLoRA quickstart learnt: dev scores of base and adapter side by side, and whether summaries stay the same.

python tools/quickstart_qlora_report.py BASE_RUN QLORA_RUN [--references test.csv] [--predictions NAME FILE.csv]...

The first predictions are those that the others are held against.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

METRICS = ("rouge1", "rouge2", "rougeL", "rouge_mean")


def dev_evaluations(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["split"] == "dev" and "rouge_mean" in row]


def best(run: Path) -> dict:
    """Scores of the evaluation whose weights are in final_model."""
    step = json.loads((run / "best.json").read_text(encoding="utf-8"))["step"]
    return next(row for row in dev_evaluations(run) if row["step"] == step)


def texts(path: Path) -> dict[str, str]:
    """Summaries by id, whatever the file calls them."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return {
            row.get("id") or row["fname"]: row.get("prediction") or row["summary"] for row in csv.DictReader(stream)
        }


def agreement(one: Path, other: Path) -> tuple[int, int]:
    """(rows with the same text, rows)."""
    first, second = texts(one), texts(other)
    if first.keys() != second.keys():
        raise ValueError(f"{one} and {other} are predictions of different rows")
    return sum(first[key] == second[key] for key in first), len(first)


def report(base: Path, qlora: Path, predictions: list[tuple[str, Path]], references: Path) -> list[str]:
    from engine.scoring import rouge

    tokenizer = best(base)["rouge_tokenizer"]
    lines = [
        f"Dev scores (F1 x 100, tokens: {best(base)['rouge_tokenizer_version']})",
        "model      step   ROUGE-1  ROUGE-2  ROUGE-L     mean",
    ]
    for name, run in (("base", base), ("QLoRA", qlora)):
        chosen = best(run)["step"]
        for row in dev_evaluations(run):
            scores = "".join(f"{row[key]:9.2f}" for key in METRICS)
            lines.append(f"{name:6s} {row['step']:8d} {scores}{'  <- best' if row['step'] == chosen else ''}")
    gain = best(qlora)["rouge_mean"] - best(base)["rouge_mean"]
    lines.append(f"QLoRA's best mean is {abs(gain):.2f} {'above' if gain > 0 else 'BELOW'} its base's.")
    if predictions:
        wanted, first = texts(references), predictions[0]
        lines += ["", f"Test summaries{'':30s}    mean   same as {first[0]}"]
    for name, file in predictions:
        found = texts(file)
        mean = rouge.rouge([found[key] for key in wanted], list(wanted.values()), tokenizer)["rouge_mean"]
        same, rows = agreement(first[1], file)
        lines.append(f"  {name:42s} {mean:7.2f}   {same} of {rows}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a base run with the QLoRA run on top of it.")
    parser.add_argument("base", type=Path, metavar="BASE_RUN")
    parser.add_argument("qlora", type=Path, metavar="QLORA_RUN")
    parser.add_argument("--references", type=Path, default=ROOT / "recipes" / "quickstart" / "test.csv", metavar="CSV")
    parser.add_argument(
        "--predictions",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "CSV"),
        help="may be given several times",
    )
    options = parser.parse_args()
    predictions = [(name, Path(file)) for name, file in options.predictions]
    print("\n".join(report(options.base, options.qlora, predictions, options.references)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
