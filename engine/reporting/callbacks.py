"""Hooks of the user's: objects that hear of rows, checkpoints and results while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.errors import EngineError
from engine.runtime.faults import at_line, first_line

HOOKS = ("on_log", "on_evaluation", "on_save", "on_end")


class Callbacks:
    """Calls the user's hooks, on the main rank. The first that fails is the last one called: the run saves and ends.

    Args:
        objects: each with some of the methods `on_log(row)`, `on_evaluation(row)`, `on_save(path)`, `on_end(results)`.
        stop: asks the loop to stop at its next boundary.

    Raises:
        EngineError: E2.84 for an object without such a method, or with another one named `on_...`.
    """

    def __init__(
        self, objects: Sequence[Any] = (), *, is_main: bool = True, stop: Callable[[str], None] | None = None
    ) -> None:
        for item in objects:
            named = {name for name in dir(item) if name.startswith("on_")}
            if not named or not named <= set(HOOKS):
                wrong = f"has {', '.join(sorted(named - set(HOOKS)))}" if named else "has no method of ours"
                what = f"a callback of type {type(item).__name__} {wrong}"
                raise EngineError("E2.84", what, "callbacks", f"there are {', '.join(HOOKS)}")
        self.objects, self.stop = (list(objects) if is_main else []), stop
        self.failure: EngineError | None = None

    def call(self, hook: str, value: Any, step: int) -> None:
        for item in self.objects if self.failure is None else ():
            try:
                getattr(item, hook, _nothing)(dict(value) if isinstance(value, Mapping) else value)
            except Exception as error:  # code of the user's
                what = f"callback {type(item).__name__}.{hook} failed{at_line(error)}: {first_line(error)}"
                self.failure = EngineError("E2.85", what, f"step {step}", "correct it, then --resume auto")
                self.failure.__cause__ = error
                if self.stop is not None:
                    self.stop("a callback failed")
                return

    def failed(self, safe: str) -> EngineError | None:
        """The failure, saying what is safe; None where all went well."""
        if self.failure is not None:
            self.failure = _with_safe(self.failure, safe)
        return self.failure


def _nothing(value: Any) -> None:
    """The hook that an object does not have."""


def _with_safe(error: EngineError, safe: str) -> EngineError:
    told = EngineError(error.code, error.what, error.where, error.next, safe=safe)
    told.__cause__ = error.__cause__
    return told
