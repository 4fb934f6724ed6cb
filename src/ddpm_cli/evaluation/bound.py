"""Bits per dimension: the variational bound of Eq. 5 on -log p(x_0), in its parts (Tables 1 and 4 of the paper).

    for part in measure(denoiser, pack, world.rows(len(pack)), device):
        parts.append(part)            # a part may be stored with vars(part), and read with Bound(**tensors)
    bound = merge(parts)              # the parts of any number of processes, in any order

Noise belongs to the image, so the result does not depend on batches or processes, but for rounding.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_cli.data.plots import Chart
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import prior
from ddpm_cli.diffusion.noised_image import to_paper
from ddpm_cli.evaluation.neighbors import Pixels
from ddpm_cli.evaluation.term_sampling import all_chances, draw
from ddpm_cli.evaluation.terms import Clean, require_finite
from ddpm_cli.rng import ImageNoise

__all__ = ["Bound", "Depth", "charts", "measure", "merge", "to_csv"]

_NORMAL = 1.96  # standard errors on each side of a 95 % interval
_MOST_STEPS = 10**9  # that a chart is drawn of


@dataclass(frozen=True)
class Depth:
    """What the ideal progressive code has sent when the receiver knows x_t, averaged over images (Section 4.3).

    t: the network's. term: L_{t-1} of Eq. 5 at x_t, L_0 at t = 0. rate: what x_t needs, the prior's term L_T and the
    terms of all steps above t. Both in bits per dimension. mse: of the x_0 predicted from x_t, with images in [-1, 1].
    images: how many have this term; without any, term and mse are NaN.
    """

    t: int
    term: float
    rate: float
    mse: float
    images: int

    @property
    def rmse(self) -> float:
        """The root of the mean square error, on the scale of 0 to 255. The mean is taken before the root."""
        return 127.5 * math.sqrt(self.mse)


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of N images under a model of T steps, or of some of them; see `merge`. All fields are on the CPU.

    numbers: (N,) int64, ascending: which images of their collection. Of each image, (N,) float64 in bits per dimension:

    prior          L_T
    transitions    L_1 + ... + L_{T-1}, or an unbiased estimate of it from the terms of a sample of the steps
    decoder        L_0

    Of each step, in ascending order, T entries each:

    timesteps      int64, the network's t
    chances        float64, the probability that an image has its term; 1 if all of them were computed
    counts         int64, how many images have it
    terms          float64, the sum of L_{t-1} over these, in bits per dimension; the first entry is of L_0
    errors         float64, the sum of the mean square errors of their predicted x_0, with images in [-1, 1]
    """

    numbers: Tensor
    prior: Tensor
    transitions: Tensor
    decoder: Tensor
    timesteps: Tensor
    chances: Tensor
    counts: Tensor
    terms: Tensor
    errors: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def each(self) -> Tensor:
        """The bound of each image, L, (N,) in bits per dimension."""
        return self.prior + self.transitions + self.decoder

    @property
    def total(self) -> float:
        """L, the mean over the images: an upper bound of the negative log-likelihood, in bits per dimension."""
        return float(self.each.mean())

    @property
    def rate(self) -> float:
        """L_1 + ... + L_T, as the paper has it, with the prior's term. In bits per dimension."""
        return float((self.prior + self.transitions).mean())

    @property
    def distortion(self) -> float:
        """L_0, in bits per dimension."""
        return float(self.decoder.mean())

    @property
    def rmse(self) -> float:
        """The error of the x_0 predicted at t = 0 in code, on the scale of 0 to 255; see `Depth.rmse`."""
        return 127.5 * math.sqrt(float(self.errors[0] / self.counts[0]))

    @property
    def standard_error(self) -> float | None:
        """Of the total, as an estimate for all images like these; None for one image.

        It comes from the differences between images. They include those of the noise, of which each image has one draw
        per term, and of the sample of steps.
        """
        return float(self.each.std() / math.sqrt(len(self))) if len(self) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """A 95 % interval of the total for all images like these: 1.96 standard errors on each side."""
        error = self.standard_error
        return None if error is None else (self.total - _NORMAL * error, self.total + _NORMAL * error)

    def depths(self) -> list[Depth]:
        """From x_T down to x_1, so the first depth has the rate L_T, and the last the rate L_1 + ... + L_T.

        If the terms are a sample, each is divided by its chance in a rate, which then has no bias. The last rate is
        always `rate`.
        """
        above = (self.terms / self.chances).flip(0).cumsum(0).flip(0) / len(self)
        rates = float(self.prior.mean()) + torch.cat([above[1:], torch.zeros(1)])
        columns = (self.timesteps, self.terms / self.counts, rates, self.errors / self.counts, self.counts)
        return [Depth(*values) for values in zip(*(column.tolist() for column in columns), strict=True)][::-1]

    def rows(self) -> list[dict[str, float | None]]:
        """`depths` for a file: t (the paper's, T to 1), bits (the term), rate, rmse, images. None instead of NaN."""
        return [
            {
                "t": to_paper(depth.t),
                "bits": depth.term if depth.images else None,
                "rate": depth.rate,
                "rmse": depth.rmse if depth.images else None,
                "images": depth.images,
            }
            for depth in self.depths()
        ]

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "images": len(self),
            "steps": len(self.chances),
            "terms": round(float(self.chances.sum())),  # of each image
            "bits_per_dim": self.total,
            "standard_error": self.standard_error,
            "interval": None if self.interval is None else list(self.interval),
            "prior": float(self.prior.mean()),
            "rate": self.rate,
            "distortion": self.distortion,
            "rmse": self.rmse,
        }


