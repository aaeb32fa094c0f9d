"""The checkpoints of one run folder as a set: which are this run's, which is best, which may go, which to resume from.

Everything here runs on rank 0 only. `checkpoint-<step>` folders count as this run's when they are real folders whose
manifest bears its run id; links, files, similar names and other runs' folders are never counted, renamed or deleted.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoints.manifest import DamagedError, read_manifest, verify
from engine.errors import EngineError
from engine.runtime.atomic import reached, read_json, remove_partials, write_json_atomically
from engine.runtime.faults import blaming
from engine.runtime.run_folder import CHECKPOINT, MANIFEST
from engine.scoring.extra import less_is_better

log = logging.getLogger("engine.checkpoints")
_LEFTOVER = re.compile(r"\.(tmp|trash)-checkpoint-\d+-[0-9a-f]+")
_RUN_ID = re.compile(r"[0-9a-f]{16}")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_BAD_KEPT = 2  # damaged checkpoints kept for whoever wants to know what happened to them


class History:
    """Checkpoints, pointers and leftovers of a run folder that this process has locked.

    Args:
        run_dir: the run folder.
        save_total_limit: latest checkpoints kept by `rotate`, the best beside them; None keeps all.
    """

    def __init__(self, run_dir: Path, save_total_limit: int | None) -> None:
        self.run_dir, self.save_total_limit = run_dir, save_total_limit
        self.run_id = ""
        self.best: dict[str, Any] | None = None  # {"step", "metric", "value"}; its checkpoint may still be on its way
        self._lock = threading.RLock()  # the loop marks the best while the thread of a save publishes

    def open(self) -> str:
        """Remove what killed saves left behind, and learn which run this is; a new id in a new folder."""
        remove_leftovers(self.run_dir, kinds=("tmp", "trash"))
        self.recover()
        remove_partials(self.run_dir)
        self.run_id = self._known_run_id() or secrets.token_hex(8)
        return self.run_id

    def _known_run_id(self) -> str | None:
        """The run that this folder belongs to: what a pointer says, else the newest whole manifest."""
        for pointer in (self.run_dir / "last.json", self.run_dir / "best.json"):
            try:
                run_id = read_json(pointer)["run_id"]
            except _UNREADABLE:
                continue
            if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id):
                return run_id
        owners = (self._owner(folder) for folder in self.entries())
        return next((owner for owner in owners if owner and _RUN_ID.fullmatch(owner)), None)

    # What is there

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of that step lies, or would."""
        return self.run_dir / f"checkpoint-{step}"

    def entries(self) -> list[Path]:
        """Everything here that is named like a checkpoint, the highest step first."""
        named = [entry for entry in self.run_dir.iterdir() if CHECKPOINT.fullmatch(entry.name)]
        return sorted(named, key=step_of, reverse=True)

    def steps(self) -> list[int]:
        """Steps of this run's checkpoints, ascending."""
        return sorted(step_of(entry) for entry in self.entries() if self.is_ours(entry))

    def is_ours(self, folder: Path) -> bool:
        """Whether it is a real folder with this run's manifest. Says nothing about the other files."""
        return self._owner(folder) == self.run_id

    def _owner(self, folder: Path) -> str | None:
        """Run id in the whole manifest of a real folder; None where there is none: a damaged one names no owner."""
        if folder.is_symlink():
            return None
        try:
            return read_manifest(folder)["run_id"]
        except (DamagedError, EngineError):
            return None

    # Pointers

    def pointed(self, name: str) -> Path | None:
        """Folder that `best.json` or `last.json` points at, if both are there."""
        try:
            return pointed_at(self.run_dir / f"{name}.json")
        except EngineError:
            return None

    def set_last(self, step: int) -> None:
        write_json_atomically(self.run_dir / "last.json", {"step": step, "run_id": self.run_id})

    def set_best(self, best: dict[str, Any] | None) -> None:
        """Remember the best so far; `best.json` follows as soon as its checkpoint is there."""
        with self._lock:
            self.best = best
            self.point_at_best()

    def point_at_best(self) -> None:
        """Write `best.json` if it is not right already and its checkpoint is complete."""
        with self._lock:
            if self.best is None or not self.is_ours(self.path_of(self.best["step"])):
                return
            path, record = self.run_dir / "best.json", {**self.best, "run_id": self.run_id}
            try:
                if read_json(path) == record:
                    return
            except _UNREADABLE:
                pass
            write_json_atomically(path, record)

    # Removing

    def rotate(self) -> None:
        """Remove this run's checkpoints but the latest and the best. A failure warns; the next call tries again."""
        remove_leftovers(self.run_dir, kinds=("trash",))
        self.recover()
        if self.save_total_limit is None:
            return
        pointed = self.pointed("best")
        kept = {self.best["step"] if self.best else None, step_of(pointed) if pointed else None}
        for step in self.steps()[: -self.save_total_limit]:
            if step not in kept:
                _remove(self.path_of(step))

    def make_way(self, final: Path) -> None:
        """Free the name of a checkpoint about to be complete: nothing is ever written into a folder that has it."""
        if final.is_symlink() or final.exists():
            set_aside(final, "old" if self.is_ours(final) else "bad")

    def recover(self) -> None:
        """Bring back a checkpoint that made way for a newer one of its step, if that one never came; else delete it."""
        for old in self.run_dir.glob(".old-checkpoint-*"):
            final = self.path_of(int(old.name.split("-")[2]))
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(final)

    # Resuming

    def choose(self, spec: str | Path) -> Path | None:
        """The checkpoint that `--resume` means, verified to the last byte.

        "auto", or the path of the run folder, means the newest valid one; the path of a checkpoint means that one.
        """
        return self._named(Path(spec).name) if CHECKPOINT.fullmatch(Path(spec).name) else self._newest()

    def _named(self, name: str) -> Path:
        folder = self.run_dir / name
        try:
            if not folder.is_dir():
                raise DamagedError("the folder is missing")
            owner = verify(folder)["run_id"]
        except DamagedError as error:
            raise EngineError(
                "E5.3",
                f"the checkpoint is damaged: {error}",
                str(folder),
                "use --resume auto to go back to the newest whole one",
            ) from error
        if owner != self.run_id:
            raise EngineError("E5.9", "the checkpoint belongs to another run", str(folder), "use --resume auto")
        return folder

    def _newest(self) -> Path | None:
        damaged = []
        for folder in self.entries():
            if folder.is_symlink() or not folder.is_dir():
                continue
            try:
                owner = verify(folder)["run_id"]
            except DamagedError as error:
                log.warning("%s is damaged (%s); going back to the one before", folder.name, error)
                damaged.append(folder)
                continue
            if owner == self.run_id:
                return folder
        if damaged:
            raise EngineError(
                "E5.7",
                "every checkpoint of this run is damaged",
                str(self.run_dir),
                "start a new run in another experiment.output_dir",
            )
        self.refuse_strangers(above=-1)
        log.info("nothing to resume in %s: starting fresh", self.run_dir)
        return None

    def refuse_strangers(self, above: int) -> None:
        """Raises: EngineError E2.35 for links, files and other runs' folders with names that later saves will need."""
        for entry in self.entries():
            foreign = entry.is_symlink() or not entry.is_dir() or self._owner(entry) not in (None, self.run_id)
            if step_of(entry) > above and foreign:
                raise EngineError(
                    "E2.35",
                    f"{entry.name} is not this run's, and a later save would need its name",
                    str(entry),
                    "move it away, or choose another experiment.output_dir",
                    safe="nothing was changed",
                )

    def adopt(self, folder: Path, best: dict[str, Any] | None) -> dict[str, Any] | None:
        """Make a checkpoint the end of the history: newer ones are set aside, the pointers set right.

        What is newer is damaged, or whole and left behind because an older one was named on purpose.

        Returns:
            `best`, or where its checkpoint is lost, the next best.
        """
        step = step_of(folder)
        self.refuse_strangers(above=step)
        for newer in [entry for entry in self.entries() if step_of(entry) > step]:
            aside = set_aside(newer, "later" if _is_whole(newer) else "bad")
            log.warning("%s is set aside as %s", newer.name, aside.name)
        self.set_last(step)
        if best is not None and not _is_whole(self.path_of(best["step"])):
            best = self._next_best(best["step"], best["metric"])
        if best is None:
            (self.run_dir / "best.json").unlink(missing_ok=True)
        self.set_best(best)
        self.rotate()  # the save that was killed may have been just about to
        return best

    def step_to_hand_on(self, step: int, metric: str) -> int:
        """`step`, or where its save has failed, that of the best checkpoint by the manifests, or of the last one."""
        if self.is_ours(self.path_of(step)):
            return step
        best, steps = self._next_best(step, metric), self.steps()
        if not steps:
            what = "no checkpoint was saved, so there is no model to hand on"
            raise EngineError(
                "E6.10", what, str(self.run_dir), "free some space, then train again", safe="the logs stay"
            )
        return best["step"] if best else steps[-1]

    def _next_best(self, lost: int, metric: str) -> dict[str, Any] | None:
        """The best whole checkpoint by the metrics of the manifests, instead of one that is not there."""
        found = []
        for step in self.steps():
            value = read_json(self.path_of(step) / MANIFEST).get("metrics", {}).get(metric)
            if isinstance(value, int | float) and _is_whole(self.path_of(step)):
                found.append((value if less_is_better(metric) else -value, step, value))
        _, step, value = min(found, default=(0, None, None))
        log.warning("the best checkpoint, of step %s, is not there; next best: %s", lost, step)
        return None if step is None else {"step": step, "metric": metric, "value": value}


