"""Reads the headers of the images, before anything is decoded."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_cli.data import images
from ddpm_cli.data.sources.source import Source
from ddpm_cli.data.work import OnProgress, in_threads, silent
from ddpm_cli.errors import DataError

__all__ = ["Survey", "survey", "without_warnings"]


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings about odd files. Files that cannot be used are reported anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Survey:
    """Facts from the headers of the images, for choosing the size and the channels of a model."""

    files: int  # that could be images
    readable: int  # with a valid header
    gray: int  # of the readable ones, with one channel
    median_side: int  # pixels, of the shorter sides
    square_side: int | None  # pixels, if all images are squares of this one size

    @property
    def channels(self) -> int:
        """1 if every image is gray, else 3."""
        return 1 if self.gray == self.readable else 3


def survey(source: Source, progress: OnProgress = silent) -> Survey:
    """Read the header of every image. Raises DataError if none is valid."""

    def header(name: str) -> tuple[int, int, bool] | str:
        try:
            with source.open(name) as file, images.open_image(file) as image:
                return *image.size, images.is_gray(image)
        except Exception as error:  # Pillow's plugins may raise any exception on a damaged file
            return images.reason(error)

    source.scan(progress)
    total = len(source.names)
    gray, first = 0, ""  # the first that cannot be read, and why
    squares: Counter[int | None] = Counter()  # by side; None: not square
    sides: Counter[int] = Counter()
    with without_warnings():
        for done, (name, found) in enumerate(zip(source.names, in_threads(header, source.names), strict=True), 1):
            if isinstance(found, str):
                first = first or f"{name}: {found}"
            else:
                width, height, is_gray = found
                gray += is_gray
                sides[min(width, height)] += 1
                squares[width if width == height else None] += 1
            progress("reading image headers", done, total)
    if not sides:
        raise DataError(f"{source.path}: none of its {total} image files can be read, for example {first}")
    return Survey(
        files=total,
        readable=sides.total(),
        gray=gray,
        median_side=_median(sides),
        square_side=next(iter(squares)) if len(squares) == 1 else None,
    )


def _median(counts: Counter[int]) -> int:
    """The median; of two middle values, the smaller one."""
    below = 0
    for value in sorted(counts):
        below += counts[value]
        if 2 * below >= counts.total():
            return value
    raise ValueError("nothing was counted")
