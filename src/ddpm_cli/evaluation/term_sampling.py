"""Which terms of the bound are computed, if not all: importance sampling of the steps, without bias.

Each image has its own sample of K steps, in which step t is with probability pi_t, its chance. A term is divided by its
chance, so on average over the samples their sum is the sum of all terms, whatever the chances are (Horvitz and
Thompson 1952). The better the chances fit the sizes of the terms, the smaller is the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.evaluation.terms import Clean, require_finite
from ddpm_cli.rng import ImageNoise, image_uniforms

__all__ = ["all_chances", "chances", "draw", "term_sizes"]

_PILOT_STEPS = 32
_UNIFORM = 0.1  # the share of the sizes that is spread evenly, so that no step is ever without a chance


def term_sizes(denoiser: Denoiser, x_0: Tensor, seed: int = 0) -> Tensor:
    """The root mean square of each term over some images, from a pilot at a few steps. (T,) float64, above 0.

    x_0: (B, C, H, W) as in `Clean`; some eight images are enough. They may be among those that are evaluated later: the
    pilot has noise of its own, and for any sizes the estimate has no bias. Between the steps of the pilot, which are
    even in the log-SNR, the logarithm of the size is linear in that of t. Raises ModelError if a term is not finite.
    """
    schedule = denoiser.schedule
    if schedule.T == 1:
        return torch.ones(1, dtype=torch.float64)
    clean = Clean(x_0)
    _, *shape = x_0.shape
    noise = ImageNoise(seed, range(len(x_0)), (shape[0], shape[1], shape[2]), "pilot")
    steps = sorted({1, *spaced(schedule, min(_PILOT_STEPS, schedule.T), spacing="logsnr")} - {0})
    found = torch.stack([clean.terms(denoiser, t, noise())[0] for t in steps]).cpu()
    require_finite(found, schedule.timesteps[steps][:, None])
    logs = found.square().mean(1).clamp(min=1e-30).log() / 2
    at, times = torch.tensor(steps).double().log(), torch.arange(1, schedule.T).double().log()
    right = torch.searchsorted(at, times).clamp(1, len(at) - 1) if len(at) > 1 else torch.zeros(len(times)).long()
    left = (right - 1).clamp(min=0)
    share = (times - at[left]) / (at[right] - at[left]).clamp(min=1e-9)
    sizes = (logs[left] + share * (logs[right] - logs[left])).exp()
    return torch.cat([sizes[:1], sizes])  # that of step 0 has no effect, see `chances`


def all_chances(T: int) -> Tensor:
    """The chances with which every term is computed: (T,) ones."""
    return torch.ones(T, dtype=torch.float64)


def chances(sizes: Tensor, k: int) -> Tensor:
    """The chance of each step to be in a sample of k, in proportion to the size of its term: (T,) float64 in (0, 1].

    sizes: (T,) float64, 0 or more. A step whose chance would be above 1 is in every sample, and so is t = 0, the
    decoder's, which is a part of the result on its own. A tenth of the sizes is spread evenly, so no chance is 0.
    With k >= T every term is computed. Raises ValueError if k < 2.
    """
    T = len(sizes)
    if k >= T:
        return all_chances(T)
    if k < 2:
        raise ValueError("a sample needs two terms or more")
    sizes = sizes / sizes[1:].sum().clamp(min=1e-30) + _UNIFORM / (1 - _UNIFORM) / (T - 1)
    always = torch.zeros(T, dtype=torch.bool)
    always[0] = True
    while True:
        chance = torch.where(always, 1.0, sizes * (k - always.sum()) / sizes[~always].sum())
        if not (chance > 1).any():
            return chance
        always |= chance > 1


def draw(chance: Tensor, numbers: Tensor, seed: int = 0) -> Tensor:
    """The sample of steps of each image: (B, K) int64, descending. K is the sum of the chances, (T,).

    numbers: (B,) int64; the sample of image i depends only on (seed, i) and the chances. The sampling is systematic: K
    points at equal distances on a line on which each step has the length of its chance. So neighbouring steps, whose
    terms are similar, are never in one sample together while a long range of steps is without any.
    """
    k = round(float(chance.sum()))
    always, maybe = (chance >= 1).nonzero().flatten(), (chance < 1).nonzero().flatten()
    points = image_uniforms(seed, numbers.tolist(), "terms")[:, None] + torch.arange(k - len(always))
    if not len(maybe):
        return always.flip(0).expand(len(numbers), -1)
    ends = chance[maybe].cumsum(0)
    ends[-1] = k - len(always)  # exactly
    drawn = maybe[torch.searchsorted(ends, points, right=True).clamp(max=len(maybe) - 1)]
    both = torch.cat([always.expand(len(numbers), -1), drawn], 1)
    return both.sort(1, descending=True).values
