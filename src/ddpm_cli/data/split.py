"""Held-out images: a fixed part of the images that a run is never trained on, chosen by a hash of their names."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ddpm_cli.config import DataConfig
from ddpm_cli.data.pack import Pack, open_pack
from ddpm_cli.data.sources import Source, open_sources
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import DataError, UsageError

__all__ = ["Part", "is_held_out", "open_part", "training_part"]


def is_held_out(name: str, fraction: float) -> bool:
    """Whether an image is held out: whether a hash of its name, a number in [0, 1), is below the fraction.

    So other images do not matter, and an image that is held out stays so when the fraction grows.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class Part(Source):
    """The images of a source that are held out, or all others.

    A name counts as it is within the image's own source, so it does not matter where that is, nor which other sources
    there are; see `Source.own_names`. held_out: after `scan`, how many files the training part leaves to the other.
    What the source itself cannot read is reported with the training part.
    """

    def __init__(self, source: Source, fraction: float, held_out: bool) -> None:
        """fraction: in (0, 1)."""
        super().__init__(source.path, *source.addresses)
        self.key = hashlib.sha256(repr((source.key, fraction, held_out)).encode()).hexdigest()
        self._source = source
        self._fraction = fraction
        self._takes = held_out

    def scan(self, progress: OnProgress = silent) -> None:
        """Raises UsageError if no image is left to train on, and DataError if none is held out."""
        if self.names:
            return
        self._source.scan(progress)
        held = [is_held_out(name, self._fraction) for name in self._source.own_names()]
        places = array("Q", (place for place, is_held in enumerate(held) if is_held == self._takes))
        self.names = _Some(self._source.names, places)
        if not self.names:
            many = f"the {len(held)} images" if len(held) > 1 else "the one image"
            if self._takes:
                raise DataError(f"{self.path}: none of {many} is held out by --holdout {self._fraction:g}")
            raise UsageError(
                f"--holdout {self._fraction:g}: none of {many} of {self.path} is left to train on",
                "Hold out less, or train on more images.",
            )
        if not self._takes:
            self.held_out = sum(held)
            self.left_out = self._source.left_out

    def open(self, name: str) -> IO[bytes]:
        return self._source.open(name)


class _Some(Sequence[str]):
    """The names at some places of a sequence, without a copy of them."""

    def __init__(self, names: Sequence[str], places: array[int]) -> None:
        self._names = names
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._names[self._places[index]]


def training_part(source: Source, fraction: float) -> Source:
    """The images of a source that are not held out. fraction: in [0, 1)."""
    return Part(source, fraction, held_out=False) if fraction else source


def open_part(config: DataConfig, cache: Path, held_out: bool, progress: OnProgress = silent) -> tuple[Pack, Source]:
    """Find the images of a run again, by its settings: those that it is trained on, or those that it holds out.

    Decodes them if they are not in the cache. Returns the pack and its source, for `names_in`. The training pack has
    the fingerprint in the run's checkpoints if the images are the same. Raises DataError if they are gone, and if none
    is held out.
    """
    images = [config.images] if isinstance(config.images, str) else list(config.images)
    source = open_sources(images, cache, progress)
    if held_out and not config.holdout:
        raise DataError(f"{source.path}: the run holds out none of its images", "Train one with --holdout 0.1.")
    part = Part(source, config.holdout, held_out=True) if held_out else training_part(source, config.holdout)
    return open_pack(part, config, cache, progress), part
