"""`run_status.json`: how a run stands, or how it ended."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from engine.runtime.atomic import read_json, write_json_atomically

STATUS = "run_status.json"


def finished(folder: Path) -> bool:
    """Whether the run of that folder has ended well."""
    return (read_status(folder) or {"code": None})["code"] == 0


def read_status(folder: Path) -> dict[str, Any] | None:
    """What a run last said of itself there; None where no run did, or nobody can read it."""
    try:
        status = read_json(folder / STATUS)
    except (OSError, ValueError):
        return None
    return status if "code" in status else None


class RunStatus:
    """`run_status.json`: how the run stands, or how it ended. Launchers swallow exit codes; this file does not.

    Rank 0 keeps `run_status.json`; another rank that fails leaves `run_status.rank<k>.json`.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.folder: Path | None = None
        self.step = 0
        self.last_checkpoint: str | None = None

    def open(self, folder: Path) -> None:
        """From now on the status is written to that folder. Of what an earlier attempt said, its checkpoint stays true."""
        self.folder = folder
        if self.rank == 0:
            earlier = read_status(folder) or {}
            self.last_checkpoint, self.step = earlier.get("last_checkpoint"), earlier.get("step") or 0
            for stale in folder.glob("run_status.rank*.json"):
                stale.unlink(missing_ok=True)
            self.write(None, "running")

    def write(self, code: int | None, reason: str) -> None:
        """`code` None says that the run is under way (or was killed without a chance to say so). Never raises."""
        if self.folder is None or (self.rank > 0 and code in (None, 0)):
            return
        name = STATUS if self.rank == 0 else f"run_status.rank{self.rank}.json"
        record: dict[str, Any] = {
            "code": code,
            "reason": reason,
            "step": self.step,
            "last_checkpoint": self.last_checkpoint,
        }
        record["resumable"] = self.last_checkpoint is not None and code != 0
        try:
            write_json_atomically(self.folder / name, record, durable=code is not None)
        except OSError as error:
            print(f"warning: could not write {self.folder / name}: {error}", file=sys.stderr)
