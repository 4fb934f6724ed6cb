"""Images of a user for a comparison: samples and training images, decoded once, with their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ddpm_cli.config import DataConfig
from ddpm_cli.data.npz import Npz
from ddpm_cli.data.pack import names_in, open_pack
from ddpm_cli.data.sources import Listed, Source, open_sources, read_streams
from ddpm_cli.data.survey import Survey, survey
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import DataError, UsageError
from ddpm_cli.evaluation.neighbors import Pixels

__all__ = ["Collection", "open_images", "open_samples"]


class Collection(NamedTuple):
    """Images that are read on demand.

    pixels: the images. names: gives the names of the images with these numbers, by number. left_out: (name, reason) of
    files that cannot be used. changes: what decoding did to them besides, for people.
    """

    pixels: Pixels
    names: Callable[[Iterable[int]], dict[int, str]]
    left_out: Sequence[tuple[str, str]] = ()
    changes: Sequence[str] = ()


def open_samples(
    paths: Sequence[str | Listed], cache: Path, background: str = "white", progress: OnProgress = silent
) -> Collection:
    """Open samples: one .npz file, or whatever `ddpm train` takes, at their own size.

    They are gray if all of them are. Raises DataError if they are not squares of one size, or cannot be read.
    """
    if arrays := [path for path in paths if isinstance(path, str) and path.lower().endswith(".npz")]:
        if len(paths) > 1:
            raise UsageError("SAMPLES: an .npz file cannot be combined with other samples", "Give one after another.")
        return _square(Npz(Path(arrays[0]), cache), arrays[0])
    source = _open(paths, cache, progress)
    found = survey(source, progress)
    if found.square_side is None:
        raise DataError(f"{source.path}: the samples are not squares of one size", "Samples of one model are.")
    return _decoded(source, DataConfig("", found.square_side, found.channels, background=background), cache, progress)


def _square(npz: Npz, path: str) -> Collection:
    _, height, width = npz.shape
    if height != width:
        raise DataError(f"{path}: the samples are {width}x{height}, not square")
    return Collection(npz, lambda numbers: {number: f"image {number}" for number in numbers})


def open_images(
    paths: Sequence[str | Listed],
    shape: tuple[int, int, int],
    cache: Path,
    fit: str = "crop",
    background: str = "white",
    progress: OnProgress = silent,
) -> Collection:
    """Open images as training would see them: whatever `ddpm train` takes, in a square shape (C, H, W).

    fit: crop, pad or stretch. Raises DataError if none can be read.
    """
    channels, size, _ = shape
    source = _open(paths, cache, progress)
    changes = _changes(survey(source, progress), channels, size, fit)
    return _decoded(source, DataConfig("", size, channels, fit, background), cache, progress)._replace(changes=changes)


def _changes(found: Survey, channels: int, size: int, fit: str) -> list[str]:
    """How images with these headers differ from those that are decoded from them."""
    changes = []
    if found.square_side != size:
        side = f"{found.square_side}x{found.square_side}" if found.square_side else "of several sizes or not square"
        changes.append(f"the images are {side}: resized to {size}x{size} (bicubic, {fit})")
    if channels == 1 and found.gray < found.readable:
        changes.append(f"{found.readable - found.gray} of {found.readable} images have colours: converted to gray")
    if channels == 3 and found.gray:
        changes.append(f"{found.gray} of {found.readable} images are gray: repeated to three channels")
    return changes


def _open(paths: Sequence[str | Listed], cache: Path, progress: OnProgress) -> Source:
    return open_sources(read_streams(paths), cache, progress)


def _decoded(source: Source, config: DataConfig, cache: Path, progress: OnProgress) -> Collection:
    pack = open_pack(source, config, cache, progress)
    return Collection(pack, lambda numbers: names_in(pack, source, numbers), pack.left_out)