def measure(
    denoiser: Denoiser,
    images: Pixels | Tensor,
    numbers: Sequence[int],
    device: torch.device | str = "cpu",
    seed: int = 0,
    batch_size: int = 64,
    chances: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Bound]:
    """The bound of some images of a collection, in parts of at most batch_size images, for `merge`.

    images: uint8, such as a `Pack`, or a tensor (N, C, H, W), uint8 or float in [-1, 1]. numbers: those to evaluate.
    device: of the network. chances: (T,) float64 from `term_sampling.chances`, the same for all parts; None computes
    all terms. Image i has one draw of noise per term, by (seed, i). progress: called with the number of images times
    terms that are done. On a GPU that number is ahead of the device, which is waited for at the end of each part.
    Raises ModelError if a term is not finite.
    """
    chances = all_chances(denoiser.schedule.T) if chances is None else chances
    done = 0
    for part in torch.split(torch.tensor(list(numbers), dtype=torch.int64), batch_size):
        clean = Clean(images[part].to(device))
        steps = draw(chances, part, seed)
        _, *shape = clean.x_0.shape
        noise = ImageNoise(seed, part.tolist(), (shape[0], shape[1], shape[2]), "rate")
        found = []
        for column in steps.T:
            # One t for all images, where it is the same, is also one embedding of the time for all.
            t = int(column[0]) if (column == column[0]).all() else column.to(clean.x_0.device)
            found.append(clean.terms(denoiser, t, noise()))
            done += len(part)
            progress(done)
        terms, errors = (torch.stack(values, 1).cpu() for values in zip(*found, strict=True))
        require_finite(terms, denoiser.schedule.timesteps[steps])
        yield _part(denoiser, part, steps, prior(denoiser.schedule, clean.exact).cpu(), terms, errors, chances)


def _part(
    denoiser: Denoiser, numbers: Tensor, steps: Tensor, prior: Tensor, terms: Tensor, errors: Tensor, chances: Tensor
) -> Bound:
    """steps: (B, K) int64, in the schedule; terms, errors: (B, K) at these, and prior (B,): in nats per dimension."""
    terms, prior = terms / math.log(2), prior / math.log(2)
    T, places = len(chances), steps.flatten()

    def by_step(values: Tensor) -> Tensor:
        return torch.zeros(T, dtype=torch.float64).index_add(0, places, values.flatten())

    return Bound(
        numbers=numbers,
        prior=prior,
        transitions=(terms / chances[steps]).masked_fill(steps == 0, 0).sum(1),
        decoder=terms.masked_fill(steps > 0, 0).sum(1),
        timesteps=denoiser.schedule.timesteps,
        chances=chances,
        counts=torch.bincount(places, minlength=T),
        terms=by_step(terms),
        errors=by_step(errors),
    )


def merge(parts: Iterable[Bound]) -> Bound:
    """The bound of all images of some parts, which may come from several processes and in any order.

    Raises ValueError if there are none, if an image is in two of them, or if their steps or chances differ.
    """
    parts = sorted(parts, key=lambda part: part.numbers.tolist())  # so that sums do not depend on the order
    if not parts:
        raise ValueError("there are no parts")
    first = parts[0]
    for part in parts:
        if not (torch.equal(part.timesteps, first.timesteps) and torch.equal(part.chances, first.chances)):
            raise ValueError("the parts have different steps or chances")
    numbers = torch.cat([part.numbers for part in parts])
    order = numbers.argsort()
    if len(set(numbers.tolist())) < len(numbers):
        raise ValueError("an image is in two parts")

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order]

    def summed(name: str) -> Tensor:
        return torch.stack([getattr(part, name) for part in parts]).sum(0)

    return Bound(
        **{name: joined(name) for name in ("numbers", "prior", "transitions", "decoder")},
        timesteps=first.timesteps,
        chances=first.chances,
        **{name: summed(name) for name in ("counts", "terms", "errors")},
    )


def to_csv(found: Mapping[str, Bound]) -> bytes:
    """The rows of the bounds of sets of images under one model, as a table that begins with the names of the sets."""
    file = io.StringIO()
    rows = [{"set": name, **row} for name, bound in found.items() for row in bound.rows()]
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def charts(table: bytes) -> list[Chart]:
    """Pictures of a table of `to_csv`: the terms, and the rate, over the paper's t; see `data.plots`.

    Raises ValueError if the table is damaged.
    """
    terms: dict[str, list[float | None]] = {}
    rates: dict[str, list[float | None]] = {}
    steps: dict[str, list[int]] = {}
    try:
        for row in csv.DictReader(io.StringIO(table.decode(), newline="")):
            name = row["set"]
            steps.setdefault(name, []).append(int(row["t"]))
            terms.setdefault(name, []).append(_number(row["bits"]))
            rates.setdefault(name, []).append(_number(row["rate"]))
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a table of the bound: {error}") from None
    first, *others = steps.values() or [[]]
    if not first or any(other != first for other in others) or not 0 < min(first) <= max(first) <= _MOST_STEPS:
        raise ValueError("not a table of the bound: its steps do not fit")
    return [
        Chart("the term of each t (bits/dim)", first, terms, log=True, over="t"),
        Chart("rate up to each t (bits/dim)", first, rates, over="t"),
    ]


def _number(text: str) -> float | None:
    """A value of a table. None if it is missing, or none that a model can have."""
    value = float(text or "nan")
    return value if value == 0 or 1e-30 <= value <= 1e30 else None
