"""The real images that samples are compared with. Their features are computed once, and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_cli.data.cache import statistics_folder
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.distributed import World
from ddpm_cli.errors import DataError
from ddpm_cli.evaluation.extractors import Extractor
from ddpm_cli.evaluation.features import KEPT, batches_of, features_of, merged
from ddpm_cli.evaluation.neighbors import Pixels
from ddpm_cli.evaluation.statistics import FeatureSet, feature_set, read_statistics, write_statistics

__all__ = ["mirrored_images", "open_reference"]

_VERSION = 1  # of what is computed


def open_reference(
    images: Pixels,
    source: str,
    extractor: Extractor,
    cache: Path,
    batch_size: int = 64,
    world: World | None = None,
    progress: OnProgress = silent,
) -> FeatureSet:
    """The set of real images, from the cache if it is there; else computed by all processes, and kept.

    images: as the extractor shall see them. source: for people. The cache knows it by the pixels and the extractor, so
    moved or renamed images are found too. Raises DataError for fewer than two images; ModelError, see `Extractor`.
    """
    world = world or World()
    what = [_VERSION, KEPT, images.shape, len(images), images.fingerprint, extractor.sha256]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    path = statistics_folder(cache) / f"{key}.npz"
    known = _cached(path) if world.is_main else None
    if world.on_main(lambda: known is not None):
        return replace(known or read_statistics(path), name=source)
    rows = world.rows(len(images))
    part = features_of(extractor, batches_of(images, rows, batch_size), rows, len(images), progress)
    hashes = [_hashes(batch) for batch in batches_of(images, rows, batch_size)]
    gathered = world.all_gather((part, torch.cat(hashes) if hashes else torch.empty(0, 2, dtype=torch.int64)))
    mirrored = mirrored_images(torch.cat([hashes for _, hashes in gathered]))
    whole = merged(part for part, _ in gathered)
    found = feature_set(whole, extractor, images.shape, source, images.fingerprint, mirrored)
    if world.is_main:
        with contextlib.suppress(DataError):  # a cache that cannot be written only costs time
            write_statistics(path, found)
    return found


def _cached(path: Path) -> FeatureSet | None:
    """What the cache has, whose last use is now; None if that is missing or damaged."""
    with contextlib.suppress(DataError, OSError):
        found = read_statistics(path)
        os.utime(path)
        return found
    return None


def mirrored_images(hashes: Tensor) -> int:
    """How many images are mirror images of others. hashes: (N, 2) int64, see `_hashes`."""
    plain, mirrored = hashes.unbind(1)
    return int((torch.isin(mirrored, plain) & (plain != mirrored)).sum())


def _hashes(images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> (B, 2) int64: hashes of each image, and of it mirrored left to right."""
    both = zip(images.contiguous().numpy(), images.flip(3).numpy(), strict=True)
    return torch.tensor([[_hash(image), _hash(mirrored)] for image, mirrored in both], dtype=torch.int64)


def _hash(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "big", signed=True)
