"""A prediction cut into shards for array jobs: which rows each takes, what it leaves behind, and what a merge demands.

Shard 3 of 16 of `out.csv` keeps its rows in `out.csv.shard-003-of-016.jsonl`; `out.csv.shard-003-of-016.json` beside it says
that they are all there, and what they were made of. Shards are made of whole windows, so a row meets the same neighbours in its
batch, and comes out the same, however many shards there are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.prediction.partial import SideFile, all_in_order
from engine.runtime.atomic import file_record, read_json, write_json_atomically

if TYPE_CHECKING:
    from engine.data.stream import ExampleFile, ExampleList
    from engine.prediction.summarizer import Summary

WINDOW = 2048  # rows that are read, sorted by length and decoded together


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `of` parts."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/16`. Raises: ValueError for anything else."""
        number, _, of = text.partition("/")
        shard = cls(int(number), int(of))
        if not 1 <= shard.number <= shard.of <= 9999:
            raise ValueError(text)
        return shard

    def base(self, output: Path) -> Path:
        return output.with_name(f"{output.name}.shard-{self.number:03}-of-{self.of:03}")

    def kept(self, output: Path) -> Path:
        """The file of its decoded rows."""
        return output.with_name(f"{self.base(output).name}.jsonl")

    def record(self, output: Path) -> Path:
        """The file that is there once all rows are."""
        return output.with_name(f"{self.base(output).name}.json")

    def rows(self, count: int) -> range:
        """Its rows of `count`: whole windows, as many as the others have or one more; none where there are too few."""
        windows = -(-count // WINDOW)
        first, last = (windows * at // self.of for at in (self.number - 1, self.number))
        return range(first * WINDOW, min(last * WINDOW, count))


def fingerprint_of(settings: str, source: ExampleFile | ExampleList) -> str:
    """What decides every decoded row: `settings` stands for model, prompt and generation."""
    return hashlib.sha256(f"{settings} {source.fingerprint}".encode()).hexdigest()


def finish(shard: Shard, output: Path, source: ExampleFile | ExampleList, settings: str) -> None:
    """Leave word that the shard's rows are all there."""
    kept = shard.kept(output)
    kept.touch()  # a shard may be empty
    write_json_atomically(shard.record(output), _facts(shard, source, settings) | file_record(kept))


def is_finished(shard: Shard, output: Path, source: ExampleFile | ExampleList, settings: str) -> bool:
    """Whether this very shard is done; word of another one is taken back."""
    record = _read(shard.record(output))
    facts = _facts(shard, source, settings)
    if record is not None and {name: record.get(name) for name in facts} == facts:
        return shard.kept(output).is_file() and shard.kept(output).stat().st_size == record.get("size")
    shard.record(output).unlink(missing_ok=True)
    return False


def merged(output: Path, of: int, source: ExampleFile | ExampleList) -> Callable[[], Iterator[list[Summary]]]:
    """The rows of all shards in the order of the input, each time they are asked for; every row exactly once.

    Raises: EngineError E3.36 naming the shards that are missing, unfinished, damaged, or made of something else.
    """
    shards = [Shard(number, of) for number in range(1, of + 1)]
    records = {shard: _read(shard.record(output)) for shard in shards}
    made_with = Counter(record.get("settings") for record in records.values() if record).most_common(1)
    settings = str(made_with[0][0]) if made_with else ""
    found = [(_problem(shard, records[shard], output, source, settings), shard.number) for shard in shards]
    problems = [
        f"{problem}: {', '.join(str(number) for what, number in found if what == problem)}"
        for problem in dict.fromkeys(what for what, _ in found if what)
    ]
    if problems:
        what = f"the {of} shards cannot be merged; {'; '.join(problems)}"
        advice = "run those shards (again), then merge; those that are done are kept"
        raise EngineError("E3.36", what, str(output), advice, safe="no output was written")
    fingerprint = fingerprint_of(settings, source)

    def rows() -> Iterator[list[Summary]]:
        for shard in shards:
            yield from all_in_order(SideFile(shard.kept(output), fingerprint), shard.rows(source.count))

    return rows


def remove(output: Path, of: int) -> None:
    """The shards are merged."""
    for shard in (Shard(number, of) for number in range(1, of + 1)):
        shard.record(output).unlink(missing_ok=True)  # first: without its rows it would be wrong
        shard.kept(output).unlink(missing_ok=True)


def _facts(shard: Shard, source: ExampleFile | ExampleList, settings: str) -> dict[str, Any]:
    rows = shard.rows(source.count)
    return {
        "shard": f"{shard.number}/{shard.of}",
        "first_row": rows.start + 1,
        "rows": len(rows),
        "input": source.fingerprint,
        "input_rows": source.count,
        "settings": settings,
    }


def _problem(
    shard: Shard, record: dict[str, Any] | None, output: Path, source: ExampleFile | ExampleList, settings: str
) -> str:
    """Why a shard cannot be merged with the others; empty where it can."""
    kept = shard.kept(output)
    if record is None:
        begun = kept.is_file() or any(kept.parent.glob(f"{shard.base(output).name}.partial-rank*.jsonl"))
        return "unfinished" if begun else "missing"
    if record.get("input") != source.fingerprint:
        return "of another input"
    if record.get("settings") != settings:
        return "of another model or other settings than most"
    facts = _facts(shard, source, settings)
    whole = kept.is_file() and file_record(kept) == {name: record.get(name) for name in ("size", "sha256")}
    return "" if whole and {name: record.get(name) for name in facts} == facts else "damaged"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
