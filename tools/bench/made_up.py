"""Dialogues and a tokenizer for benchmarks on machines without real ones: the quickstart's dialogues, two at a time.

Alone they have 94 of KoBART's tokens on average; real ones have 197, and pairs come close.
"""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "train.csv"
COLUMNS = ("fname", "dialogue", "summary")


def write(folder: Path, count: int | None = None) -> tuple[Path, Path]:
    """A CSV of `count` pairs of dialogues (None: 2,000) with both their summaries, and the folder of a tokenizer of theirs."""
    from engine.data.vocabulary import train_tokenizer

    with SOURCE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    pairs = zip(rows, itertools.islice(itertools.cycle(rows), 7, None), strict=False)  # as many pairs as dialogues
    joined = [{name: f"{one[name]}\n{other[name]}" for name in COLUMNS} for one, other in pairs]
    path = folder / "dialogues.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(joined)
    texts = [row[name] for row in rows for name in ("dialogue", "summary")]
    train_tokenizer(texts, causal=False).save_pretrained(folder / "tokenizer")
    return path, folder / "tokenizer"
