"""The table of samplers, and the plan of a sampling: which sampler visits which steps, with which settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers.ancestral import ancestral
from ddpm_cli.diffusion.samplers.ddim import ddim
from ddpm_cli.diffusion.samplers.dpm_solver import dpm_solver
from ddpm_cli.diffusion.samplers.langevin import langevin
from ddpm_cli.diffusion.samplers.spacing import spaced
from ddpm_cli.diffusion.samplers.step import Noise, Step
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.text import counted

__all__ = ["SAMPLERS", "Sampler", "Sampling", "plan_sampling"]


@dataclass(frozen=True)
class Sampler:
    """A sampler and its defaults.

    loop: a generator (denoiser, x, noise, **settings) -> Step. `denoiser.schedule` holds the steps to visit; x is the
    state at the last one. It yields a Step after each evaluation of the network, and one with t=-1 at the end. It
    controls its loop: it may keep earlier predictions, add noise or not, or update several times at one step.
    """

    loop: Callable[..., Iterator[Step]]
    steps: int | None  # the default number; None: all
    spacing: str  # the default for small images
    spacing_large: str = "uniform"  # and for images of more than `_SMALL` pixels
    settings: Mapping[str, Any] = field(default_factory=dict)  # of its own, with their defaults
    random: bool = False  # whether it always draws noise; eta > 0 does too


_SMALL = 64  # pixels; the authors of DPM-Solver use log-SNR steps for small images, and uniform steps for large ones

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ancestral, steps=None, spacing="uniform", random=True),
    "ddim": Sampler(ddim, steps=50, spacing="quadratic", settings={"eta": 0.0}),
    "dpm++": Sampler(dpm_solver, steps=20, spacing="logsnr", settings={"order": 2, "eta": 1.0}),
    # Always logsnr: from level to level the noise must fall by the same small factor.
    "langevin": Sampler(
        langevin, steps=40, spacing="logsnr", spacing_large="logsnr", settings={"updates": 5}, random=True
    ),
}
"""By name: Algorithm 2 of the paper, DDIM, DPM-Solver++, annealed Langevin dynamics."""

_DEFAULT = "dpm++"
_ALLOWED = {"eta": (0.0, 1.0), "order": (1, 3), "updates": (1, 1000)}


@dataclass(frozen=True)
class Sampling:
    """A sampler with the steps it visits and its settings. Made by `plan_sampling`.

    timesteps: ascending positions in the model's schedule. settings: those of `Sampler.settings`.
    """

    sampler: str
    timesteps: list[int]
    spacing: str
    settings: Mapping[str, Any]

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for an image: the number of Steps before the last one."""
        updates: int = self.settings.get("updates", 0)
        return len(self.timesteps) * updates + 1 if updates else len(self.timesteps)

    @property
    def is_random(self) -> bool:
        """Whether it draws noise, so that one x_T can become several images."""
        return SAMPLERS[self.sampler].random or self.settings.get("eta", 0.0) > 0

    def describe(self) -> str:
        """The plan in words."""
        steps = counted(len(self.timesteps), f"{self.spacing} step")
        own = "".join(f", {name} {value:g}" for name, value in self.settings.items() if value)
        total = f" = {self.evaluations} evaluations" if "updates" in self.settings else ""
        return f"{self.sampler}, {steps}{own}{total}"

    def facts(self) -> dict[str, Any]:
        """What an image depends on, to record it."""
        return {"sampler": self.sampler, "steps": len(self.timesteps), "spacing": self.spacing, **self.settings}

    def run(self, denoiser: Denoiser, x: Tensor, noise: Noise) -> Iterator[Step]:
        """Sample from x, (B, C, H, W), the state at the last step of `timesteps`. denoiser: of the whole schedule."""
        return SAMPLERS[self.sampler].loop(denoiser.subsequence(self.timesteps), x, noise, **self.settings)


def plan_sampling(
    schedule: NoiseSchedule,
    size: int,
    sampler: str | None = None,
    steps: int | None = None,
    start: int | None = None,
    spacing: str | None = None,
    **settings: Any,
) -> Sampling:
    """Choose what is not given (None). schedule: of the model. size: of its images, in pixels. start: the first step.

    Without a sampler it is dpm++. But where that would visit every step, it is ddpm (Algorithm 2), which is exact and
    costs the same. settings: eta, order or updates. Raises ValueError, beginning with the name of the bad value.
    """
    start = schedule.T - 1 if start is None else start
    given = {name: value for name, value in settings.items() if value is not None}
    if sampler is None:
        every = (steps or SAMPLERS[_DEFAULT].steps or 0) > start
        sampler = "ddpm" if every and not given else _DEFAULT
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler}: is not one of {', '.join(SAMPLERS)}")
    row = SAMPLERS[sampler]
    for name, value in given.items():
        takers = [other for other, taker in SAMPLERS.items() if name in taker.settings]
        if name not in row.settings:
            raise ValueError(f"{name} {value}: is a setting of {' and '.join(takers)}, not of {sampler}")
        low, high = _ALLOWED[name]
        if not low <= value <= high:
            raise ValueError(f"{name} {value}: must be between {low:g} and {high:g}")
    own = {**row.settings, **given}
    if given.get("order") == 3:
        if given.get("eta"):
            raise ValueError(f"eta {given['eta']:g}: needs order 1 or 2")
        own["eta"] = 0.0
    spacing = spacing or (row.spacing if size <= _SMALL else row.spacing_large)
    n = min(row.steps or start + 1, start + 1) if steps is None else steps
    return Sampling(sampler, spaced(schedule, n, start, spacing), spacing, own)
