"""The features of any number of images, in parts on disk: what exists is used, and several processes share the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.distributed import World
from ddpm_cli.evaluation.extractors import Extractor
from ddpm_cli.evaluation.moments import Moments, moments, together
from ddpm_cli.evaluation.neighbors import Pixels
from ddpm_cli.evaluation.parts import Part, complete, place_of

__all__ = ["KEPT", "Features", "features_of", "features_place", "mirrored_images"]

KEPT = 50_000  # features that are kept; of Inception they take 400 MB, and its logits 200 MB
_ROWS = 1024  # features whose moments are computed at once
_VERSION = 3  # of the parts


@dataclass(frozen=True)
class Features:
    """The features of N images.

    moments: of all of them. kept: (K, D) float32, and logits: (K, L) float32 if the extractor has them, of at most
    `KEPT` images that are evenly spread, for distances that need the features themselves; in the order of the images.
    mirrored: how many of the images are mirror images of others.
    """

    moments: Moments
    kept: Tensor
    logits: Tensor | None
    mirrored: int = 0


def features_place(folder: Path, images: Pixels, extractor: Extractor, role: str) -> Path:
    """Where parts are kept in the folder of an evaluation. role: of the images, since those of one may be removed."""
    return place_of(folder / "features", _VERSION, role, images.fingerprint, images.shape, extractor.sha256)


def features_of(
    extractor: Extractor,
    images: Pixels,
    n: int,
    place: Path,
    batch_size: int = 64,
    world: World | None = None,
    progress: OnProgress = silent,
    again: bool = False,
) -> Features | None:
    """The features of the first n images. None on all ranks but 0.

    place: where parts are kept, see `features_place`. progress: counts the missing images that are this process's
    share. again: compute all of them, since the images may have changed. Raises ModelError if the extractor cannot
    take them.
    """
    world = world or World()

    def work(left: Sequence[int]) -> Iterator[Part]:
        done = 0
        for numbers in torch.split(torch.tensor(list(left), dtype=torch.int64), batch_size):
            batch = images[numbers]
            found = extractor(batch)
            done += len(numbers)
            progress("extracting features", done, len(left))
            logits = {} if found.logits is None else {"logits": found.logits}
            yield {"numbers": numbers, "hashes": _hashes(batch), "features": found.features, **logits}

    parts = complete(place, range(n), work, world, again)
    return world.on_all(lambda: _folded(parts, n) if world.is_main else None)


def _folded(parts: Iterable[Part], n: int) -> Features:
    """The features of images 0..n-1. parts: of all of them, in any order. Only what is kept of them stays in memory."""
    most = min(KEPT, n)
    kept: dict[str, Tensor] = {}
    hashes = torch.empty(n, 2, dtype=torch.int64)

    def features() -> Iterator[Tensor]:
        for part in parts:
            numbers = part["numbers"]
            hashes[numbers] = part["hashes"]
            places = numbers * most // n  # among those that are kept; of the images with one place the last is kept
            chosen = (numbers + 1) * most // n > places
            for name in part.keys() & {"features", "logits"}:
                table = kept.setdefault(name, part[name].new_empty(most, part[name].shape[1]))
                table[places[chosen]] = part[name][chosen]
            yield part["features"]

    whole = together(map(moments, _blocks(features())))
    return Features(whole, kept["features"], kept.get("logits"), mirrored_images(hashes))


def _blocks(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows of all parts, at least `_ROWS` at a time: moments of few rows take as long as those of many."""
    waiting: list[Tensor] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= _ROWS:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def mirrored_images(hashes: Tensor) -> int:
    """How many images are mirror images of others. hashes: (N, 2) int64, of each image and of it mirrored."""
    plain, mirrored = hashes.unbind(1)
    return int((torch.isin(mirrored, plain) & (plain != mirrored)).sum())


def _hashes(images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> (B, 2) int64: hashes of each image, and of it mirrored left to right."""
    both = zip(images.contiguous().numpy(), images.flip(3).numpy(), strict=True)
    return torch.tensor([[_hash(image), _hash(mirrored)] for image, mirrored in both], dtype=torch.int64)


def _hash(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "big", signed=True)
