"""What will be asked for next, made by a thread while a GPU computes what was asked for last."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Calls of `make`, each begun when the one before it is fetched. Its errors come out where its value would.

    Args:
        make: gives the same at whatever time it runs. Never runs twice at once.
        following: the arguments of the call after one with these.
    """

    def __init__(self, make: Callable[..., Made], following: Callable[..., tuple[int, ...]]) -> None:
        self.make, self.following = make, following
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self.begun: tuple[tuple[int, ...], Future[Made]] | None = None

    def __call__(self, *place: int) -> Made:
        if self.begun is None or self.begun[0] != place:
            self._begin(place)
        made = self.begun[1].result()
        self._begin(self.following(*place))
        return made

    def close(self) -> None:
        """Let the thread go, without waiting for what it has begun: a process that ends waits for every thread."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, place: tuple[int, ...]) -> None:
        self.begun = place, self.thread.submit(self.make, *place)
