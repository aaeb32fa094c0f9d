"""Checkpoints that are whole or absent: save, rotate, point at the best, verify, resume.

A save goes through these stages, so that a kill at any instant leaves every `checkpoint-<step>/` complete:

1. all ranks stand at the same update boundary; rank 0 makes `.tmp-checkpoint-<step>-<nonce>/` beside the target;
2. every rank writes its own random state there, forces it to the disk, and sends the others its hashes or its failure;
3. rank 0 writes weights, optimizer and trainer state, forces them to the disk and hashes them;
4. rank 0 writes `manifest.json`, the last file, which names every other one with size and sha256;
5. rank 0 renames the folder to its final name and forces the parent folder to the disk;
6. only now the pointers `last.json` and `best.json` move, and only after that old checkpoints go, renamed first.

Stages 3 to 6 are rank 0's alone and run in a thread, on copies in host memory, while training goes on. The other
ranks learn how they ended when the save is joined (`wait`), before the next save and at the end of the run.

A save that fails raises E6 on all ranks, at the call that learns of it: `save` for stages 1 and 2 and for the save
before, `wait` for stages 3 to 6, and the end of the `with` block, which waits. Under `on_error: continue` the same calls
warn instead, and `wait` returns False until a save has succeeded. What is no failed write is raised either way.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoints import manifest
from engine.checkpoints.history import History
from engine.checkpoints.host_copies import HostCopies
from engine.checkpoints.identity import changes, check_allowed, scale_of_scores
from engine.checkpoints.state_files import flatten_state, read_state, write_state
from engine.errors import STORAGE, EngineError
from engine.runtime.atomic import file_record, free_bytes, fsync_file, reached, storage_error, write_json_atomically
from engine.runtime.faults import blaming
from engine.runtime.ranks import as_engine_error
from engine.runtime.run_folder import MANIFEST

if TYPE_CHECKING:
    from torch import Tensor

    from engine.runtime.process import Runtime

log = logging.getLogger("engine.checkpoints")
ENGINE_STATE = "engine_state"
_SAFE = "earlier checkpoints are untouched"
_SLACK = 4 << 20  # bytes of a checkpoint that are not tensors: tokenizer, configs, manifest


@dataclass
class EngineState:
    """Everything beside the weights that the next update depends on.

    Attributes:
        position: the trainer's own counters, JSON-safe.
        best: {"step", "metric", "value"} of the best evaluation so far, or None. Once loaded: of those whose checkpoint is
            still there, and None where this run scores otherwise.
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
    small: dict[str, tuple[Any, Mapping[str, Tensor]]]
    metrics: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run folder. Every method is called by all ranks together.

    Args:
        run_dir: the run folder, already locked by this run.
        runtime: for the ranks, the status file, and giving up in the middle of a save.
        save_total_limit: latest checkpoints kept, the best beside them; None keeps all.
        sync: write in the foreground, without copies in host memory.
        on_error: "continue" turns a failed save into a warning.
        identity: `identity.identity_of(...)`; a resume compares it with the checkpoint's.
        allow_change: keys of the identity that the user allows to differ.
        copied: the tensors to save are nobody else's (gathered from parts), so a save in the background takes no copies.
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
        copied: bool = False,
    ) -> None:
        check_allowed(allow_change)
        self.run_dir, self.runtime, self.ranks = run_dir, runtime, runtime.ranks
        self.sync, self.on_error, self.copied = sync, on_error, copied
        self.identity, self.allow_change = dict(identity), tuple(allow_change)
        self._thread: threading.Thread | None = None
        self._pending: int | None = None  # step of the save that is not joined yet; the same on all ranks
        self._failure: BaseException | None = None
        self._whole = True  # the latest save, as far as it is joined
        self._temp: Path | None = None
        self.history = History(run_dir, save_total_limit)
        self._copies = HostCopies()
        with self.ranks.together("looking for earlier checkpoints"):
            if self.ranks.is_main:
                self.history.open()
        runtime.when_giving_up(self._abandon)

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
    ) -> None:
        """Save everything as `checkpoint-<step>/`, after joining the save before. `wait` says whether it is whole.

        Args:
            weights: gives rank 0 the live tensors; called on all ranks, which gather them where the model is sharded.
            write_model: writes the plain model folder from such a mapping; must not read the live weights, which move
                on.
            metrics: kept in the manifest, to find the best checkpoint again should `best.json` be lost.

        Raises:
            EngineError: E6 on all ranks; see the rule at the top of this file.
        """
        self.wait()
        with self._failing_softly():
            with self.ranks.together("gathering what is saved"), self._as_storage_error(self.run_dir):
                live = weights()
            live = live if self.ranks.is_main else {}
            optimizer = flatten_state(state.optimizer) if self.ranks.is_main else (None, {})
            folder = self._begin(step, [*live.values(), *optimizer[1].values()])
            rank_files = self._write_rank_files(folder, state)
            self._pending = step
        if self._pending is not None and self.ranks.is_main:
            trainer = {"step": step, "position": state.position, "best": state.best, "identity": self.identity}
            small = {"scheduler": state.scheduler, "scaler": state.scaler, "trainer_state": trainer}
            # Flattened now: the live objects move on while the save is written.
            flat = {name: flatten_state(value) for name, value in small.items()}
            self.history.set_best(state.best)
            self._launch(_Save(step, folder, rank_files, live, write_model, optimizer, flat, dict(metrics or {})))
        if self.sync:
            self.wait()

    def wait(self) -> bool:
        """Join the save under way, if there is one. True when the latest save is whole, or none was ever started.

        Raises:
            EngineError: E6 on all ranks when it failed; see the rule at the top of this file.
        """
        if self._pending is not None:
            step, self._pending = self._pending, None
            with self._failing_softly():
                self._join()
                self.runtime.status.last_checkpoint = self.history.path_of(step).name
        return self._whole

    @contextmanager
    def _failing_softly(self) -> Iterator[None]:
        """The rule for failed saves: under `on_error: continue` an E6 is a warning, and `wait` returns False."""
        self._whole = False
        try:
            yield
            self._whole = True
        except EngineError as error:
            self._drop_temp()
            if self.on_error != "continue" or error.exit_code != STORAGE:
                raise
            log.warning("%s; going on (checkpoint.on_save_error: continue)", error)

    def _join(self) -> None:
        with self.ranks.together("joining a save"):
            if self._thread is not None:
                self._thread.join()
            self._thread, failure, self._failure = None, self._failure, None
            if failure is not None:
                raise failure if isinstance(failure, Exception) else as_engine_error(failure)

    def _begin(self, step: int, tensors: Sequence[Tensor]) -> Path:
        """Stage 1: room on the disk, and the temporary folder, whose name all ranks get."""
        name = None
        with self.ranks.together("starting a save"):
            if self.ranks.is_main:
                need = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _SLACK
                if (free := free_bytes(self.run_dir)) < need:
                    what = f"not enough space for a checkpoint: {need >> 20} MiB needed, {free >> 20} MiB free"
                    raise EngineError(
                        "E6.4", what, str(self.run_dir), "free some space, then --resume auto", safe=_SAFE
                    )
                self._temp = self.run_dir / f".tmp-checkpoint-{step}-{secrets.token_hex(4)}"
                name = self._temp.name
                with self._as_storage_error(self._temp):
                    (self._temp / ENGINE_STATE).mkdir(parents=True)
                    reached("temp-made", self._temp)
        return self.run_dir / self.ranks.broadcast(name)

    def _write_rank_files(self, folder: Path, state: EngineState) -> dict[str, Any]:
        """Stage 2: this rank's random state; returns name -> record of all ranks' files."""
        records = {}
        with self.ranks.together("writing rank files"), self._as_storage_error(folder):
            for path in write_state(folder / ENGINE_STATE, f"rng-rank{self.ranks.rank}", *flatten_state(state.rng)):
                records[path.relative_to(folder).as_posix()] = file_record(path)
                reached("file", path)
        everyone = self.ranks.exchange("hashes of a save", records)
        return {name: record for part in everyone for name, record in part.items()}

    def _launch(self, job: _Save) -> None:
        if self.sync:
            return self._complete(job)
        try:
            if not self.copied:
                job.weights = self._copies.take("model", job.weights)
                job.optimizer = (job.optimizer[0], self._copies.take("optimizer", job.optimizer[1]))
        except Exception as error:  # most likely no memory for the copies; the other ranks read of it in `wait`
            self._failure = error
            return self._drop_temp()
        self._thread = threading.Thread(target=self._complete, args=(job,), name="save")
        self._thread.start()
        return None

    def _complete(self, job: _Save) -> None:
        """Stages 3 to 6, on rank 0, usually in a thread; a failure is kept for `wait`."""
        try:
            with self._as_storage_error(job.folder):
                self._write_contents(job)
                self._write_manifest(job)
                self._rename(job)
            with self._as_storage_error(self.run_dir):
                self._publish(job)
        except BaseException as error:  # whatever it is, it must not die with the thread
            self._failure = error
            self._drop_temp()
            self.history.recover()

    def _write_contents(self, job: _Save) -> None:
        """Stage 3: weights, optimizer and trainer state."""
        job.write_model(job.folder, job.weights)
        reached("model", job.folder)
        for name, value in {"optimizer": job.optimizer, **job.small}.items():
            write_state(job.folder / ENGINE_STATE, name, *value)

    def _write_manifest(self, job: _Save) -> None:
        """Stages 3 and 4: everything forced to the disk and hashed; then the file that names it all."""
        files = {}
        mode = (job.folder / ENGINE_STATE / "trainer_state.json").stat().st_mode
        for name in sorted(manifest.list_files(job.folder)):
            (job.folder / name).chmod(mode)  # safetensors files come out readable by their owner alone
            files[name] = file_record(job.folder / name)
            reached("file", job.folder / name)
        if lost := [name for name, record in job.rank_files.items() if files.get(name) != record]:
            raise OSError(f"{lost[0]} did not arrive as its rank wrote it")
        for folder in {(job.folder / name).parent for name in files}:
            fsync_file(folder)
        facts = {"run_id": self.history.run_id, "step": job.step, "world_size": self.ranks.world_size}
        facts |= {"metrics": job.metrics, "identity_sha256": manifest.digest_of(self.identity)}
        facts |= {"data": self.identity.get("data"), "tokenizer": self.identity.get("tokenizer")}
        reached("before-manifest", job.folder)
        write_json_atomically(job.folder / MANIFEST, manifest.build_manifest(files, **facts))
        reached("after-manifest", job.folder)

    def _rename(self, job: _Save) -> None:
        """Stage 5: the instant at which the checkpoint comes to be."""
        final = self.history.path_of(job.step)
        self.history.make_way(final)
        reached("before-rename", job.folder)
        job.folder.rename(final)
        reached("after-rename", final)
        fsync_file(self.run_dir)
        self._temp = None

    def _publish(self, job: _Save) -> None:
        """Stage 6: pointers, then rotation."""
        self.runtime.status.last_checkpoint = self.history.path_of(job.step).name
        self.history.set_last(job.step)
        reached("after-last", self.run_dir / "last.json")
        self.history.point_at_best()
        reached("after-best", self.run_dir / "best.json")
        self.history.rotate()

    @contextmanager
    def _as_storage_error(self, path: Path) -> Iterator[None]:
        """A failed write becomes E6, whatever the library calls it; what is no failed write stays what it is."""
        try:
            yield
        except Exception as error:
            writes = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"
            if not writes:
                raise
            raise storage_error(error, path, "saving a checkpoint", _SAFE) from error

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

    # Result

    def step_to_hand_on(self, step: int, metric: str) -> int:
        """`step` where its checkpoint is there; else, after failed saves, that of the best by `metric`, or of the last.

        Raises:
            EngineError: E6.10 where no checkpoint is there.
        """
        with self.ranks.together("choosing the final model"):
            if self.ranks.is_main:
                step = self.history.step_to_hand_on(step, metric)
        return self.ranks.broadcast(step)

    # Resume

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
                found = self.history.choose(spec)
        name = self.ranks.broadcast(found.name if found is not None else None)
        return None if name is None else self.run_dir / name

    def load_state(self, folder: Path) -> EngineState:
        """State of a checkpoint that `find_resume` returned; makes it the end of this folder's history.

        In this order: the state is read and held against this run first, and only then is anything in the folder moved.
        So a refused resume changes nothing, and the same command with the old recipe still finds every checkpoint.
        Newer checkpoints (all damaged, unless an older one was named on purpose) are renamed to `.bad-...` or
        `.later-...`, and the pointers are set right.

        Raises:
            EngineError: E5.5 with a list of differences when recipe, data, tokenizer or ranks are not the checkpoint's.
        """
        with self.ranks.together("loading a checkpoint"), refusing(folder):
            state, changed = self._read_state(folder)
        best = None
        with self.ranks.together("setting the pointers"):
            if self.ranks.is_main:
                best = self.history.adopt(folder, state.best)
        state.best = self.ranks.broadcast(best)
        if state.best is not None and (keys := scale_of_scores(changed)):
            log.warning("the best so far was scored with another %s: the search for the best begins anew", keys[0])
            state.best = None  # its checkpoint stays, and stays pointed at until there is a new one
        self.runtime.status.last_checkpoint = folder.name
        return state

    def _read_state(self, folder: Path) -> tuple[EngineState, list[str]]:
        """And the keys of the identity that have changed, as allowed."""
        source = folder / ENGINE_STATE
        trainer = read_state(source, "trainer_state")
        changed = changes(trainer["identity"], self.identity, self.allow_change, folder)
        for text in changed.values():
            log.warning("changed on resume, as allowed: %s", text)
        parts = {name: read_state(source, name) for name in ("optimizer", "scheduler", "scaler")}
        own = f"rng-rank{self.ranks.rank}"
        same_ranks = trainer["identity"].get("world_size", self.ranks.world_size) == self.ranks.world_size
        rng = read_state(source, own) if same_ranks or (source / f"{own}.json").exists() else None
        return EngineState(position=trainer["position"], best=_best(trainer["best"]), rng=rng, **parts), [*changed]


def refusing(folder: Path) -> AbstractContextManager[None]:
    """While a checkpoint's contents are put in place: whatever does not fit is the checkpoint's fault, E5.8."""
    next = "resume with the recipe and the versions that wrote it, or start a new run"
    return blaming("E5.8", "the checkpoint does not fit this run", folder, next)


def _best(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The best so far as a checkpoint holds it. Raises: ValueError for what is no such record."""
    kinds = {"step": int, "metric": str, "value": int | float}
    if record is not None and not all(isinstance(record[name], kind) for name, kind in kinds.items()):
        raise ValueError(f"the best so far is {record}")
    return record
