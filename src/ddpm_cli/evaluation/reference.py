"""The real images that samples are compared with. Their features are computed once, and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from ddpm_cli.data.cache import statistics_folder
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.distributed import World
from ddpm_cli.errors import DataError
from ddpm_cli.evaluation.extractors import Extractor
from ddpm_cli.evaluation.features import KEPT, features_of, features_place
from ddpm_cli.evaluation.neighbors import Pixels
from ddpm_cli.evaluation.statistics import FeatureSet, feature_set, read_statistics, write_statistics

__all__ = ["open_reference"]

_VERSION = 1  # of what is computed


def open_reference(
    images: Pixels,
    source: str,
    extractor: Extractor,
    cache: Path,
    folder: Path,
    batch_size: int = 64,
    world: World | None = None,
    progress: OnProgress = silent,
) -> FeatureSet | None:
    """The set of real images, from the cache if it is there; else computed by all processes. None on ranks above 0.

    images: as the extractor shall see them. source: for people. folder: of the evaluation, which every rank sees; parts
    of the work are kept there until the cache has the whole. The cache knows it by the pixels and the extractor, so
    moved or renamed images are found too. Raises DataError for fewer than two images; ModelError, see `Extractor`.
    """
    world = world or World()
    what = [_VERSION, KEPT, images.shape, len(images), images.fingerprint, extractor.sha256]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    path = statistics_folder(cache) / f"{key}.npz"
    known = world.on_all(lambda: _cached(path) if world.is_main else None)
    if world.on_main(lambda: known is not None):
        return replace(known, name=source) if known else None
    place = features_place(folder, images, extractor, "reference")
    features = features_of(extractor, images, len(images), place, batch_size, world, progress)

    def keep() -> FeatureSet | None:
        if features is None:
            return None
        found = feature_set(features, extractor, images.shape, source, images.fingerprint)
        with contextlib.suppress(DataError):  # a cache that cannot be written only costs time
            write_statistics(path, found)
            shutil.rmtree(place, ignore_errors=True)
        return found

    return world.on_all(keep)


def _cached(path: Path) -> FeatureSet | None:
    """What the cache has, whose last use is now; None if that is missing or damaged."""
    with contextlib.suppress(DataError, OSError):
        found = read_statistics(path)
        os.utime(path)
        return found
    return None
