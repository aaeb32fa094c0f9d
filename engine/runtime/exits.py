"""How a run ends: exit codes, the one line that says why, and which of several processes prints it."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine import errors
from engine.errors import EngineError
from engine.runtime.signals import Stopped
from engine.runtime.streams import prepare_streams

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
# Torch has types for a full GPU and for its process groups. The CPU's allocator, gloo and NCCL also raise plain
# RuntimeErrors, which only their words tell from a bug.
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "can't start new thread")
_PEER_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket", "processgroup")
_PEER_WORDS += ("broken pipe",)

# A library that cannot be mapped for want of memory is an ImportError.
_WORDY = (RuntimeError, ConnectionError, ImportError)

Shapes = Mapping[str, Sequence[int]]  # of the micro-batch at work, by tensor


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, the line for `run_status.json` and stderr, the rank that prints it, and how to go on.

    `owner` None means that the ranks have not spoken about it: each decides for itself, see `_print_outcome`.
    """

    code: int
    reason: str
    owner: int | None = None
    advice: tuple[str, ...] = ()  # lines below the reason

    @classmethod
    def of(cls, error: BaseException) -> Outcome:
        if isinstance(error, Stopped):
            return cls(errors.STOPPED_SAVED if error.saved else errors.STOPPED_UNSAVED, str(error), owner=0)
        if isinstance(error, KeyboardInterrupt):
            return cls(errors.STOPPED_UNSAVED, "stopped by SIGINT", owner=0)
        if isinstance(error, SystemExit):
            return cls(error.code if isinstance(error.code, int) else int(error.code is not None), "exit", owner=0)
        known = classify(error)
        return cls(known.exit_code, str(known), known.owner)


def classify(error: BaseException, shapes: Shapes | None = None) -> EngineError:
    """Any exception as an EngineError: memory is E8, lost ranks are E9, disks are E6, what nobody foresaw is E1.

    Args:
        shapes: of the micro-batch at work; the message names them, and what to change depends on whether there is one.
    """
    if isinstance(error, EngineError):
        return error
    text = " ".join(str(error).split())[:300]
    for types, words, known in _kinds():
        wordy = isinstance(error, _WORDY) and any(word in text.lower() for word in words)
        if wordy or isinstance(error, types):
            return known(text or type(error).__name__, shapes)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return _out_of_memory(text, shapes)
    if isinstance(error, OSError) and (error.errno in DISK or error.filename):
        return _storage(error)
    return EngineError("E1.1", f"{type(error).__name__}: {text}", "", "please report this with the traceback")


def _kinds() -> list[tuple[tuple[type, ...], tuple[str, ...], Callable[[str, Shapes | None], EngineError]]]:
    """(types, words of errors without a type of their own, what to make of them), the first match first."""
    torch = sys.modules.get("torch")  # where it is not imported, no error can be one of its own
    # A SystemError comes from C code that gave up without a word, as it does where an allocation failed.
    memory = (MemoryError, SystemError, *([torch.OutOfMemoryError] if torch else []))
    return [
        (memory, _MEMORY_WORDS, _out_of_memory),
        ((torch.distributed.DistError,) if torch else (), _PEER_WORDS, _lost_rank),
    ]


def _out_of_memory(text: str, shapes: Shapes | None) -> EngineError:
    smaller = "halve training.per_device_train_batch_size and double training.gradient_accumulation_steps"
    if not shapes:
        smaller = "lower evaluation.per_device_eval_batch_size, generation.num_beams or data.max_source_length"
    return EngineError("E8.1", f"out of memory: {text}", _shown(shapes), smaller)


def _lost_rank(text: str, shapes: Shapes | None) -> EngineError:
    what = f"a rank was lost or did not answer in time: {text}"
    return EngineError("E9.4", what, _shown(shapes), "look at the other ranks' output, then --resume auto")


def _storage(error: OSError) -> EngineError:
    verb, next = ("written", "free some space") if error.errno in DISK else ("used", "see what lies there")
    what = f"a file could not be {verb}: {os.strerror(error.errno or errno.EIO)}"
    return EngineError("E6.5", what, str(error.filename2 or error.filename or ""), f"{next}, then --resume auto")


def _shown(shapes: Shapes | None) -> str:
    return "micro-batch " + ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()) if shapes else ""


def prefix() -> str:
    return f"[rank {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


# What a Runtime found out about its end: it knows the shapes and the other ranks, `main_guard` knows neither. The
# exception is named by its id, because holding it would hold its frames, and with them a model, in memory.
_noted: tuple[int, Outcome] | None = None


def note(error: BaseException, outcome: Outcome) -> None:
    """Tell `main_guard` how the run ended that this exception is leaving."""
    global _noted
    _noted = id(error), outcome


def outcome_of(error: BaseException) -> Outcome:
    """What the run noted about its end, or what the exception alone says."""
    return _noted[1] if _noted is not None and _noted[0] == id(error) else Outcome.of(error)


def main_guard(main: Callable[[], int | None]) -> int:
    """Run a command; turn whatever it raises into one line on stderr and an exit code.

    A traceback is printed for bugs (code 1), and for everything with `--traceback` on the command line. Of several
    ranks the one that had the error prints it.
    """
    wants_trace = "--traceback" in sys.argv
    prepare_streams()
    if not wants_trace:
        _quieten_libraries()
    try:
        return main() or errors.DONE
    except SystemExit as error:  # argparse has printed its own line
        return Outcome.of(error).code
    except BaseException as error:
        outcome = outcome_of(error)
        _print_outcome(error, outcome, wants_trace)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave(outcome.code)
        return outcome.code


def _quieten_libraries() -> None:
    warnings.simplefilter("ignore")
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _print_outcome(error: BaseException, outcome: Outcome, wants_trace: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if outcome.owner is None and rank > 0 and outcome.code != errors.DISTRIBUTED:
        # Failed before the ranks could speak, most likely all in the same way: rank 0 says so, and when it ends, the
        # launcher ends this process too. A rank that is still there after that was alone with its trouble.
        time.sleep(3.0)
    if outcome.owner not in (None, rank):
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
