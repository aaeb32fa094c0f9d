"""Checkpoints that are whole or absent: save, rotate, point at the best, verify, resume.

A save goes through these stages, so that a kill at any instant leaves every `checkpoint-<step>/` complete:

1. all ranks stand at the same update boundary; rank 0 makes `.tmp-checkpoint-<step>-<nonce>/` beside the target;
2. every rank writes its own random state there, forces it to the disk, and tells the others its hashes or its failure;
3. rank 0 writes weights, optimizer and trainer state, forces them to the disk and hashes them;
4. rank 0 writes `manifest.json`, the last file, which names every other one with size and sha256;
5. rank 0 renames the folder to its final name and forces the parent folder to the disk;
6. only now the pointers `last.json` and `best.json` move, and only after that old checkpoints go, renamed first.

Stages 3 to 6 are rank 0's alone and run in a thread, on copies in host memory, while training goes on. The other
ranks learn how they ended when the save is joined (`wait`), before the next save and at the end of the run.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import manifests
from engine.errors import EngineError
from engine.manifests import MANIFEST, DamagedError, identity_of
from engine.storage import (
    file_record,
    flatten_state,
    free_bytes,
    fsync_file,
    read_json,
    read_state,
    storage_error,
    write_json_atomically,
    write_state,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.runtime import Runtime

__all__ = ["CheckpointStore", "EngineState", "fail_points", "identity_of", "weights_of"]
log = logging.getLogger("engine.checkpoints")
ENGINE_STATE = "engine_state"
_NAME = re.compile(r"checkpoint-(\d{1,18})")
_LEFTOVER = re.compile(r"\.(tmp|trash)-checkpoint-\d+-[0-9a-f]+")
_PARTIAL = re.compile(r"\.[\w.]+\.json\.\d+\.partial")
_SLACK = 4 << 20  # bytes of a checkpoint that are not tensors: tokenizer, configs, manifest

# Callables `(point, path)` met on the way through a save. Only tests fill this list, to kill or to fail at a given
# point.
fail_points: list[Callable[[str, Path], None]] = []


def _reached(point: str, path: Path) -> None:
    for callback in fail_points:
        callback(point, path)


@dataclass
class EngineState:
    """Everything beside the weights that the next update depends on.

    Attributes:
        position: the trainer's own counters, JSON-safe.
        best: {"step", "metric", "value"} of the best evaluation so far, or None.
        optimizer, scheduler, scaler: their `state_dict()`s.
        rng: `Runtime.random_state()` of this rank; None after a resume with more ranks than before.
    """

    position: dict[str, Any]
    best: dict[str, Any] | None
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    rng: dict[str, Any] | None


@dataclass
class _Save:
    """What rank 0 needs to finish a save after the ranks have parted."""

    step: int
    folder: Path
    rank_files: dict[str, Any]
    weights: Mapping[str, Tensor]
    write_model: Callable[[Path, Mapping[str, Tensor]], None]
    optimizer: tuple[Any, Mapping[str, Tensor]]
    small: dict[str, Any]
    metrics: dict[str, Any]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors that a checkpoint of this model holds: all of them, or what is trained on top of a PEFT base."""
    if hasattr(model, "peft_config"):
        return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return model.state_dict()


