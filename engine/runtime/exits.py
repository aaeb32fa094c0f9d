"""How a run ends: exit codes, the one line that says why, and which of several processes says it."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from engine import errors
from engine.errors import EngineError
from engine.runtime.signals import Stopped
from engine.runtime.streams import prepare_streams

if TYPE_CHECKING:
    from torch import Tensor

_LOST_PEER = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "socket",
    "processgroup",
    "broken pipe",
)
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
# A process at its limit meets it anywhere: in an allocator, in a thread that cannot start, in a library that is not mapped.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "can't start new thread")


class Outcome:
    """How a run ended: exit code, a line for the status file, the error to print, and lines that say how to go on."""

    def __init__(self, code: int, reason: str, error: EngineError | None = None) -> None:
        self.code, self.reason, self.error = code, reason, error
        self.advice: list[str] = []

    @classmethod
    def of(cls, error: BaseException, batch: Mapping[str, Tensor] | None = None) -> Outcome:
        if isinstance(error, Stopped):
            return cls(errors.STOPPED_SAVED if error.saved else errors.STOPPED_UNSAVED, str(error))
        if isinstance(error, KeyboardInterrupt):
            return cls(errors.STOPPED_UNSAVED, "stopped by SIGINT")
        if isinstance(error, SystemExit):
            return cls(error.code if isinstance(error.code, int) else int(error.code is not None), "exit")
        known = classify(error, batch)
        return cls(known.exit_code, str(known), known)


def classify(error: BaseException, batch: Mapping[str, Tensor] | None = None) -> EngineError:
    """Any exception as the one-line kind: memory is E8, lost peers are E9, what nobody foresaw is E1."""
    if isinstance(error, EngineError):
        return error
    text = " ".join(str(error).split())[:300]
    if _out_of_memory(error, text):
        return EngineError(
            "E8.1",
            f"out of memory: {text or type(error).__name__}",
            _shapes(batch),
            "halve training.per_device_train_batch_size and double training.gradient_accumulation_steps"
            if batch
            else "lower evaluation.per_device_eval_batch_size, generation.num_beams or data.max_source_length",
        )
    if any(
        _is_torch(error, name) for name in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
    ) or _mentions(error, text, _LOST_PEER):
        return EngineError(
            "E9.4",
            f"a rank was lost or did not answer in time: {text}",
            _shapes(batch),
            "look at the other ranks' output, then --resume auto",
        )
    if isinstance(error, OSError) and (error.errno in DISK or error.filename):
        return EngineError(
            "E6.5",
            f"a file could not be {'written' if error.errno in DISK else 'used'}: {os.strerror(error.errno or errno.EIO)}",
            str(error.filename2 or error.filename or ""),
            f"{'free some space' if error.errno in DISK else 'see what lies there'}, then --resume auto",
        )
    return EngineError("E1.1", f"{type(error).__name__}: {text}", "", "please report this with the traceback")


def _out_of_memory(error: BaseException, text: str) -> bool:
    # A SystemError comes from C code that gave up without a word, which is what an allocation that failed looks like there.
    if isinstance(error, MemoryError | SystemError) or _is_torch(error, "OutOfMemoryError"):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError | OSError) and any(m in text.lower() for m in _OUT_OF_MEMORY)


def _is_torch(error: BaseException, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("torch") for kind in type(error).__mro__)


def _mentions(error: BaseException, text: str, marks: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError | ConnectionError) and any(mark in text.lower() for mark in marks)


def _shapes(batch: Mapping[str, Tensor] | None) -> str:
    if not batch:
        return ""
    return "micro-batch " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())


def prefix() -> str:
    return f"[rank {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def main_guard(main: Callable[[], int | None]) -> int:
    """Run a command; turn whatever it raises into one line on stderr and an exit code.

    A traceback is printed for bugs (code 1), and for everything with `--traceback` on the command line. Of several
    ranks the one that had the error prints it.
    """
    wants_trace = "--traceback" in sys.argv
    prepare_streams()
    if not wants_trace:
        warnings.simplefilter("ignore")
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return main() or errors.DONE
    except SystemExit as error:  # argparse has printed its own line
        return Outcome.of(error).code
    except BaseException as error:
        outcome = getattr(error, "outcome", None) or Outcome.of(error)
        _tell(error, outcome, wants_trace)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave(outcome.code)
        return outcome.code


def _tell(error: BaseException, outcome: Outcome, wants_trace: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    owner = getattr(outcome.error, "owner", None)
    if owner is None and rank > 0:
        # Failed before the ranks could speak, most likely all in the same way: rank 0 says so, and its end ends this
        # one. A rank that is still there after that was alone with its trouble.
        alone = outcome.error is None or outcome.code == errors.DISTRIBUTED
        time.sleep(0.0 if alone else 3.0)
    if (owner if owner is not None else rank) != rank or (outcome.error is None and rank > 0):
        return
    if wants_trace or outcome.code == errors.BUG:
        traceback.print_exception(error)
    print("\n".join([f"{prefix()}{outcome.reason}", *outcome.advice]), file=sys.stderr, flush=True)


def _leave(code: int) -> None:
    """End this process without the clean-up of libraries, which can wait for ranks that are gone."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=60)  # a save under way is worth waiting for
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
