"""Runs a task in a background thread, such as writing a checkpoint while training continues."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

__all__ = ["Background"]

_Result = TypeVar("_Result")


class Background(Generic[_Result]):
    """Runs one task at a time in a daemon thread, so that a process that must exit does not wait for it."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._outcome: list[_Result | Exception] = []

    def start(self, work: Callable[[], _Result]) -> None:
        """Start a task. Raises ValueError if the outcome of the previous one was not taken."""
        if self._thread:
            raise ValueError("the outcome of the previous task was not taken")

        def run() -> None:
            try:
                self._outcome.append(work())
            except Exception as error:
                self._outcome.append(error)

        self._thread = Thread(target=run, daemon=True)
        self._thread.start()

    def outcome(self, wait: bool) -> _Result | Exception | None:
        """Take the result or the exception of the task. None if there is no task, or without `wait` if it runs."""
        if self._thread is None or (not wait and self._thread.is_alive()):
            return None
        self._thread.join()
        self._thread = None
        return self._outcome.pop()
