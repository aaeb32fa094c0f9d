"""Side files of a long prediction: what is decoded is kept, batch by batch, and is not decoded again after a kill."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.runtime.atomic import without_links

if TYPE_CHECKING:
    from engine.prediction.summarizer import Summary

log = logging.getLogger("engine.predict")


class PartialResults:
    """`<output>.partial-rank<k>.jsonl`: one line per decoded batch, so a line cut short loses one batch and no more.

    Args:
        output: the file that the prediction will write.
        rank: this rank; each writes a file of its own.
        fingerprint: of model, settings and input; files of another prediction are discarded.
    """

    def __init__(self, output: str, rank: int, *, fingerprint: str) -> None:
        self.output = Path(output)
        self.path = self.output.with_name(f"{self.output.name}.partial-rank{rank}.jsonl")
        self.fingerprint = fingerprint
        self._clean = False

    def files(self) -> list[Path]:
        found = self.output.parent.glob(f"{glob.escape(self.output.name)}.partial-rank*.jsonl")
        return sorted(path for path in found if path.is_file() and not path.is_symlink())

    def read_all(self) -> list[dict[str, Any]]:
        """Records of every rank's file, of this prediction only; each row once."""
        records: dict[int, dict[str, Any]] = {}
        for path in self.files():
            for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was cut short
                records |= self._batch(line, path)
        return list(records.values())

    def _batch(self, line: bytes, path: Path) -> dict[int, dict[str, Any]]:
        try:
            batch = json.loads(line)
            same = batch["fingerprint"] == self.fingerprint
            return {record["index"]: record for record in batch["rows"]} if same else {}
        except (ValueError, KeyError, TypeError):
            log.warning("%s: a damaged line is left out; its rows are decoded again", path)
            return {}

    def append(self, summaries: Sequence[Summary]) -> None:
        """Add one decoded batch and force it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"fingerprint": self.fingerprint, "rows": [asdict(summary) for summary in summaries]}
        if not self._clean:  # only a kill tears a line, so only what an earlier process wrote is looked at
            self._drop_torn_line()
            self._clean = True
        with open(self.path, "a", encoding="utf-8", opener=without_links) as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+", opener=without_links) as handle:
            content = handle.read()
            if content and not content.endswith(b"\n"):
                handle.truncate(content.rfind(b"\n") + 1)

    def remove(self) -> None:
        """The output is written: nothing needs to be kept."""
        for path in self.files():
            path.unlink(missing_ok=True)
