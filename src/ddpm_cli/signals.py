"""Signals to stop, which let a step of training end before its run does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["exit_while_importing", "stop_signals"]

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


@contextmanager
def exit_while_importing(name: str) -> Iterator[None]:
    """Let Ctrl-C end the process at once while this module is being imported. Nothing has begun then.

    Extension modules that are being loaded may lose a KeyboardInterrupt, or abort the process.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else the caller handles or ignores it
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if getattr(spec, "_initializing", False):
            os._exit(128 + number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
