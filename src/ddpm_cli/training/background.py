"""Work that goes on beside the training."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

__all__ = ["Background"]

_Result = TypeVar("_Result")


class Background(Generic[_Result]):
    """One piece of work at a time, in a thread. A process that ends at once does not wait for it."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._outcome: list[_Result | Exception] = []

    def start(self, work: Callable[[], _Result]) -> None:
        """Begin something; the outcome of what was begun before must have been taken."""
        if self._thread:
            raise ValueError("the outcome of the work before was not taken")

        def run() -> None:
            try:
                self._outcome.append(work())
            except Exception as error:
                self._outcome.append(error)

        self._thread = Thread(target=run, daemon=True)
        self._thread.start()

    def outcome(self, wait: bool) -> _Result | Exception | None:
        """Take what was returned or raised; None if nothing was begun, or (unless it is waited for) is done yet."""
        if self._thread is None or (not wait and self._thread.is_alive()):
            return None
        self._thread.join()
        self._thread = None
        return self._outcome.pop()
