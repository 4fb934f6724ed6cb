"""Whether sets of features can be measured and compared, and what must be said with the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ddpm_cli.errors import DataError
from ddpm_cli.evaluation.statistics import FeatureSet

__all__ = ["LEAST", "described", "possible", "remarks", "require_comparable", "require_enough"]

LEAST = 32  # images, of which nothing can be said of a distribution
_FEW = 10_000  # with fewer images, the Fréchet distance is noticeably too large
_MIRRORED = 0.1  # of the images: more than by chance


def require_enough(name: str, count: int | None) -> None:
    """Raises DataError, with the name of the images, if they are too few. count: None if it is not known."""
    if count is not None and count < LEAST:
        raise DataError(
            f"{name}: {count} images are too few for FID, KID, IS or precision",
            f"Give at least {LEAST}; the field takes 50,000.",
        )


def possible(metrics: Sequence[str], samples: FeatureSet, reference: FeatureSet | None) -> tuple[str, ...]:
    """Those of the metrics fid, kid, is and pr that can be computed from the features and logits that there are."""
    both = samples.features is not None and reference is not None and reference.features is not None
    can = {"fid": reference is not None, "kid": both, "pr": both, "is": samples.logits is not None}
    return tuple(metric for metric in metrics if can.get(metric))


def require_comparable(samples: FeatureSet, reference: FeatureSet) -> None:
    """Raises DataError, naming the images or the file, if a distance between them would mean nothing."""
    for found in (samples, reference):
        require_enough(found.name, found.statistics.count)
    ours, theirs = samples.origin, reference.origin
    if ours and theirs and ours.sha256 != theirs.sha256:
        raise DataError(
            f"{reference.name}: was computed by {theirs.extractor} ({theirs.sha256[:8]}), and the samples by "
            f"{ours.extractor} ({ours.sha256[:8]})",
            "Give the extractor that it was computed by with --features, or the real images themselves.",
        )
    widths = [found.statistics.mu.numel() for found in (samples, reference)]
    if widths[0] != widths[1]:
        raise DataError(
            f"{reference.name}: has {widths[1]} features, and the extractor of the samples gives {widths[0]}",
            "Give the extractor that it was computed by with --features.",
        )
    if ours and theirs and ours.shape != theirs.shape:
        raise DataError(
            f"{reference.name}: is of {_pixels(theirs.shape)} images, and the samples are {_pixels(ours.shape)}",
            "Give the real images themselves: they are decoded at the size of the samples.",
        )


def remarks(samples: FeatureSet, reference: FeatureSet | None, metrics: Sequence[str]) -> Iterator[str]:
    """What a reader of these numbers must know: few images, an unknown or a mirrored reference, gray images."""
    if reference is None:
        if (samples.statistics.count or _FEW) < _FEW:
            yield (
                f"few samples ({samples.statistics.count}): compare the Inception score only with those of as many "
                "images"
            )
    else:
        yield from _about_distances(samples, reference, metrics)
    if samples.origin and samples.origin.repeated:
        yield f"gray images are repeated to the three channels that {samples.origin.extractor} takes"


def _about_distances(samples: FeatureSet, reference: FeatureSet, metrics: Sequence[str]) -> Iterator[str]:
    for kind, found in (("samples", samples), ("reference images", reference)):
        count, width = found.statistics.count, found.statistics.mu.numel()
        if count is None or "fid" not in metrics:
            continue
        if count <= width:
            yield (
                f"few {kind} ({count} for {width} features): their covariance is singular, and the Fréchet distance "
                "much too large"
            )
        elif count < _FEW:
            yield (
                f"few {kind} ({count}): the Fréchet distance is too large; compare it only with those of as many images"
            )
    if reference.origin is None:
        yield f"{reference.name} does not say which network, images and resize it is from; it is taken as given"
    elif reference.origin.mirrored > _MIRRORED * (reference.statistics.count or 0):
        yield (
            f"{reference.origin.mirrored} reference images are mirror images of others; "
            "the field compares with images that are not mirrored"
        )
    few, many = sorted(found.statistics.count or 0 for found in (samples, reference))
    if "pr" in metrics and reference.features is not None and 0 < 2 * few < many:
        yield f"precision and recall depend on the numbers of images, here {few} and {many}; the field takes equal ones"
    if reference.features is None and {"kid", "pr"} & {*metrics}:
        yield f"{reference.name} has no features, so there is no KID, precision or recall"


def described(samples: FeatureSet, reference: FeatureSet | None) -> dict[str, object]:
    """What every number is reported with: the sets, the extractor, and what it does to sizes. For JSON.

    reference: None for a number that is about the samples alone.
    """
    ours, theirs = samples.origin, reference.origin if reference else None
    return {
        "samples": samples.statistics.count,
        "reference": reference.name if reference else None,
        "reference_images": reference.statistics.count if reference else None,
        "reference_fingerprint": theirs.images if theirs else None,
        "extractor": ours.extractor if ours else None,
        "extractor_sha256": ours.sha256 if ours else None,
        "resize": ours.resize if ours else None,
    }


def _pixels(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{'gray' if channels == 1 else 'RGB'} {width}x{height}"
