"""The noise schedule and everything that follows from it (Section 2 of the paper).

In code t counts from 0, as in the authors' code: betas[t] here is the paper's beta_{t+1}, and T steps are 0 <= t < T.
Everything is float64 on the CPU; it is cast once, when it first meets a tensor of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.errors import ModelError

__all__ = ["NoiseSchedule", "make_betas"]

_MARGINAL = ("alphas_cumprod", "one_minus_alphas_cumprod")  # x_t = sqrt(the one) x_0 + sqrt(the other) eps


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
            return (1 - f[1:] / f[:-1]).clamp(max=0.999)
        case _:  # sigmoid
            return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (end - start) + start


class NoiseSchedule:
    """q(x_{1:T} | x_0) of Eq. 2, its marginals, its posterior, and how p(x_{t-1} | x_t) follows from a network.

    betas: (T,) in (0, 1). timesteps: (T,) int64, ascending, the t by which the network knows each step; 0..T-1 unless
    this is a subsequence of a longer schedule. variance_type: which sigma_t^2 the reverse process has, and
    prediction_type: what the network's output is; both as `ScheduleConfig` lists them.
    All attributes below are (T,) float64 tensors on the CPU:

    alphas, alphas_cumprod     alpha_t = 1 - beta_t and its product (Eq. 4); alphas_cumprod_prev starts with 1
    posterior_variance         beta~_t (Eq. 7), 0 at t=0
    posterior_log_variance     its logarithm, the first replaced by the second to stay finite
    posterior_mean_coef_x_0, posterior_mean_coef_x_t       mu~_t = coef_x_0 x_0 + coef_x_t x_t (Eq. 7)
    log_betas                  log beta_t
    log_variance               log sigma_t^2 of p(x_{t-1} | x_t) unless it is learned: one of the two above, but the
                               first always the posterior's
    eps_weight                 beta_t^2 / (2 sigma_t^2 alpha_t (1 - alphas_cumprod_t)), L_{t-1}'s weight (Eq. 12)
    """

    def __init__(
        self,
        betas: Tensor,
        timesteps: Tensor | None = None,
        variance_type: str = ScheduleConfig.variance_type,
        prediction_type: str = ScheduleConfig.prediction_type,
    ) -> None:
        """Raises ValueError if betas are not in (0, 1)."""
        betas = betas.to("cpu", torch.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a vector of numbers between 0 and 1")
        self.T = len(betas)
        self.timesteps = torch.arange(self.T) if timesteps is None else timesteps
        self.variance_type = variance_type
        self.prediction_type = prediction_type
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

        # The posterior at t=0 is a point; nothing is drawn from it, but its logarithm must be finite.
        second = self.posterior_variance[min(1, self.T - 1)].clamp(min=1e-20)
        self.posterior_log_variance = torch.cat([second[None], self.posterior_variance[1:]]).log()
        self.log_betas = betas.log()
        self.log_variance = self.posterior_log_variance
        if variance_type == "fixed_large":
            self.log_variance = torch.cat([self.posterior_log_variance[:1], self.log_betas[1:]])
        self.eps_weight = betas**2 / (2 * self.log_variance.exp() * self.alphas * one_minus)
        self._cast: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> NoiseSchedule:
        """Raises ModelError if the configuration makes no valid betas."""
        try:
            return cls(make_betas(config), None, config.variance_type, config.prediction_type)
        except ValueError as error:
            raise ModelError(str(error)) from None

    def subsequence(self, timesteps: Sequence[int], variance_type: str | None = None) -> NoiseSchedule:
        """The schedule that visits only these steps of this one: same marginals (Eq. 4), fewer and longer steps.

        Its alphas_cumprod are this one's at `timesteps` (strictly ascending, in [0, T)), from which its betas, its
        posterior and its variances follow by the same equations (Nichol and Dhariwal 2021, Section 4).
        Raises ValueError if the steps are not such a list.
        """
        steps = list(timesteps)
        if not steps or steps != sorted(set(steps)) or steps[0] < 0 or steps[-1] >= self.T:
            raise ValueError(f"timesteps must be strictly ascending and in [0, {self.T})")
        index = torch.tensor(steps)
        kept = self.alphas_cumprod[index]
        betas = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        return NoiseSchedule(betas, self.timesteps[index], variance_type or self.variance_type, self.prediction_type)

    def spaced(self, n: int, start: int | None = None) -> list[int]:
        """n steps spread evenly over 0..start (default T-1), both ends included, as an ascending list.

        Raises ValueError unless 1 <= n <= start + 1.
        """
        start = self.T - 1 if start is None else start
        if not 1 <= n <= start + 1:
            raise ValueError(f"the number of steps must be between 1 and {start + 1}, not {n}")
        return [start] if n == 1 else [round(i * start / (n - 1)) for i in range(n)]

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
        return self._at("sqrt_alphas_cumprod", t, x_0) * x_0 + self._at("sqrt_one_minus_alphas_cumprod", t, x_0) * eps

    def predict_x_0(self, x_t: Tensor, t: Tensor | int, output: Tensor) -> Tensor:
        """The clean image x_0 that a network's output stands for, by `prediction_type`. Not clipped.

        x_t, output: (B, C, H, W). For a network that predicts eps this is Eq. 15.
        """
        match self.prediction_type:
            case "epsilon":
                noise = self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * output
                return (x_t - noise) / self._at("sqrt_alphas_cumprod", t, x_t)
            case "sample":
                return output
            case _:  # v_prediction: a rotation of (x_0, eps), taken back
                abar, one_minus = (self._at(f"sqrt_{name}", t, x_t) for name in _MARGINAL)
                return abar * x_t - one_minus * output

    def target(self, x_0: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
        """What the network's output is trained to be, by `prediction_type`: eps (Eq. 14), x_0, or v. Like x_0."""
        match self.prediction_type:
            case "epsilon":
                return eps
            case "sample":
                return x_0
            case _:
                abar, one_minus = (self._at(f"sqrt_{name}", t, x_0) for name in _MARGINAL)
                return abar * eps - one_minus * x_0

    def learned_log_variance(self, values: Tensor, t: Tensor | int) -> Tensor:
        """log sigma_t^2 as a network says it, by `variance_type`. values: its second half of channels, (B, C, H, W)."""
        if self.variance_type == "learned":
            return values.clamp(min=1e-20).log()
        small, large = (self._at(name, t, values) for name in ("posterior_log_variance", "log_betas"))
        fraction = (values + 1) / 2
        return fraction * large + (1 - fraction) * small  # Nichol and Dhariwal 2021, Eq. 15

    def predict_eps(self, x_t: Tensor, t: Tensor | int, x_0: Tensor) -> Tensor:
        """The noise in x_t if its clean image were x_0: Eq. 15 the other way round."""
        return (x_t - self._at("sqrt_alphas_cumprod", t, x_t) * x_0) / self._at("sqrt_one_minus_alphas_cumprod", t, x_t)

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """mu~_t(x_t, x_0), the mean of q(x_{t-1} | x_t, x_0) (Eq. 7). With x_0 from Eq. 15 it is mu_theta of Eq. 11."""
        return self._at("posterior_mean_coef_x_0", t, x_t) * x_0 + self._at("posterior_mean_coef_x_t", t, x_t) * x_t
