"""Several sources of images as one."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import IO

from ddpm_cli.data.sources.source import Source
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.text import and_more

__all__ = ["Combined"]


class Combined(Source):
    """The images of several sources, one source after another. An image in two of them is used twice.

    A name begins with the path of its source as the user gave it: cats/1.png, dogs.zip/2.png.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__(and_more([source.path for source in sources]), *chain(*(part.addresses for part in sources)))
        self._parts = [(source.prefix, source) for source in sources]
        self.key = hashlib.sha256(repr([(prefix, part.key) for prefix, part in self._parts]).encode()).hexdigest()

    def scan(self, progress: OnProgress = silent) -> None:
        for _, part in self._parts:
            part.scan(progress)
        self.names = _Names([(prefix, part.names) for prefix, part in self._parts])
        self.left_out = [(f"{prefix}{name}", why) for prefix, part in self._parts for name, why in part.left_out]

    def own_names(self) -> Iterable[str]:
        return chain.from_iterable(part.own_names() for _, part in self._parts)

    def open(self, name: str) -> IO[bytes]:
        # The longest prefix, since a list may be in a folder. If one folder is in another, both have the same file.
        fitting = ((prefix, part) for prefix, part in self._parts if name.startswith(prefix))
        prefix, part = max(fitting, key=lambda fits: len(fits[0]))
        return part.open(name.removeprefix(prefix))


class _Names(Sequence[str]):
    """Names with prefixes, which are joined on access to save memory."""

    def __init__(self, parts: Sequence[tuple[str, Sequence[str]]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(names) for _, names in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        i = bisect_right(self._ends, index)
        prefix, names = self._parts[i]
        return prefix + names[index - self._ends[i]]

    def __iter__(self) -> Iterator[str]:
        return (prefix + name for prefix, names in self._parts for name in names)
