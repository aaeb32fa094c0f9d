"""The run folder: where a run writes, that it may, what it last said about itself, and its log."""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.runtime.atomic import free_bytes, storage_error
from engine.runtime.run_status import STATUS, finished, read_status

if TYPE_CHECKING:
    from engine.recipe.schema import Recipe

MANIFEST = "manifest.json"  # of a checkpoint, written last
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")  # folder name of a checkpoint, with its step
# What a run writes to by name. Checkpoints are renamed into place and looked at by their own room, as is the lock.
_WRITTEN = re.compile(
    r"recipe\.yaml|train\.log|metrics(\.damaged)?\.jsonl|tensorboard|wandb|predictions|profile|(best|last|results)\.json"
    r"|run_status(\.rank\d+)?\.json|final_model|\.tmp-.*|\..*\.partial"
)
_GIVE = "give a checkpoint folder, a run folder, or auto"
_LEAST_FREE = 32 << 20  # bytes without which not even the logs of a run are safe

log = logging.getLogger("engine")


@dataclass(frozen=True)
class RunFolder:
    """`reused`: another attempt wrote here before. `finished`: it ended with code 0, and nothing is left to do."""

    path: Path
    reused: bool = False
    finished: bool = False


def choose_run_folder(recipe: Recipe, resume: str | None) -> RunFolder:
    """Decide where this run writes; creates the folder, and nothing when it refuses. Called on rank 0 only.

    Args:
        resume: None starts a new run; "auto" continues the run of that folder or name if there is one; else the path
            of a run folder or of one of its checkpoints.

    Raises:
        EngineError: E2 for a folder that holds a run already, E5 for a resume path without one, E6 where nothing can be
            written.
    """
    explicit = recipe.experiment.output_dir
    if resume not in (None, "auto"):
        return _existing(_run_of(Path(resume), explicit))
    if explicit is not None:
        return _explicit(Path(explicit), resume)
    root = Path(recipe.experiment.output_root)
    if resume == "auto":
        known = _latest(root, recipe.experiment.name)
        if known is not None:
            return _existing(known)
        log.info("nothing to resume under %s for %s: starting fresh", root, recipe.experiment.name)
    now = time.localtime()
    name = f"{time.strftime('%Y%m%d_%H%M%S', now)}_{recipe.experiment.name}"
    return RunFolder(_create_new(root / time.strftime("%Y%m%d", now), name))


def _run_of(path: Path, explicit: str | None) -> Path:
    """The run folder of `--resume PATH`."""
    if not str(path) or not path.is_dir():
        what = "there is no checkpoint to resume from"
        raise EngineError("E5.1", what, str(path), _GIVE, safe="nothing was started")
    if path.name.startswith(".") or path.is_symlink():
        what = "an unfinished or linked folder is no checkpoint"
        raise EngineError("E5.2", what, str(path), "use --resume auto", safe="nothing was started")
    run = path.parent if CHECKPOINT.fullmatch(path.name) else path
    if not _is_ours(run) or (run == path and not _holds_run(run)):
        what = "there is no checkpoint of a run here"
        raise EngineError("E5.1", what, str(path.absolute()), _GIVE, safe="nothing was started")
    if explicit is not None and Path(explicit).resolve() != run.resolve():
        what = f"experiment.output_dir is {explicit}, the checkpoint lies in {run}"
        leave_out = "leave experiment.output_dir out to continue in the checkpoint's folder"
        raise EngineError("E2.32", what, str(path), leave_out)
    return run


