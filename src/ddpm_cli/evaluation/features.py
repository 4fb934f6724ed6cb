"""The features of any number of images, batch by batch, in one process or in several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.evaluation.extractors import Extractor
from ddpm_cli.evaluation.moments import Moments, moments, together
from ddpm_cli.evaluation.neighbors import Pixels

__all__ = ["KEPT", "Features", "batches_of", "features_of", "is_kept", "merged"]

KEPT = 50_000  # features that are kept; of Inception they take 400 MB, and its logits 200 MB
_ROWS = 1024  # features whose moments are computed at once


@dataclass(frozen=True)
class Features:
    """The features of N images.

    moments: of all of them; None if there are none. kept: (K, D) float32, and logits: (K, L) float32 if the extractor
    has them, of at most `KEPT` images that are evenly spread, for distances that need the features themselves.
    """

    moments: Moments | None
    kept: Tensor
    logits: Tensor | None


def batches_of(pixels: Pixels, rows: range, batch_size: int) -> Iterator[Tensor]:
    """Some images, (B, C, H, W) uint8 at a time."""
    for numbers in torch.split(torch.tensor(rows, dtype=torch.int64), batch_size):
        if len(numbers):
            yield pixels[numbers]


def features_of(
    extractor: Extractor, batches: Iterable[Tensor], rows: range, total: int, progress: OnProgress = silent
) -> Features:
    """The features of the images `rows` of `total` images, which `batches` gives in this order.

    batches: (B, C, H, W) uint8. Several processes may compute parts, such as `World.rows` gives, for `merged`.
    Raises ValueError if there are other numbers of images; ModelError if the extractor cannot take them.
    """
    parts: list[Moments] = []
    waiting: list[Tensor] = []  # for their moments
    kept: list[Tensor] = []
    logits: list[Tensor] = []
    done = 0

    def flush() -> None:
        if waiting:
            parts.append(together([*parts, moments(torch.cat(waiting))]))
            del parts[:-1], waiting[:]

    for batch in batches:
        found = extractor(batch)
        numbers = torch.arange(done, done + len(batch)) + rows.start
        chosen = is_kept(numbers, total)
        kept.append(found.features[chosen])
        if found.logits is not None:
            logits.append(found.logits[chosen])
        waiting.append(found.features)
        if sum(map(len, waiting)) >= _ROWS:
            flush()
        done += len(batch)
        progress("extracting features", done, len(rows))
    flush()
    if done != len(rows):
        raise ValueError(f"there are {done} images, not {len(rows)}")
    return Features(
        parts[0] if parts else None,
        torch.cat(kept) if kept else torch.empty(0, 0),
        torch.cat(logits) if logits else None,
    )


def is_kept(numbers: Tensor, total: int) -> Tensor:
    """Which images are among the `KEPT` of `total` whose features are kept: (B,) bool."""
    most = min(KEPT, total)
    return (numbers + 1) * most // total > numbers * most // total


def merged(parts: Iterable[Features]) -> Features:
    """The features of all parts, in their order. Parts without images are skipped. Raises ValueError if all are."""
    parts = [part for part in parts if part.moments]
    whole = together(part.moments for part in parts if part.moments)
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(whole, torch.cat([part.kept for part in parts]), torch.cat(logits) if logits else None)
