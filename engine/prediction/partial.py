"""Side files of a long prediction: what is decoded is kept, batch by batch, and is not decoded again after a kill."""

from __future__ import annotations

import glob
import json
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.runtime.atomic import without_links

if TYPE_CHECKING:
    from engine.prediction.summarizer import Summary

log = logging.getLogger("engine.predict")


class SideFile:
    """Decoded rows, some to a line, so a line cut short loses those rows and no more.

    Args:
        fingerprint: of model, settings and input; lines of another prediction do not count.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._clean = False

    def lines(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of each line of this prediction, one line in memory at a time."""
        if not self.path.is_file() or self.path.is_symlink():
            return
        with open(self.path, "rb", opener=without_links) as handle:
            for line in handle:
                if line.endswith(b"\n") and (rows := self._rows(line)):  # else cut short
                    yield rows

    def in_order(self, rows: range) -> Iterator[list[Summary]]:
        """The longest unbroken run of `rows` from their first on; a line that does not follow the one before is left out."""
        from engine.prediction.summarizer import Summary

        expected = rows.start
        for line in self.lines():
            if [record["index"] for record in line] == list(range(expected, min(expected + len(line), rows.stop))):
                expected += len(line)
                yield [Summary(**record) for record in line]

    def append(self, summaries: Sequence[Summary]) -> None:
        """Add a line and force it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"fingerprint": self.fingerprint, "rows": [asdict(summary) for summary in summaries]}
        if not self._clean:  # only a kill tears a line, so only what an earlier process wrote is looked at
            self._drop_torn_line()
            self._clean = True
        with open(self.path, "a", encoding="utf-8", opener=without_links) as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _rows(self, line: bytes) -> list[dict[str, Any]]:
        try:
            batch = json.loads(line)
            same = batch["fingerprint"] == self.fingerprint
            return [record for record in batch["rows"] if record["index"] >= 0] if same else []
        except (ValueError, KeyError, TypeError):
            log.warning("%s: a damaged line is left out; its rows are decoded again", self.path)
            return []

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+", opener=without_links) as handle:
            if handle.seek(0, os.SEEK_END):
                with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    whole = content.rfind(b"\n") + 1
                handle.truncate(whole)


class PartialResults:
    """What a prediction has decoded: finished windows, and the batches of the window in progress.

    Args:
        base: what the side files are named after: `<base>.partial-rank<k>.jsonl` holds the batches of a rank.
        rank: this rank; each writes a file of its own.
        fingerprint: see `SideFile`.
        windows: the file of the finished windows, in the order of the input; `<base>.partial.jsonl` unless it is given.
    """

    def __init__(self, base: str | Path, rank: int, *, fingerprint: str, windows: Path | None = None) -> None:
        self.base, self.rank, self.fingerprint = Path(base), rank, fingerprint
        self.windows = SideFile(windows or self.base.with_name(f"{self.base.name}.partial.jsonl"), fingerprint)
        self.batches = SideFile(self.base.with_name(f"{self.base.name}.partial-rank{rank}.jsonl"), fingerprint)

    def files(self) -> list[Path]:
        found = self.base.parent.glob(f"{glob.escape(self.base.name)}.partial-rank*.jsonl")
        return sorted(path for path in found if path.is_file() and not path.is_symlink())

    def begun(self) -> list[dict[str, Any]]:
        """Records in every rank's file; each row once."""
        lines = (line for path in self.files() for line in SideFile(path, self.fingerprint).lines())
        return list({record["index"]: record for line in lines for record in line}.values())

    def finish_window(self, summaries: Sequence[Summary]) -> None:
        """Keep a whole window, on rank 0; the ranks' batches of it are not needed any more."""
        if self.rank == 0:
            self.windows.append(summaries)
            self._remove_batches()

    def remove(self) -> None:
        """The output is written: nothing needs to be kept."""
        self._remove_batches()
        self.windows.path.unlink(missing_ok=True)

    def _remove_batches(self) -> None:
        for path in self.files():
            path.unlink(missing_ok=True)


def all_in_order(file: SideFile, rows: range) -> Iterator[list[Summary]]:
    """`in_order`, and nothing is missing. Raises: EngineError E3.36."""
    count = 0
    for summaries in file.in_order(rows):
        count += len(summaries)
        yield summaries
    if count != len(rows):
        what = f"decoded row {rows.start + count + 1} of the input cannot be read"
        raise EngineError("E3.36", what, str(file.path), "decode this part again", safe="no output was written")
