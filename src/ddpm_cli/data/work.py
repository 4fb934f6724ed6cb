"""Work on many files: in threads, with progress."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["OnProgress", "in_threads", "silent"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
OnProgress = Callable[[str, int, int | None], None]  # what, done, total if that is known


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map` in threads, in order, never far ahead of the consumer. Pillow decodes outside the interpreter's lock."""
    workers = os.cpu_count() or 1
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
