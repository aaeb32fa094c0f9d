"""The process around a run: device, ranks, seeds, signals, exit codes, run folder. Importing it loads nothing heavy."""

from __future__ import annotations

import datetime
import logging
import os
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import errors
from engine.errors import EngineError
from engine.runtime import console, signals
from engine.runtime.exits import Outcome, main_guard, prefix
from engine.runtime.lock import FolderLock
from engine.runtime.ranks import RankGroup, as_engine_error
from engine.runtime.resume_hint import going_on
from engine.runtime.run_folder import RunFolder, choose_run_folder
from engine.runtime.run_log import RunLog
from engine.runtime.run_status import RunStatus
from engine.runtime.signals import Stopped, StopSignal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engine.recipe.schema import Recipe

__all__ = ["Runtime", "main_guard", "seed_everything", "start"]
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
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = _choose_device(settings.device)
    precision = _choose_precision(recipe.training.precision, device, settings.emulate_fp16_on_cpu)
    accelerator = _build_accelerator(device, settings.timeout_seconds)
    runtime = Runtime(accelerator, precision, timeout=settings.timeout_seconds)
    runtime.show_progress = recipe.tracking.progress
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    seed_everything(recipe.training.seed)
    return runtime


class Runtime(AbstractContextManager):
    """One process of a run. Leaving the context writes the status, ends the helpers, and frees the folder.

    Attributes:
        accelerator: prepared with accumulation 1 and no mixed precision of its own; the training loop does both itself.
        ranks: what the processes tell each other; its methods are also reachable here.
        status: `step` and `last_checkpoint` as `run_status.json` shows them; the loop keeps `step` up to date.
        signals: stop and save requests; see `requests()`.
        batch: the micro-batch at work; its shapes are told when memory runs out.
    """

    def __init__(self, accelerator: Any, precision: str, *, timeout: float = 1800) -> None:
        self.accelerator, self.precision = accelerator, precision
        self.device: torch.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main = self.rank == 0
        self.ranks = _rank_group(self.rank, self.world_size, timeout, self.device)
        self.signals = StopSignal(self._give_up, follow_parent=_launched())
        self.ranks.hurried = lambda: self.signals.stopping
        self.ranks.store_is_dead = self._lost_store
        self.status = RunStatus(self.rank)
        self.log = RunLog(self.is_main)
        self.lock: FolderLock | None = None
        self.show_progress = True
        self.batch: Mapping[str, Tensor] | None = None
        self.abandon: list[Callable[[], None]] = []  # undo what a half-done save left; called when giving up
        self.gather, self.broadcast = self.ranks.gather, self.ranks.broadcast
        self.agree, self.together, self.any_rank = self.ranks.agree, self.ranks.together, self.ranks.any_rank
        self.sum_across_ranks, self.wait_for_all = self.ranks.sum_across_ranks, self.ranks.wait_for_all

    # Whole process

    def __enter__(self) -> Runtime:
        self.signals.open()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.status.write(errors.DONE, "done")
        else:
            outcome = self._outcome(error)
            if outcome.code in (errors.STOPPED_SAVED, errors.STOPPED_UNSAVED):
                outcome.advice = going_on(self.status, saved=outcome.code == errors.STOPPED_SAVED)
                log.debug("%s", "\n".join([outcome.reason, *outcome.advice]))  # the console gets it last of all
            error.outcome = outcome  # main_guard tells it; the exception itself goes on to callers of the Python API
            self.status.write(outcome.code, outcome.reason)
        if self.lock is not None:
            self.lock.release()
        self.signals.close()
        self.log.close()
        # After an orderly end the other ranks are at most a save behind; after a failure they need only hear of it.
        self.ranks.leave(patience=30.0 if error is None or isinstance(error, Stopped) else 3.0)
        self.ranks.close()
        if error is None and self.world_size > 1:
            self.accelerator.end_training()  # only where all ranks are well: after a failure it could wait for ever

    def _outcome(self, error: BaseException) -> Outcome:
        outcome = Outcome.of(error, self.batch)
        if outcome.error is None:
            if outcome.code == errors.STOPPED_UNSAVED:  # ranks that wait for this one would wait in vain
                self.ranks.report(as_engine_error(EngineError("E76.1", outcome.reason), self.rank))
            return outcome
        first = self.ranks.reported()
        if outcome.code == errors.DISTRIBUTED and first is not None:
            return Outcome.of(first)  # this rank only noticed; that one knows why
        if outcome.code == errors.STORAGE and self.signals.stopping:
            return Outcome(errors.STOPPED_UNSAVED, f"{self.signals.reason}; {outcome.reason}", outcome.error)
        as_engine_error(outcome.error, self.rank)
        self.ranks.report(outcome.error)
        return outcome

    def _give_up(self, reason: str) -> None:
        """Runs in the signal thread: the main thread may be anywhere, so the process ends here and now."""
        self.status.write(errors.STOPPED_UNSAVED, reason)
        for undo in self.abandon:
            with suppress(Exception):
                undo()
        _end_now("\n".join([reason, *going_on(self.status, saved=False)]), errors.STOPPED_UNSAVED)

    def _lost_store(self, reason: str) -> None:
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
                    self._lock(folder.path)
                facts = [str(folder.path.absolute()), folder.reused, folder.finished]
        path, reused, finished = self.ranks.broadcast(facts)
        folder = RunFolder(Path(path), reused, finished)
        if not finished:
            self.log.open(folder.path)
            self.status.open(folder.path)
            log.info("run folder: %s (log: train.log in it)", console.from_here(folder.path))
        return folder

    def _lock(self, path: Path) -> None:
        self.lock = FolderLock(path)
        if note := self.lock.acquire():
            log.warning(note)

    # Signals

    def requests(self) -> int:
        """At an update boundary: stopping.NOTHING, SAVE or STOP, the same on every rank. One small collective."""
        request = self.ranks.highest(self.signals.take())
        if request == signals.STOP:
            # Should the launcher lose patience during the save and kill, this is what remains to be read.
            self.status.write(errors.STOPPED_UNSAVED, "told to stop; the save was not finished in time")
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
        """The batch on this rank's device; copies from pinned memory overlap with computation."""
        self.batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return self.batch

    def progress(self, **settings: Any) -> Any:
        """A bar on the main rank's terminal, lines where there is none; silent where the recipe says so."""
        return console.meter(shown=self.show_progress and self.is_main, **settings)

    # Random

    def random_state(self) -> dict[str, Any]:
        """Random generators of this rank: Python's, NumPy's, torch's, and its own GPU's."""
        import numpy
        import torch

        state = {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(legacy=True),
            "torch": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore_random_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `random_state`."""
        import numpy
        import torch

        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def seed_ranks(self, seed: int) -> None:
        """Different dropout on every rank. Call it after the model is built, which must be the same everywhere."""
        seed_everything(seed + 1_000_003 * (self.rank + 1))


def _end_now(line: str, code: int) -> None:
    """End the process from a thread, past `sys.stderr`, whose lock the main thread may hold."""
    with suppress(OSError):
        os.write(2, f"{prefix()}{line}\n".encode())
    os._exit(code)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (NumPy takes 32 bits)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# Starting


def _refuse_unsafe_environment() -> None:
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    if os.environ.get(name):
        raise EngineError("E2.40", f"{name} is set: it lets files run code when they are loaded", name, f"unset {name}")


def _choose_device(wanted: str) -> str:
    """ "cpu", "cuda" (the local rank's GPU) or "cuda:N"."""
    import torch

    if wanted == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if wanted != "auto":
            log.warning("runtime.device is %s, but there is no usable CUDA GPU: running on the CPU", wanted)
        return "cpu"
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") and wanted == "auto":
        return "cpu"
    if wanted in ("auto", "cuda"):
        return "cuda"
    index, count = int(wanted.removeprefix("cuda:")), torch.cuda.device_count()
    if index >= count:
        raise EngineError(
            "E2.41",
            f"runtime.device is {wanted}, but the GPUs are numbered 0 to {count - 1}",
            "runtime.device",
            "choose one of them",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EngineError(
            "E2.42",
            f"runtime.device is {wanted}, but each of several ranks needs its own GPU",
            "runtime.device",
            "use runtime.device=auto",
        )
    return wanted


def _choose_precision(wanted: str, device: str, emulate: bool) -> str:
    """The recipe's precision made concrete: fp32, bf16 or fp16."""
    import torch

    has_bf16 = device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp32"
    if wanted == "bf16" and device != "cpu" and not has_bf16:
        raise EngineError("E2.43", "this GPU has no bf16", "precision", "use fp16 or fp32")
    if wanted == "fp16" and device == "cpu" and not emulate:
        raise EngineError(
            "E2.44",
            "fp16 needs a GPU: on the CPU it would be slower than fp32 and no smaller",
            "precision",
            "use fp32 or bf16",
        )
    return wanted


def _build_accelerator(device: str, timeout: int) -> Any:
    # Accelerate lets the environment override the constructor here; the loop does its own accumulation.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    if PartialState._shared_state and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # an earlier run of this process, perhaps on another device
        GradientState._reset_state()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            # The loop opens autocast and owns the scaler; Accelerate's wrapper would add fp32 copies of the logits.
            mixed_precision="no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout))],
        )
    finally:
        if device.startswith("cuda:"):
            del os.environ["ACCELERATE_TORCH_DEVICE"]
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        kind = accelerator.distributed_type.value
        raise EngineError(
            "E2.45",
            f"launched for {kind}, which this engine does not run",
            "accelerate launch",
            "launch plain data parallelism (--multi_gpu)",
        )
    return accelerator


def _rank_group(rank: int, world_size: int, timeout: float, device: torch.device) -> RankGroup:
    if world_size == 1:
        return RankGroup()
    import torch.distributed as dist

    store = dist.PrefixStore("engine", dist.distributed_c10d._get_default_store())
    control = None
    if device.type == "cuda":  # flags live on the host: a collective on the GPU would wait for the update to end
        control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    return RankGroup(rank, world_size, timeout=timeout, store=store, control=control)


def _launched() -> bool:
    """Whether the parent process is a launcher, with which this one should end."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
