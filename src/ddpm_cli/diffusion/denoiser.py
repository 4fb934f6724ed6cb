"""p(x_{t-1} | x_t): turns the output of a network into x_0, eps, mean and variance, for the loss and all samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["Denoiser", "Prediction"]

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> output


class Denoiser:
    """A network and the schedule it was trained with: (x_t, t) -> x_0, eps, log sigma_t^2.

    network: (x_t, t) -> (B, C, H, W), the quantity that `config.prediction_type` names; (B, 2C, H, W) if it
    learned the variance. t is (B,) int64, or (1,) for one step of the whole batch. schedule: that of the configuration,
    or a subsequence of it. trained: that of the configuration, if `schedule` is a subsequence.
    """

    def __init__(
        self, network: Network, schedule: NoiseSchedule, config: ScheduleConfig, trained: NoiseSchedule | None = None
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.config = config
        self.trained = trained or schedule

    @classmethod
    def from_config(cls, network: Network, config: ScheduleConfig) -> Denoiser:
        """Raises ModelError if the betas of the configuration are not valid."""
        return cls(network, NoiseSchedule.from_config(config), config)

    def __call__(self, x_t: Tensor, t: Tensor | int, clip: bool = True) -> Prediction:
        """Evaluate the network once.

        x_t: (B, C, H, W). t: a position in `schedule`, (B,) int64, or one int for the whole batch.
        clip: limit x_0 to the range of images as the configuration specifies, see `clip_x_0`.
        """
        if isinstance(t, int):
            step = int(self.schedule.timesteps[t])
            output = self.network(x_t, torch.full((1,), step, device=x_t.device))  # torch.tensor would wait for CUDA
        else:
            output = self.network(x_t, self.schedule.timesteps_at(t))
        return Prediction(self, x_t, t, output, clip)

    def target(self, x_0: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
        """The training target by `prediction_type`: eps (Eq. 14), x_0, mu~_t (Eq. 7) or v. Shape and dtype of x_0."""
        match self.config.prediction_type:
            case "epsilon":
                return eps
            case "sample":
                return x_0
            case "mean":
                return self.schedule.posterior_mean(x_0, self.schedule.q_sample(x_0, t, eps), t)
            case _:  # v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022)
                abar, one_minus = self.schedule.marginal(t, x_0)
                return abar * eps - one_minus * x_0

    def subsequence(self, timesteps: Sequence[int]) -> Denoiser:
        """The same network on fewer steps, strictly ascending positions in `schedule`.

        If steps are left out, a variance that fits only single steps becomes the fixed small one. A fixed large one is
        far too large for few long steps: FID on CIFAR-10 at 20 steps is 133 with it and 18 without (Song et al. 2021,
        Table 1). A learned one is far too small; a learned range fits, since its bounds are those of the long steps.
        Raises ValueError if `timesteps` is not such a list.
        """
        schedule = self.schedule.subsequence(timesteps)
        gaps = len(timesteps) < timesteps[-1] + 1
        single = gaps and self.config.variance_type in ("fixed_large", "learned", "learned_log")
        config = replace(self.config, variance_type="fixed_small") if single else self.config
        return Denoiser(self.network, schedule, config, self.trained)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network predicts from x_t. Each value is computed when it is first used.

    output: the network's prediction, (B, C, H, W), without the channels of a learned variance: see `values`.
    """

    denoiser: Denoiser
    x_t: Tensor
    t: Tensor | int
    raw: Tensor
    clip: bool

    @property
    def output(self) -> Tensor:
        return self.raw[:, : self.x_t.shape[1]]

    @property
    def values(self) -> Tensor | None:
        """The second half of the channels, (B, C, H, W); None if the variance is fixed."""
        channels = self.x_t.shape[1]
        return self.raw[:, channels:] if self.raw.shape[1] > channels else None

    @cached_property
    def x_0(self) -> Tensor:
        """The clean image, (B, C, H, W). For a network that predicts eps this is Eq. 15.

        For one that predicts mu~_t it is Eq. 7 solved for x_0. The network knows the mean of a single step of the
        schedule of its training, so that schedule's coefficients solve it, also where the sampler takes longer steps.
        """
        match self.denoiser.config.prediction_type:
            case "epsilon":
                abar, one_minus = self.denoiser.schedule.marginal(self.t, self.x_t)
                x_0 = (self.x_t - one_minus * self.output) / abar
            case "sample":
                x_0 = self.output
            case "mean":
                steps = self.denoiser.schedule.timesteps
                at = int(steps[self.t]) if isinstance(self.t, int) else self.denoiser.schedule.timesteps_at(self.t)
                x_0 = self.denoiser.trained.x_0_from_mean(self.output, self.x_t, at)
            case _:  # v is a rotation of (x_0, eps); this rotates it back
                abar, one_minus = self.denoiser.schedule.marginal(self.t, self.x_t)
                x_0 = abar * self.x_t - one_minus * self.output
        return clip_x_0(x_0, self.denoiser.config) if self.clip else x_0

    @cached_property
    def eps(self) -> Tensor:
        """The noise in x_t that belongs to x_0, clipped or not: Eq. 15 solved for eps. (B, C, H, W)."""
        abar, one_minus = self.denoiser.schedule.marginal(self.t, self.x_t)
        return (self.x_t - abar * self.x_0) / one_minus

    @cached_property
    def mean(self) -> Tensor:
        """mu_theta(x_t, t), the mean of p(x_{t-1} | x_t): mu~_t of Eq. 7 for the predicted x_0.

        If x_0 is not clipped, this is Eq. 11 for a network that predicts eps, and the output itself for one that
        predicts mu~_t.
        """
        return self.denoiser.schedule.posterior_mean(self.x_0, self.x_t, self.t)

    @cached_property
    def log_variance(self) -> Tensor | float:
        """log sigma_t^2: like x_t if it is learned; else a float for one t, and (B, 1, 1, 1) for a tensor of them.

        learned_log: the output is log(sigma_t^2 / beta_t), a diagonal without bounds as in the authors' code. Their
        output is log sigma_t^2 itself. A network starts at an output of 0, which is the large fixed variance here, and
        would be a variance of 1 there: 10,000 times too large at the first step of the paper's schedule.
        """
        schedule, kind = self.denoiser.schedule, self.denoiser.config.variance_type
        if self.values is None or not self.denoiser.config.learns_variance:
            return schedule.log_variance(self.t, self.x_t, large=kind == "fixed_large")
        if kind == "learned":  # the variance itself, as diffusers reads it
            return self.values.clamp(min=1e-20).log()
        small, large = schedule.log_variance_range(self.t, self.x_t)
        if kind == "learned_log":
            return self.values + large  # type: ignore[no-any-return]
        fraction: Tensor = (self.values + 1) / 2
        return fraction * large + (1 - fraction) * small  # type: ignore[no-any-return]  # Nichol and Dhariwal, Eq. 15


def clip_x_0(x_0: Tensor, config: ScheduleConfig) -> Tensor:
    """Limit a predicted x_0, (B, C, H, W), to the range of images, as a model's configuration specifies.

    By clipping, as in the authors' code; by dynamic thresholding, which divides an image by a quantile of its absolute
    values if that is above 1 (Saharia et al. 2022, Section 2.3); or not at all.
    """
    if config.thresholding:
        extent = torch.quantile(x_0.flatten(1).abs(), config.dynamic_thresholding_ratio, dim=1)
        extent = extent.clamp(min=1, max=config.sample_max_value).view(-1, 1, 1, 1)
        return x_0.clamp(-extent, extent) / extent
    if config.clip_sample:
        return x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
    return x_0
