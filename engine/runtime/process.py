"""One process of a run: what it computes on, the other ranks, signals, run folder, status and log, opened and closed."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import errors
from engine.errors import EngineError
from engine.runtime import console, exits, signals
from engine.runtime.device import build_accelerator, choose_device, choose_precision
from engine.runtime.exits import Outcome, Shapes
from engine.runtime.lock import FolderLock
from engine.runtime.random_state import read_random_state, seed_everything, write_random_state
from engine.runtime.ranks import RankGroup, as_engine_error
from engine.runtime.resume_hint import going_on
from engine.runtime.run_folder import RunFolder, choose_run_folder
from engine.runtime.run_log import RunLog
from engine.runtime.run_status import RunStatus
from engine.runtime.signals import Stopped, StopSignal

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from engine.recipe.schema import Recipe

ENDS_WITH_PARENT = (
    "ENGINE_ENDS_WITH_PARENT"  # in the environment of a run: stop when the process that started it is gone
)

log = logging.getLogger("engine")


def start(recipe: Recipe) -> Runtime:
    """Bring up the device and the ranks as the recipe says. Use as `with start(recipe) as runtime:`.

    Raises:
        EngineError: E2 for settings that the machine or the launcher cannot serve, E9 when the ranks do not find each
            other.
    """
    import torch

    settings = recipe.runtime
    _refuse_unsafe_environment()
    device = choose_device(settings.device)
    if device == "cpu":
        # torch reads it at its first tensor. Large pages are given back as a whole: a run then holds less freed memory.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    precision = choose_precision(recipe.training.precision, device, settings.emulate_fp16_on_cpu)
    accelerator = build_accelerator(device, settings.timeout_seconds, host_too=recipe.distributed.cpu_offload)
    runtime = Runtime(accelerator, precision, settings.timeout_seconds, show_progress=recipe.tracking.progress)
    if settings.num_threads is not None:
        runtime.afterwards.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(settings.num_threads)
    if settings.deterministic:
        runtime.afterwards.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    seed_everything(recipe.training.seed)
    return runtime


class Runtime(AbstractContextManager):
    """One process of a run. Leaving the context writes the status, ends the helpers, and frees the folder.

    Attributes:
        accelerator: prepared with accumulation 1 and no mixed precision of its own; the training loop does both itself.
        ranks: what the processes tell each other.
        status: `step` and `last_checkpoint` as `run_status.json` shows them; the loop keeps `step` up to date.
        signals: stop and save requests; see `requests()`.
        shapes: of the micro-batch that `to_device` moved last; the message names them when memory runs out.
    """

    def __init__(self, accelerator: Accelerator, precision: str, timeout: float, *, show_progress: bool) -> None:
        self.accelerator, self.precision, self.show_progress = accelerator, precision, show_progress
        self.device: torch.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main = self.rank == 0
        self.status = RunStatus(self.rank)
        self.signals = StopSignal(self._give_up, follow_parent=_launched())
        self.ranks = self._join_ranks(timeout)
        self.log = RunLog(self.is_main)
        self.lock: FolderLock | None = None
        self.shapes: Shapes | None = None
        self.afterwards = ExitStack()  # what the process had set before: the next run in it may not say
        self._undo: list[Callable[[], None]] = []

    def _join_ranks(self, timeout: float) -> RankGroup:
        if self.world_size == 1:
            return RankGroup()
        import torch.distributed as dist

        control = None
        if self.device.type == "cuda":  # flags live on the host: a collective on the GPU would wait for the update
            control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        return RankGroup(
            self.rank,
            self.world_size,
            timeout=timeout,
            store=dist.PrefixStore("engine", dist.distributed_c10d._get_default_store()),
            control=control,
            stopping=lambda: self.signals.stopping,
            on_dead_store=self._lose_store,
        )

    # Whole process

    def __enter__(self) -> Runtime:
        self.signals.open()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        outcome = Outcome(errors.DONE, "done") if error is None else self._outcome(error)
        if outcome.code in (errors.STOPPED_SAVED, errors.STOPPED_UNSAVED):
            outcome = replace(outcome, advice=tuple(going_on(self.status, saved=outcome.code == errors.STOPPED_SAVED)))
            log.debug("%s", "\n".join([outcome.reason, *outcome.advice]))  # the console gets it last of all
        self.status.write(outcome.code, outcome.reason)
        if error is not None:
            exits.note(error, outcome)
        # The folder is free before this process waits for others: their end must not keep the next run out.
        if self.lock is not None:
            self.lock.release()
        self.signals.close()
        self.log.close()
        self.afterwards.close()
        # After an orderly end the other ranks are at most a save behind; after a failure they need only read of it.
        self.ranks.leave(patience=30.0 if error is None or isinstance(error, Stopped) else 3.0)
        self.ranks.close()
        if error is None and self.world_size > 1:
            self.accelerator.end_training()  # only where all ranks are well: after a failure it could wait for ever

    def _outcome(self, error: BaseException) -> Outcome:
        """How this run ended, as far as all ranks together know; the others learn of this rank's failure."""
        if not isinstance(error, Exception):  # asked to end: Stopped, Ctrl-C, sys.exit
            outcome = Outcome.of(error)
            if outcome.code == errors.STOPPED_UNSAVED:  # without a word, ranks that wait for this one would wait on
                self.ranks.report(as_engine_error(EngineError("E76.1", outcome.reason), self.rank))
            return outcome
        known = as_engine_error(error, shapes=self.shapes)
        first = self.ranks.reported()
        if known.exit_code == errors.DISTRIBUTED and first is not None:
            return Outcome.of(first)  # this rank only noticed; that one knows why
        if known.exit_code == errors.STORAGE and self.signals.stopping:
            return Outcome(errors.STOPPED_UNSAVED, f"{self.signals.reason}; {known}", known.owner)
        known = as_engine_error(known, self.rank)
        self.ranks.report(known)
        return Outcome.of(known)

    def when_giving_up(self, undo: Callable[[], None]) -> None:
        """Have `undo` called, from the signals' thread, should this process give up in the middle of something."""
        self._undo.append(undo)

    def _give_up(self, reason: str) -> None:
        """Runs in the signals' thread: the main thread may be anywhere, so the process ends here and now."""
        self.status.write(errors.STOPPED_UNSAVED, reason)
        for undo in self._undo:
            with suppress(Exception):
                undo()
        _end_now("\n".join([reason, *going_on(self.status, saved=False)]), errors.STOPPED_UNSAVED)

    def _lose_store(self, reason: str) -> None:
        """Runs in a thread of the ranks, while the main thread waits for a store that will not answer."""
        error = EngineError("E9.5", reason, "", "look at rank 0, then --resume auto")
        self.status.write(errors.DISTRIBUTED, str(error))
        _end_now(str(error), errors.DISTRIBUTED)

    # Run folder

    def open_run(self, recipe: Recipe, resume: str | None = None) -> RunFolder:
        """Choose, create and lock the run folder; start `train.log` and `run_status.json`. The same folder on all
        ranks.

        A folder whose run has finished comes back with `finished` set, unlocked and untouched.
        """
        facts = None
        with self.ranks.together("opening the run folder"):
            if self.is_main:
                folder = choose_run_folder(recipe, resume)
                if not folder.finished:
                    self.hold(FolderLock(folder.path))
                facts = [str(folder.path.absolute()), folder.reused, folder.finished]
        path, reused, finished = self.ranks.broadcast(facts)
        folder = RunFolder(Path(path), reused, finished)
        if not finished:
            self.log.open(folder.path)
            self.status.open(folder.path)
            log.info("run folder: %s (log: train.log in it)", console.from_here(folder.path))
        return folder

    def hold(self, lock: FolderLock) -> None:
        """Take a lock until this context ends. Raises: EngineError E2.30 when another process has it."""
        self.lock = lock
        if note := lock.acquire():
            log.warning(note)

    # Signals

    def requests(self) -> int:
        """At an update boundary: signals.NOTHING, SAVE or STOP, the same on every rank. One small collective."""
        request = self.ranks.highest(self.signals.take())
        if request == signals.STOP:
            # Should the launcher lose patience during the save and kill, this is what remains to be read.
            self.status.write(errors.STOPPED_UNSAVED, "asked to stop; the save was not finished in time")
        return request

    def stop(self, *, saved: bool) -> None:
        """End the run on request: exit code 75 if `saved`, else 76. Raises Stopped."""
        reason = self.signals.reason or "stopped by another rank's signal"
        raise Stopped(f"{reason} after step {self.status.step}", saved=saved)

    # Compute

    def autocast(self) -> AbstractContextManager:
        """Mixed precision of the recipe; the weights stay float32."""
        import torch

        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(
            self.device.type, kinds.get(self.precision, torch.bfloat16), enabled=self.precision in kinds
        )

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16; switched off, it passes everything through."""
        import torch

        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch in host memory on this rank's device. Notes its `shapes`.

        A GPU fetches it from pinned memory when its turn comes; from other memory this process would wait for that.
        """
        self.shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def progress(self, **settings: Any) -> Any:
        """A bar on the main rank's terminal, lines where there is none; silent where the recipe says so."""
        return console.meter(shown=self.show_progress and self.is_main, **settings)

    # Random

    def random_state(self) -> dict[str, Any]:
        """Random generators of this rank: Python's, NumPy's, torch's, and its own GPU's."""
        return read_random_state(self.device)

    def restore_random_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `random_state`."""
        write_random_state(state, self.device)

    def seed_ranks(self, seed: int) -> None:
        """Different dropout on every rank. Call it after the model is built, which must be the same everywhere."""
        seed_everything(seed + 1_000_003 * (self.rank + 1))


def _end_now(line: str, code: int) -> None:
    """End the process from a thread, past `sys.stderr`, whose lock the main thread may hold."""
    with suppress(OSError):
        os.write(2, f"{exits.prefix()}{line}\n".encode())
    os._exit(code)


def _refuse_unsafe_environment() -> None:
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(name):
        raise EngineError("E2.40", f"{name} is set: it lets files run code when they are loaded", name, f"unset {name}")


def _launched() -> bool:
    """Whether the parent process is a launcher, with which this one should end."""
    return any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", ENDS_WITH_PARENT))