class CheckpointStore:
    """The checkpoints of one run folder. Every method but `mark_best` is called by all ranks together.

    Args:
        run_dir: the run folder, already locked by this run.
        runtime: for the ranks, the status file, and giving up in the middle of a save.
        save_total_limit: latest checkpoints kept, the best beside them; None keeps all.
        sync: write in the foreground, without copies in host memory.
        on_error: "continue" turns a failed save into a warning.
        identity: `manifests.identity_of(...)`; a resume compares it with the checkpoint's.
        allow_change: keys of the identity that the user allows to differ.
    """

    def __init__(
        self,
        run_dir: Path,
        runtime: Runtime,
        *,
        save_total_limit: int | None = None,
        sync: bool = False,
        on_error: str = "abort",
        identity: Mapping[str, Any],
        allow_change: Sequence[str] = (),
    ) -> None:
        manifests.check_allowed(allow_change)
        self.run_dir, self.runtime, self.ranks = run_dir, runtime, runtime.ranks
        self.save_total_limit, self.sync, self.on_error = save_total_limit, sync, on_error
        self.identity, self.allow_change = dict(identity), tuple(allow_change)
        self._thread: threading.Thread | None = None
        self._pending: int | None = None  # step of the save that is not joined yet; the same on all ranks
        self._failure: BaseException | None = None
        self._temp: Path | None = None
        self._best: dict[str, Any] | None = None
        self._pointers = threading.Lock()
        self._copies = HostCopies()
        with self.ranks.together("looking for earlier checkpoints"):
            if self.ranks.is_main:
                self._clean()
        self.run_id: str = self.ranks.broadcast(self._known_run_id() or secrets.token_hex(8))
        runtime.abandon.append(self._abandon)

    weights_of = staticmethod(weights_of)

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # a save that was under way when the run failed is still a good one
            if self._failure is not None:
                log.warning("the save under way failed too: %s", self._failure)

    # Save

    def save(
        self,
        step: int,
        state: EngineState,
        *,
        weights: Callable[[], Mapping[str, Tensor]],
        write_model: Callable[[Path, Mapping[str, Tensor]], None],
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save everything as `checkpoint-<step>/`. Returns False for a failed save under `on_error: continue`.

        Args:
            weights: called on rank 0, gives the live tensors; `weights_of(model)`.
            write_model: writes the plain model folder from such a mapping; must not read the live weights, which move
                on.
            metrics: kept in the manifest, to find the best checkpoint again should `best.json` be lost.

        Raises:
            EngineError: E6 on all ranks, for this save or for the one before, which is joined first.
        """
        self.wait()  # under `on_error: continue` a failure was told there, and this save is a new chance
        try:
            live = weights() if self.ranks.is_main else {}
            optimizer = flatten_state(state.optimizer) if self.ranks.is_main else (None, {})
            folder = self._begin(step, [*live.values(), *optimizer[1].values()])
            rank_files = self._write_rank_files(folder, state)
        except EngineError as error:
            return self._failed(error)
        self._pending = step
        if self.ranks.is_main:
            small = {"scheduler": state.scheduler, "scaler": state.scaler}
            small["trainer_state"] = {
                "step": step, "position": state.position, "best": state.best, "identity": self.identity
            }  # fmt: skip
            job = _Save(step, folder, rank_files, live, write_model, optimizer, small, dict(metrics or {}))
            self._remember_best(state.best)
            self._launch(job)
        return self.wait() if self.sync else True

    def _begin(self, step: int, tensors: Sequence[Tensor]) -> Path:
        """Stage 1: room on the disk, and the temporary folder, whose name all ranks get."""
        name = None
        with self.ranks.together("starting a save"):
            if self.ranks.is_main:
                need = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _SLACK
                if (free := free_bytes(self.run_dir)) < need:
                    what = f"not enough space for a checkpoint: {need >> 20} MiB needed, {free >> 20} MiB free"
                    raise EngineError(
                        "E6.4",
                        what,
                        str(self.run_dir),
                        "earlier checkpoints are untouched",
                        "free some space, then --resume auto",
                    )
                self._temp = self.run_dir / f".tmp-checkpoint-{step}-{secrets.token_hex(4)}"
                name = self._temp.name
                try:
                    (self._temp / ENGINE_STATE).mkdir(parents=True)
                except OSError as error:
                    raise self._storage_error(error, self._temp) from error
                _reached("temp-made", self._temp)
        return self.run_dir / self.ranks.broadcast(name)

    def _write_rank_files(self, folder: Path, state: EngineState) -> dict[str, Any]:
        """Stage 2: this rank's random state; returns name -> record of all ranks' files."""
        records, error = {}, None
        try:
            tree, tensors = flatten_state(state.rng)
            for path in write_state(folder / ENGINE_STATE, f"rng-rank{self.ranks.rank}", tree, tensors):
                records[path.relative_to(folder).as_posix()] = file_record(path)
                _reached("file", path)
        except Exception as caught:
            error = self._storage_error(caught, folder)
        told = self.ranks.exchange("hashes of a save", records, error)
        return {name: record for part in told for name, record in part.items()}

    def _launch(self, job: _Save) -> None:
        if self.sync:
            return self._finish(job)
        try:
            job.weights = self._copies.take("model", job.weights)
            job.optimizer = (job.optimizer[0], self._copies.take("optimizer", job.optimizer[1]))
        except Exception as error:
            self._failure = error
            return self._drop_temp()
        self._thread = threading.Thread(target=self._finish, args=(job,), name="save")
        self._thread.start()
        return None

    def _finish(self, job: _Save) -> None:
        """Stages 3 to 6, on rank 0, usually in a thread; a failure waits for `wait`."""
        path = job.folder
        try:
            self._write_contents(job)
            self._commit(job)
            path = self.run_dir
            self._publish(job)
        except Exception as error:
            self._failure = self._storage_error(error, path)
            self._drop_temp()

    def _write_contents(self, job: _Save) -> None:
        state_dir = job.folder / ENGINE_STATE
        job.write_model(job.folder, job.weights)
        _reached("model", job.folder)
        write_state(state_dir, "optimizer", *job.optimizer)
        for name, value in job.small.items():
            write_state(state_dir, name, *flatten_state(value))
        files = {}
        for name in sorted(manifests.list_files(job.folder)):
            files[name] = file_record(job.folder / name)
            _reached("file", job.folder / name)
        if lost := [name for name, record in job.rank_files.items() if files.get(name) != record]:
            raise OSError(f"{lost[0]} did not arrive as its rank wrote it")
        facts = {"run_id": self.run_id, "step": job.step, "world_size": self.ranks.world_size, "metrics": job.metrics}
        facts |= {"identity_sha256": manifests.digest_of(self.identity), "data": self.identity.get("data")}
        facts["tokenizer"] = self.identity.get("tokenizer")
        for folder in {(job.folder / name).parent for name in files}:
            fsync_file(folder)
        _reached("before-manifest", job.folder)
        write_json_atomically(job.folder / MANIFEST, manifests.build_manifest(files, **facts))
        _reached("after-manifest", job.folder)

    def _commit(self, job: _Save) -> None:
        """Stage 5: the instant at which the checkpoint comes to be."""
        final = self.path_of(job.step)
        if final.is_symlink() or final.exists():
            _set_aside(final, "trash" if self._is_ours(final) else "bad")  # never write into a folder with a final name
        _reached("before-rename", job.folder)
        job.folder.rename(final)
        _reached("after-rename", final)
        fsync_file(self.run_dir)
        self._temp = None

    def _publish(self, job: _Save) -> None:
        """Stage 6: pointers, then rotation."""
        self.runtime.status.last_checkpoint = self.path_of(job.step).name
        write_json_atomically(self.run_dir / "last.json", {"step": job.step, "run_id": self.run_id})
        _reached("after-last", self.run_dir)
        with self._pointers:
            if self._best is not None and self._best["step"] == job.step:
                self._write_best()
        _reached("after-best", self.run_dir)
        self.rotate()

    def wait(self) -> bool:
        """Join the save under way. True if it is complete; under `on_error: continue` False after a warning.

        Raises:
            EngineError: E6 on all ranks when the save failed.
        """
        if self._pending is None:
            return True
        step, self._pending = self._pending, None
        try:
            with self.ranks.together("joining a save"):
                if self._thread is not None:
                    self._thread.join()
                self._thread, failure, self._failure = None, self._failure, None
                if failure is not None:
                    raise failure
        except EngineError as error:
            return self._failed(error)
        self.runtime.status.last_checkpoint = self.path_of(step).name
        return True

    def _failed(self, error: EngineError) -> bool:
        self._drop_temp()
        if self.on_error == "continue" and error.exit_code == 6:
            log.warning("%s; going on (checkpoint.on_save_error: continue)", error)
            return False
        raise error

    def _storage_error(self, error: Exception, path: Path) -> EngineError | Exception:
        """A failed write as E6; what is no failed write stays what it is."""
        writes = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
        if isinstance(error, EngineError) or not writes:
            return error
        return storage_error(error, path, "saving a checkpoint", "earlier checkpoints are untouched")

    def _drop_temp(self) -> None:
        temp, self._temp = self._temp, None
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)

    def _abandon(self) -> None:
        """Drop a half-done save from another thread, while the saving one may be about to rename it."""
        temp = self._temp
        if temp is not None:
            trash = temp.with_name(temp.name.replace(".tmp-", ".trash-"))
            temp.rename(trash)  # whichever rename comes first wins; the other one finds nothing
            shutil.rmtree(trash, ignore_errors=True)

    # Best and rotation

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Point `best.json` at a step that is saved, or at one whose save is under way as soon as that is complete."""
        if self.ranks.is_main:
            self._remember_best({"step": step, "metric": metric, "value": value})

    def _remember_best(self, best: dict[str, Any] | None) -> None:
        with self._pointers:
            self._best = best
            if best is not None and self._is_ours(self.path_of(best["step"])) and self._pointer("best") != best["step"]:
                self._write_best()

    def _write_best(self) -> None:
        write_json_atomically(self.run_dir / "best.json", {**self._best, "run_id": self.run_id})

    def _pointer(self, name: str) -> int | None:
        try:
            step = read_json(self.run_dir / f"{name}.json")["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return step if isinstance(step, int) else None

    def best_path(self) -> Path | None:
        """Folder of the best checkpoint, if there is one."""
        return self._pointed("best")

    def last_path(self) -> Path | None:
        """Folder of the latest checkpoint, if there is one."""
        return self._pointed("last")

    def _pointed(self, name: str) -> Path | None:
        step = self._pointer(name)
        return self.path_of(step) if step is not None and self.path_of(step).is_dir() else None

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of that step lies, or would."""
        return self.run_dir / f"checkpoint-{step}"

    def _steps(self) -> list[int]:
        """Steps of this run's complete checkpoints, ascending. Links, files and other runs' folders do not count."""
        names = [_NAME.fullmatch(entry.name) for entry in self.run_dir.iterdir()]
        return sorted(int(match[1]) for match in names if match and self._is_ours(self.run_dir / match[0]))

    def _is_ours(self, folder: Path) -> bool:
        try:
            if folder.is_symlink():
                return False
            manifest = read_json(folder / MANIFEST)
            return manifest["run_id"] == self.run_id and f"checkpoint-{manifest['step']}" == folder.name
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def rotate(self) -> None:
        """Remove this run's checkpoints but the latest `save_total_limit` and the best. On rank 0; failures only
        warn.
        """
        _remove_leftovers(self.run_dir, kinds=("trash",))
        if self.save_total_limit is None:
            return
        with self._pointers:
            best = {self._pointer("best"), self._best["step"] if self._best else None}
        for step in self._steps()[: -self.save_total_limit]:
            if step not in best:
                _remove(self.path_of(step))

    # Resume

    def _clean(self) -> None:
        """Remove what killed saves of this folder left behind; the lock says that nobody is writing here."""
        _remove_leftovers(self.run_dir, kinds=("tmp", "trash"))
        for path in self.run_dir.iterdir():
            if _PARTIAL.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)

    def _known_run_id(self) -> str | None:
        """The run that this folder belongs to: what the last pointer says, else the newest readable manifest."""
        sources = [self.run_dir / "last.json", self.run_dir / "best.json"]
        folders = sorted(self._entries(), key=lambda path: -int(path.name.split("-")[1]))
        for source in [*sources, *(folder / MANIFEST for folder in folders)]:
            try:
                run_id = read_json(source)["run_id"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if isinstance(run_id, str) and re.fullmatch(r"[0-9a-f]{16}", run_id):
                return run_id
        return None

    def _entries(self) -> list[Path]:
        """Everything here that is named like a checkpoint."""
        return [entry for entry in self.run_dir.iterdir() if _NAME.fullmatch(entry.name)]

    def find_resume(self, spec: str | Path | None) -> Path | None:
        """The checkpoint to go on from, verified to the last byte; None for a fresh start.

        Args:
            spec: "auto" takes the newest valid one and says which files of newer ones are damaged; a path takes that
                checkpoint (or the newest one of that run folder) or refuses. None starts fresh.

        Raises:
            EngineError: E5 when the checkpoint is refused or all of them are damaged.
        """
        found = None
        with self.ranks.together("choosing a checkpoint"):
            if self.ranks.is_main and spec is not None:
                named = _NAME.fullmatch(Path(spec).name) if spec != "auto" else None
                found = self._verified(self.run_dir / named[0]) if named else self._newest_valid()
        name = self.ranks.broadcast(found.name if found is not None else None)
        return None if name is None else self.run_dir / name

    def _verified(self, folder: Path) -> Path:
        """An explicitly named checkpoint: no falling back."""
        try:
            if not folder.is_dir():
                raise DamagedError("the folder is missing")
            manifests.verify(folder)
        except DamagedError as error:
            raise EngineError(
                "E5.3",
                f"the checkpoint is damaged: {error}",
                str(folder),
                "nothing was changed",
                "use --resume auto to go back to the newest whole one",
            ) from error
        return folder

    def _newest_valid(self) -> Path | None:
        entries = sorted(self._entries(), key=lambda path: -int(path.name.split("-")[1]))
        damaged, strange = [], []
        for folder in entries:
            if folder.is_symlink() or not folder.is_dir():
                strange.append(folder)
                continue
            try:
                manifest = manifests.verify(folder)
            except DamagedError as error:
                log.warning("%s is damaged (%s); going back to the one before", folder.name, error)
                damaged.append(folder)
                continue
            if manifest["run_id"] == self.run_id:
                return folder
            log.warning("%s belongs to another run and is left alone", folder.name)
            strange.append(folder)
        if damaged:
            raise EngineError(
                "E5.7",
                "every checkpoint of this run is damaged",
                str(self.run_dir),
                "nothing was changed",
                "start a new run in another experiment.output_dir",
            )
        if strange:
            raise EngineError(
                "E2.35",
                f"{strange[0].name} is not this run's checkpoint, and saves would collide with it",
                str(strange[0]),
                "nothing was changed",
                "move it away, or choose another experiment.output_dir",
            )
        log.info("nothing to resume in %s: starting fresh", self.run_dir)
        return None

    def load_state(self, folder: Path) -> EngineState:
        """State of a checkpoint that `find_resume` returned; makes it the end of this folder's history.

        Newer checkpoints (all damaged, unless an older one was named on purpose) are renamed to `.bad-...` or
        `.later-...`, and the pointers are set right.

        Raises:
            EngineError: E5.5 with a list of differences when recipe, data, tokenizer or ranks are not the checkpoint's.
        """
        with self.ranks.together("loading a checkpoint"):
            state = self._read_state(folder)
        with self.ranks.together("setting the pointers"):
            if self.ranks.is_main:
                self._adopt(folder, state)
        self.runtime.status.last_checkpoint = folder.name
        return state

    def _read_state(self, folder: Path) -> EngineState:
        source = folder / ENGINE_STATE
        try:
            trainer = read_state(source, "trainer_state")
            for text in manifests.changes(trainer["identity"], self.identity, self.allow_change, folder):
                log.warning("changed on resume, as allowed: %s", text)
            parts = {name: read_state(source, name) for name in ("optimizer", "scheduler", "scaler")}
            own = f"rng-rank{self.ranks.rank}"
            same_ranks = trainer["identity"].get("world_size", self.ranks.world_size) == self.ranks.world_size
            rng = read_state(source, own) if same_ranks or (source / f"{own}.json").exists() else None
            return EngineState(position=trainer["position"], best=trainer["best"], rng=rng, **parts)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise EngineError(
                "E5.8",
                f"the checkpoint's state cannot be read: {error}",
                str(source),
                "nothing was changed",
                "use --resume auto",
            ) from error

    def _adopt(self, folder: Path, state: EngineState) -> None:
        step = int(folder.name.split("-")[1])
        for newer in [entry for entry in self._entries() if int(entry.name.split("-")[1]) > step]:
            if newer.is_dir() and not newer.is_symlink():
                kind = "later" if self._is_ours(newer) and self._is_whole(newer) else "bad"
                log.warning("%s is set aside as %s", newer.name, _set_aside(newer, kind).name)
        write_json_atomically(self.run_dir / "last.json", {"step": step, "run_id": self.run_id})
        self._best = state.best
        if state.best is None or not self._is_whole(self.path_of(state.best["step"])):
            self._best = self._best_of_manifests(state.best)
        if self._best is not None:
            self._write_best()
        else:
            (self.run_dir / "best.json").unlink(missing_ok=True)

    @staticmethod
    def _is_whole(folder: Path) -> bool:
        try:
            return bool(manifests.verify(folder))
        except (DamagedError, EngineError):
            return False

    def _best_of_manifests(self, lost: dict[str, Any] | None) -> dict[str, Any] | None:
        """The best whole checkpoint by the metrics of the manifests, after the one pointed at was lost."""
        if lost is None:
            return None
        metric, found = lost["metric"], []
        for step in self._steps():
            value = read_json(self.path_of(step) / MANIFEST).get("metrics", {}).get(metric)
            if isinstance(value, int | float) and self._is_whole(self.path_of(step)):
                found.append((value if metric == "loss" else -value, step, value))
        log.warning(
            "the best checkpoint (step %s) is lost; %s",
            lost["step"],
            "the next best takes its place" if found else "no other has a score",
        )
        _, step, value = min(found, default=(0, None, None))
        return None if step is None else {"step": step, "metric": metric, "value": value}


class HostCopies:
    """Copies of tensors in host memory, whose buffers are kept from save to save.

    From a GPU they are pinned: the copy then runs at the speed of the bus. Tensors that share memory (tied
    embeddings) share their copy too, so that whoever writes them still sees that they are one.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A snapshot of `tensors`; the one before of the same kind is overwritten."""
        import torch

        copies, seen, on_gpu = {}, {}, False
        for name, tensor in tensors.items():
            identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if identity in seen and tensor.numel():
                copies[name] = copies[seen[identity]]
                continue
            seen[identity], on_gpu = name, on_gpu or tensor.is_cuda
            buffer = self._buffer(kind, name, tensor)
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _buffer(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        import torch

        buffer = self._buffers.get((kind, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[(kind, name)] = buffer
        return buffer


def _set_aside(path: Path, kind: str) -> Path:
    """Take a folder out of the way without deleting it; of damaged ones only the newest two are kept."""
    aside = path.with_name(f".{kind}-{path.name}-{secrets.token_hex(4)}")
    path.rename(aside)
    old = sorted(path.parent.glob(".bad-checkpoint-*"), key=lambda entry: entry.lstat().st_mtime)
    for entry in old[:-2]:
        shutil.rmtree(entry, ignore_errors=True)
    return aside


def _remove(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one is never taken for whole."""
    trash = folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")
    try:
        folder.rename(trash)
        _reached("trash-renamed", trash)
        shutil.rmtree(trash)
        _reached("trash-removed", trash)
    except OSError as error:
        log.warning("could not remove %s (%s); trying again after the next save", folder.name, error)


def _remove_leftovers(run_dir: Path, kinds: Sequence[str]) -> None:
    for path in run_dir.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and match[1] in kinds and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
