"""The noise schedule, the forward process and its posterior (Section 2 of the paper).

In code t counts from 0, as in the authors' code: betas[t] here is the paper's beta_{t+1}, and T steps are 0 <= t < T.
Everything is float64 on the CPU. A table is cast once per dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_cli.config import LARGEST_BETA, ScheduleConfig
from ddpm_cli.errors import ModelError

__all__ = ["NoiseSchedule", "make_betas"]


def make_betas(config: ScheduleConfig) -> Tensor:
    """The forward process's variances beta_t, (T,) float64 in (0, 1).

    linear is the paper's (Section 4); scaled_linear is linear in sqrt(beta); squaredcos_cap_v2 is the cosine schedule
    of Nichol and Dhariwal 2021 (Eq. 17); sigmoid is GeoDiff's.
    """
    T, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float64)
    match config.beta_schedule:
        case "linear":
            return torch.linspace(start, end, T, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
        case "squaredcos_cap_v2":
            f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - f[1:] / f[:-1]).clamp(max=LARGEST_BETA)
        case _:  # sigmoid
            return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (end - start) + start


class NoiseSchedule:
    """The forward process q(x_{1:T} | x_0) (Eq. 2), its marginals (Eq. 4) and its posterior (Eq. 6 and 7).

    betas: (T,) in (0, 1). timesteps: (T,) int64, ascending, the t that the network gets at each step; 0..T-1 unless
    this is a subsequence of a longer schedule. All tables below are (T,) float64 tensors on the CPU:

    alphas, alphas_cumprod     alpha_t = 1 - beta_t and its product (Eq. 4); alphas_cumprod_prev starts with 1
    sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod     the coefficients of x_0 and eps in x_t (Eq. 4)
    posterior_variance         beta~_t (Eq. 7), 0 at t=0
    posterior_log_variance     its logarithm; entry 0 is a copy of entry 1, to stay finite
    posterior_mean_coef_x_0, posterior_mean_coef_x_t       mu~_t = coef_x_0 x_0 + coef_x_t x_t (Eq. 7)
    log_betas                  log beta_t, the large variance of the reverse process (Section 3.2)
    lambdas                    log(sqrt(abar_t) / sqrt(1 - abar_t)), half of the log-SNR
    """

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        """Raises ValueError if betas are not in (0, 1)."""
        betas = betas.to("cpu", torch.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a vector of numbers between 0 and 1")
        self.T = len(betas)
        self.timesteps = torch.arange(self.T) if timesteps is None else timesteps
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = torch.cumprod(self.alphas, 0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()

        one_minus = 1 - self.alphas_cumprod
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / one_minus
        self.posterior_mean_coef_x_0 = betas * self.alphas_cumprod_prev.sqrt() / one_minus
        self.posterior_mean_coef_x_t = (1 - self.alphas_cumprod_prev) * self.alphas.sqrt() / one_minus

        # The posterior at t=0 has variance 0. It is never sampled, but its logarithm must be finite.
        second = self.posterior_variance[min(1, self.T - 1)].clamp(min=1e-20)
        self.posterior_log_variance = torch.cat([second[None], self.posterior_variance[1:]]).log()
        self.log_betas = betas.log()
        self.lambdas = 0.5 * (self.alphas_cumprod.log() - one_minus.log())
        self._cast: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> NoiseSchedule:
        """Raises ModelError if the betas are not valid, or so large or so many that alphas_cumprod becomes 0."""
        try:
            schedule = cls(make_betas(config))
        except ValueError as error:
            raise ModelError(str(error)) from None
        if schedule.alphas_cumprod[-1] < torch.finfo(torch.float64).tiny:
            raise ModelError("alphas_cumprod becomes 0 before the last step")
        return schedule

    def subsequence(self, timesteps: Sequence[int]) -> NoiseSchedule:
        """The schedule with only these steps of this one: same marginals (Eq. 4), fewer and longer steps.

        Its alphas_cumprod are this one's at `timesteps` (strictly ascending, in [0, T)). Its betas and its posterior
        follow from them by the same equations (Nichol and Dhariwal 2021, Section 4).
        Raises ValueError if `timesteps` is not such a list.
        """
        steps = list(timesteps)
        if not steps or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= self.T:
            raise ValueError(f"timesteps must be strictly ascending and in [0, {self.T})")
        index = torch.tensor(steps)
        kept = self.alphas_cumprod[index]
        betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        betas = betas.clamp(max=1 - 2**-53)  # a step to less than 1e-16 of the image would round to a beta of 1
        return NoiseSchedule(betas, self.timesteps[index])

    def _at(self, name: str, t: Tensor | int, like: Tensor) -> Tensor | float:
        """Entry t of one of the tables: a float for one t, else (B, 1, 1, 1) with the dtype and device of `like`."""
        if isinstance(t, int):
            return float(getattr(self, name)[t])
        key = (name, like.device, like.dtype)
        if key not in self._cast:
            self._cast[key] = getattr(self, name).to(dtype=like.dtype).to(like.device)
        return self._cast[key][t].view(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x_0: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
        """Noise clean images to step t in one jump: sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Eq. 4).

        x_0, eps: (B, C, H, W) float, x_0 in [-1, 1]; t: (B,) int64 in [0, T), or one int for all.
        Returns x_t, like x_0. Raises ValueError if the shapes disagree.
        """
        if x_0.shape != eps.shape:
            raise ValueError(f"x_0 is {tuple(x_0.shape)} but eps is {tuple(eps.shape)}")
        abar, one_minus = self.marginal(t, x_0)
        return abar * x_0 + one_minus * eps

    def marginal(self, t: Tensor | int, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """sqrt(abar_t), sqrt(1 - abar_t): floats for one t, else (B, 1, 1, 1) with the dtype and device of `like`."""
        return self._at("sqrt_alphas_cumprod", t, like), self._at("sqrt_one_minus_alphas_cumprod", t, like)

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """mu~_t(x_t, x_0), the mean of q(x_{t-1} | x_t, x_0) (Eq. 7). With x_0 from Eq. 15 it is mu_theta of Eq. 11."""
        return self._at("posterior_mean_coef_x_0", t, x_t) * x_0 + self._at("posterior_mean_coef_x_t", t, x_t) * x_t

    def x_0_from_mean(self, mean: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The x_0 whose posterior mean (Eq. 7) is `mean`: the inverse of `posterior_mean`. Like x_t.

        It multiplies an error of the mean by up to 1 / (beta_t sqrt(abar_{t-1})): 8,000 at T in the paper's schedule.
        """
        mine = mean - self._at("posterior_mean_coef_x_t", t, x_t) * x_t
        return mine / self._at("posterior_mean_coef_x_0", t, x_t)

    def log_variance(self, t: Tensor | int, like: Tensor, large: bool) -> Tensor | float:
        """A fixed log sigma_t^2 of the reverse process: log beta~_t, or log beta_t if `large` (Section 3.2).

        At t=0 it is the small one in both cases, as in the authors' code. The result is as in `marginal`.
        """
        if not large:
            return self._at("posterior_log_variance", t, like)
        if isinstance(t, int):
            return self._at("log_betas" if t > 0 else "posterior_log_variance", t, like)
        small, large_ = self.log_variance_range(t, like)
        return torch.where(t.view(-1, *[1] * (like.ndim - 1)) > 0, large_, small)

    def log_variance_range(self, t: Tensor | int, like: Tensor) -> tuple[Any, Any]:
        """log beta~_t and log beta_t, the bounds of log sigma_t^2 (Section 3.2); as in `marginal`."""
        return self._at("posterior_log_variance", t, like), self._at("log_betas", t, like)

    def timesteps_at(self, t: Tensor) -> Tensor:
        """The network's steps at these positions. t: (B,) int64 in [0, T). Returns (B,) int64 on the same device."""
        key = ("timesteps", t.device, torch.int64)
        if key not in self._cast:
            self._cast[key] = self.timesteps.to(t.device)
        return self._cast[key][t]
