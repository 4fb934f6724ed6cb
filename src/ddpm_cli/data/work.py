"""Work on many files: in threads, with progress, and within a budget."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ddpm_cli.machine import usable_cpus

__all__ = ["Budget", "OnProgress", "in_threads", "silent"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
OnProgress = Callable[[str, int, int | None], None]  # what, done, total if that is known


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map` in threads, in order, never far ahead of the consumer. Pillow decodes outside the interpreter's lock."""
    workers = usable_cpus()
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[_Result]] = []
        rest = iter(items)
        try:
            while pending or (pending := [pool.submit(work, item) for item in itertools.islice(rest, 4 * workers)]):
                yield pending.pop(0).result()
                pending += [pool.submit(work, item) for item in itertools.islice(rest, 1)]
        finally:
            for future in pending:
                future.cancel()


class Budget:
    """How much of something several threads may use at once. Whoever needs more than the whole gets the whole, alone.

    A thread that holds a part must not ask for more: it might wait for itself.
    """

    def __init__(self, whole: int) -> None:
        self._whole = self._left = max(1, whole)
        self._returned = threading.Condition()

    @contextlib.contextmanager
    def spend(self, amount: int) -> Iterator[None]:
        """Wait until this much is left, and take it for the block.

        A thread that needs little may overtake one that needs much. In `in_threads` only a few can, since nothing new
        begins far ahead of the oldest.
        """
        amount = min(amount, self._whole)
        with self._returned:
            self._returned.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._returned:
                self._left += amount
                self._returned.notify_all()
