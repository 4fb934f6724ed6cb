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
OnProgress = Callable[[str, int, int | None], None]  # the kind of work, items done, all items or None


def silent(what: str, done: int, total: int | None) -> None:
    """Show no progress."""


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map` in threads, in order, never far ahead of the consumer. Pillow releases the GIL while it decodes."""
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
    """Limits how much of a resource threads use at once. A thread that needs more than the limit runs alone.

    A thread that holds a part must not ask for more: it might deadlock.
    """

    def __init__(self, whole: int) -> None:
        self._whole = self._left = max(1, whole)
        self._returned = threading.Condition()

    @contextlib.contextmanager
    def spend(self, amount: int) -> Iterator[None]:
        """Wait until this amount is free, and hold it during the block.

        A thread that needs little may overtake one that needs much. In `in_threads` only a few can, since it starts no
        item far ahead of the oldest one.
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