def _explicit(folder: Path, resume: str | None) -> RunFolder:
    if folder.is_dir() and _holds_run(folder) and resume is None:
        what = "experiment.output_dir already holds a run"
        next = "add --resume auto to continue it, or choose another folder"
        raise EngineError("E2.31", what, str(folder), next, safe="it was not touched")
    if folder.is_dir() and _is_ours(folder):
        return _existing(folder)
    if folder.is_dir() and (found := sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")):
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        what = f"experiment.output_dir is not empty, and what it holds is no run: {', '.join(found[:5])}{more}"
        raise EngineError("E2.22", what, str(folder), "choose a new or an empty folder", safe="it was not touched")
    if resume == "auto":
        log.info("nothing to resume in %s: starting fresh", folder)
    reused = folder.is_dir() and any(folder.iterdir())
    if not folder.is_dir():
        _make(folder)
    check_writable(folder)
    return RunFolder(folder, reused=reused)


def _existing(folder: Path) -> RunFolder:
    if finished(folder):
        return RunFolder(folder, reused=True, finished=True)
    refuse_links(folder)
    check_writable(folder)
    return RunFolder(folder, reused=True)


def _is_ours(folder: Path) -> bool:
    """Whether a run of ours wrote here: it left a status, or where that was lost, a checkpoint with a manifest."""
    return read_status(folder) is not None or any(path.is_file() for path in folder.glob(f"checkpoint-*/{MANIFEST}"))


def refuse_links(folder: Path) -> None:
    """Nothing that a run writes over may lead elsewhere. The folder itself may be a link: its user named it.

    Raises:
        EngineError: E6.8 for a link, a pipe or a device under a name that a run writes to.
    """
    inner = [entry for name in ("predictions", "tensorboard", "profile") for entry in _entries(folder / name)]
    for entry in [entry for entry in _entries(folder) if _WRITTEN.fullmatch(entry.name)] + inner:
        refuse_link(entry)


def refuse_link(path: Path) -> None:
    """Raises: EngineError E6.8 for a link, a pipe or a device."""
    if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
        what = "this is written to, and what stands here is a link or no plain file"
        raise EngineError("E6.8", what, str(path), "remove it, then run again")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _holds_run(folder: Path) -> bool:
    """Whether something there would be lost or mixed up by another run: a checkpoint, a model, or logged updates."""
    metrics = folder / "metrics.jsonl"
    if (metrics.is_file() and metrics.stat().st_size) or any(
        (folder / name).exists() for name in ("final_model", "results.json")
    ):
        return True
    return any(CHECKPOINT.fullmatch(entry.name) for entry in folder.iterdir())


def _latest(root: Path, name: str) -> Path | None:
    """The newest dated run folder of that name that got as far as a status."""
    pattern = re.compile(rf"\d{{8}}_\d{{6}}_{re.escape(name)}(-\d+)?")
    folders = [
        path for path in root.glob("[0-9]" * 8 + "/*") if pattern.fullmatch(path.name) and (path / STATUS).is_file()
    ]
    return max(folders, key=lambda path: (path.name[:15], len(path.name), path.name), default=None)


def _create_new(day: Path, name: str) -> Path:
    _make(day)
    for attempt in range(1, 1000):  # several runs may start within one second
        folder = day / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise storage_error(error, folder, "creating the run folder", "nothing was started") from error
        check_writable(folder)
        return folder
    raise EngineError(
        "E6.3", "a thousand runs of this name started within one second", str(day), "set experiment.output_dir"
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        what = "the output folder's path goes through a file"
        next = "choose another experiment.output_dir or output_root"
        raise EngineError("E2.33", what, str(folder), next) from error
    except OSError as error:
        raise storage_error(error, folder, "creating the run folder", "nothing was started") from error


def check_writable(folder: Path) -> None:
    """Write a probe before minutes go into loading a model. Raises: EngineError E6."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("xb") as handle:
            handle.write(b"probe" * 1000)
    except OSError as error:
        raise storage_error(error, folder, "writing to the run folder", "nothing was started") from error
    finally:
        probe.unlink(missing_ok=True)
    check_space(folder, _LEAST_FREE)


def check_space(folder: Path, need: int) -> None:
    """Raises: EngineError E6.2 where less than `need` bytes are free."""
    free = free_bytes(folder)
    if free < need:
        what = f"not enough space for this run: {need >> 20} MiB needed, {free >> 20} MiB free"
        next = "free some space, or choose another experiment.output_dir or output_root"
        raise EngineError("E6.2", what, str(folder), next, safe="nothing was started")
