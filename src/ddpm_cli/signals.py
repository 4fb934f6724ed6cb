"""Signals to stop, which let a step of training end before its run does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

__all__ = ["stop_signals"]

_ONE_SIGNAL = 1.0  # seconds; batch system and launcher may both send the same signal


@contextmanager
def stop_signals(numbers: Iterable[int], again: Callable[[int], object]) -> Iterator[list[int]]:
    """Catch these signals: the first one is appended to the list that this yields.

    again: called with the number of a second one, to exit at once.
    """
    caught: list[int] = []
    first = 0.0

    def remember(number: int, frame: object) -> None:
        nonlocal first
        if not caught:
            caught.append(number)
            first = time.monotonic()
        elif time.monotonic() - first > _ONE_SIGNAL:
            again(number)

    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
