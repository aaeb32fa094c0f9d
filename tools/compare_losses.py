#!/usr/bin/env python3
"""Are the numbers of two runs the same to the bit? Compares what `metrics.jsonl` says at every step; exits 1 where it differs.

    python tools/compare_losses.py RUN RUN

Losses, gradient norms, learning rates and scores count; times and speeds do not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MEASURED = ("seconds", "_per_second", "memory", "_share")  # of the machine, not of the training


def rows_of(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows by split and step, without what a clock or a memory counter said."""
    rows = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kept = {key: value for key, value in row.items() if not any(part in key for part in MEASURED)}
        rows[(row["split"], row["step"])] = kept
    return rows


def differences(first: Path, second: Path) -> list[str]:
    """One line for each row that only one run has, and for each number that differs."""
    old, new = rows_of(first), rows_of(second)
    lines = [f"{split} {step}: only in one of the runs" for split, step in sorted(old.keys() ^ new.keys())]
    for place in sorted(old.keys() & new.keys()):
        for key in sorted(old[place].keys() | new[place].keys()):
            if old[place].get(key) != new[place].get(key):
                lines.append(f"{place[0]} {place[1]}: {key} {old[place].get(key)} -> {new[place].get(key)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="a run folder")
    options = parser.parse_args()
    found = differences(*options.runs)
    print("\n".join(found) if found else f"equal to the bit: {len(rows_of(options.runs[0]))} rows")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