def pointed_at(pointer: Path) -> Path:
    """The checkpoint that `best.json` or `last.json` names. Raises: EngineError E5.11 where it names none that is there."""
    with blaming("E5.11", "the pointer to a checkpoint cannot be used", pointer, "name the checkpoint's folder itself"):
        step = read_json(pointer)["step"]
        folder = pointer.with_name(f"checkpoint-{step}")
        if type(step) is not int or not CHECKPOINT.fullmatch(folder.name) or not folder.is_dir():
            raise ValueError(f"there is no step {step!r}")
    return folder


def step_of(path: Path) -> int:
    """Step in the name of a checkpoint."""
    return int(path.name.rsplit("-", 1)[1])


def _is_whole(folder: Path) -> bool:
    try:
        return bool(verify(folder))
    except (DamagedError, EngineError):
        return False


def set_aside(path: Path, kind: str) -> Path:
    """Take an entry out of the way by renaming it; of damaged ones only the newest few are kept."""
    aside = path.with_name(f".{kind}-{path.name}-{secrets.token_hex(4)}")
    path.rename(aside)
    old = sorted(path.parent.glob(".bad-checkpoint-*"), key=lambda entry: entry.lstat().st_mtime)
    for entry in old[:-_BAD_KEPT]:
        shutil.rmtree(entry, ignore_errors=True)
    return aside


def _remove(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one is never taken for whole."""
    trash = folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")
    try:
        folder.rename(trash)
        reached("trash-renamed", trash)
        shutil.rmtree(trash)
        reached("trash-removed", trash)
    except OSError as error:
        log.warning("could not remove %s (%s); trying again after the next save", folder.name, error)


def remove_leftovers(run_dir: Path, kinds: Sequence[str]) -> None:
    """Delete folders that unfinished saves (`tmp`) and deletions (`trash`) left behind."""
    for path in run_dir.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and match[1] in kinds and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
