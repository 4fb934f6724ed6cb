"""What `ddpm eval` measures: the bound of a model on images, and the distance of samples from images.

Work is kept in a folder, so it goes on after it was stopped, and the processes of torchrun share it. Results are those
of `models.results`. Every rank must call these functions; only rank 0 gets something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.distributed import World
from ddpm_cli.evaluation.bound import Bound, measure, merge
from ddpm_cli.evaluation.comparison import described
from ddpm_cli.evaluation.distances import frechet, inception_score, kid, precision_recall
from ddpm_cli.evaluation.extractors import Extractor
from ddpm_cli.evaluation.features import Features, features_of, features_place
from ddpm_cli.evaluation.moments import moments
from ddpm_cli.evaluation.neighbors import Pixels
from ddpm_cli.evaluation.parts import Part, any_part, complete, place_of
from ddpm_cli.evaluation.statistics import FeatureSet, feature_set
from ddpm_cli.evaluation.term_sampling import chances, term_sizes
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.text import counted

__all__ = ["Images", "bound_of", "bound_result", "compared", "features_in_parts", "spread", "stand_in"]

_PILOT = 8  # images that decide which terms are computed
_VERSION = 2  # of the parts of a bound


class Images(NamedTuple):
    """Images that something is measured on. name: for people, such as train or the name of a folder."""

    name: str
    pixels: Pixels


def spread(n: int, total: int) -> Sequence[int]:
    """The numbers of n of so many images, ascending and spread over all; all of them if there are no more than n.

    Those of a smaller n are among them, so what was measured on these counts. They are the first in the order of their
    binary digits in reverse (van der Corput): 0, a half, a quarter, three quarters, and so on.
    """
    if n >= total:
        return range(total)
    digits = (total - 1).bit_length()
    return sorted(sorted(range(total), key=lambda i: f"{i:0{digits}b}"[::-1])[:n])


def bound_of(
    model: DDPM,
    images: Images,
    folder: Path,
    n: int,
    terms: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    world: World | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bound | None:
    """The variational bound (Eq. 5) of at most n of the images, see `spread`. None on all ranks but 0.

    terms: how many of the T terms are computed for each image, see `term_sampling`; None for all. folder: where parts
    are kept. progress: called with the number of images times terms that this process has done, and the number of
    those that were missing and are its share.
    """
    world = world or World()
    numbers = spread(n, len(images.pixels))
    denoiser, T = model.denoiser, model.schedule.T
    few = terms if terms is not None and terms < T else None
    precision = str(model.unet.conv_in.weight.dtype)
    what = (_VERSION, model.fingerprint(), precision, images.pixels.fingerprint, seed, few)
    place = place_of(folder / "bound", *what)

    def shares(k: int) -> Tensor:
        """Those of the parts that exist: another number of threads rounds otherwise, and they would not fit."""
        if part := any_part(place):
            return part["chances"]
        pilot = images.pixels[torch.tensor(spread(_PILOT, len(images.pixels)))]
        return chances(term_sizes(denoiser, pilot.to(model.device), seed), k)

    share = None if few is None else world.on_main(lambda: shares(few))

    def work(left: Sequence[int]) -> Iterator[Part]:
        total = len(left) * (few or T)
        parts = measure(
            *(denoiser, images.pixels, left, model.device, seed, batch_size, share),
            progress=lambda done: progress(done, total),
        )
        return (dict(vars(part)) for part in parts)

    parts = complete(place, numbers, work, world)
    return world.on_all(lambda: merge(Bound(**part) for part in parts) if world.is_main else None)


def bound_result(bound: Bound, name: str, T: int) -> dict[str, Any]:
    """The result of a bound on the images of this name. T: the steps of the model."""
    found = bound.summary()
    interval = "" if bound.interval is None else ", 95 % interval {:.4f} to {:.4f}".format(*bound.interval)
    count = f"all {T} terms" if found["terms"] == T else f"{found['terms']} of {T} terms"
    how = (
        f"{count} of {counted(len(bound), 'image')}{interval}: "
        f"L_T {found['prior']:.5f} + L_1..T-1 "
        f"{bound.rate - found['prior']:.4f} + L_0 {bound.distortion:.4f}; RMSE {bound.rmse:.2f} of 255"
    )
    values = {"value": bound.total, "error": bound.standard_error, "how": how}
    return {"metric": "bits_per_dim", "set": name, **values, **found}


def features_in_parts(
    extractor: Extractor,
    images: Images,
    n: int,
    folder: Path,
    batch_size: int = 64,
    world: World | None = None,
    progress: OnProgress = silent,
    again: bool = False,
) -> FeatureSet | None:
    """The features of the first n samples, from the parts in the folder and from new work. None on all ranks but 0.

    For the other arguments see `features_of`.
    """
    place = features_place(folder, images.pixels, extractor, "samples")
    found = features_of(extractor, images.pixels, n, place, batch_size, world, progress, again)
    return feature_set(found, extractor, images.pixels.shape, images.name) if found else None


def stand_in(
    extractor: Extractor, shape: tuple[int, int, int], n: int, name: str = "samples", fingerprint: str | None = None
) -> FeatureSet:
    """What can be compared as n images of a shape (C, H, W) could, before their features are known: two of noise.

    So what is wrong with the extractor, the samples or the reference is found early. fingerprint: of the images, if it
    is known. Raises ModelError, see `Extractor`.
    """
    noise = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found, logits = extractor(noise)
    both = feature_set(Features(moments(found), found, logits), extractor, shape, name, fingerprint)
    return replace(both, statistics=replace(both.statistics, count=n))


def compared(
    metrics: Sequence[str],
    samples: FeatureSet,
    reference: FeatureSet | None,
    how: str,
    against: str = "",
    progress: OnProgress = silent,
) -> list[dict[str, Any]]:
    """The results of fid, kid, is and pr, as far as the features allow.

    reference: None if there is none; then is alone is possible. how: the samples in words, and against: the reference.
    """
    found: list[dict[str, Any]] = []
    if reference:
        words = f"{how} against {against or reference.name}{_seen_by(samples)}"
        shared = {"set": Path(reference.name).name, "how": words, **described(samples, reference)}
        found += [result | shared for result in _distances(metrics, samples, reference, progress)]
    if "is" in metrics and samples.logits is not None:
        score = inception_score(samples.logits)
        shared = {"set": samples.name, "how": how + _seen_by(samples), **described(samples, None)}
        found.append({"metric": "inception_score", "value": score.mean, "deviation": score.deviation, **shared})
    return found


def _seen_by(samples: FeatureSet) -> str:
    """The extractor and what it does to sizes, as the end of a sentence."""
    origin = samples.origin
    return f"; {origin.extractor} {origin.sha256[:8]}, {origin.resize}" if origin else ""


def _distances(
    metrics: Sequence[str], samples: FeatureSet, reference: FeatureSet, progress: OnProgress
) -> Iterator[dict[str, Any]]:
    """The values of fid, kid and pr."""
    if "fid" in metrics:
        inception = samples.origin is not None and samples.origin.extractor == "Inception"
        value = frechet(samples.statistics, reference.statistics)
        yield {"metric": "fid" if inception else "frechet", "value": value}
    ours, theirs = samples.features, reference.features
    if "kid" in metrics and ours is not None and theirs is not None:
        distance = kid(ours, theirs)
        yield {"metric": "kid", "value": distance.mean, "deviation": distance.deviation}
    if "pr" in metrics and ours is not None and theirs is not None:
        both = precision_recall(theirs, ours, progress=progress)
        yield {"metric": "precision", "value": both.precision}
        yield {"metric": "recall", "value": both.recall}
