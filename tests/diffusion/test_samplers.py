"""The reverse loop and the ancestral step: against diffusers and closed forms."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.diffusion.samplers.ancestral import ancestral

T1000 = Denoiser.from_config(lambda x_t, t: x_t, ScheduleConfig()).schedule


def denoiser(network, chosen, kind="fixed_small", **config) -> Denoiser:
    """A denoiser on these steps, with this variance even if steps are left out."""
    whole = Denoiser.from_config(network, ScheduleConfig(variance_type=kind, **config))
    return Denoiser(network, whole.schedule.subsequence(chosen), whole.config)


@pytest.mark.parametrize("steps", [1000, 50, 7])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_same_as_diffusers(kind, steps):
    """The same states, step by step, given the same noise. In float64, against their float32 schedule."""
    chosen = [0, *spaced(T1000, steps)[1:]]  # at the end of a list without 0, theirs adds noise of the large variance
    theirs = DDPMScheduler(variance_type=kind)
    theirs.set_timesteps(timesteps=chosen[::-1])

    def draw(seed):
        return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    noises = iter(draw(t + 5000) for t in reversed(chosen))
    ours = ancestral(denoiser(lambda x_t, t: draw(int(t)), chosen, kind), draw(0), lambda: next(noises))
    state = next(ours)
    for following in ours:
        expected = theirs.step(
            draw(state.t), state.t, state.x_t, generator=torch.Generator().manual_seed(state.t + 5000)
        )
        torch.testing.assert_close(state.x_0, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(following.x_t, expected.prev_sample, rtol=1e-4, atol=1e-4)
        state = following


def gaussian_eps(mean: float, std: float):
    """The ideal network for data that is N(mean, std^2): eps = E[eps | x_t], in closed form."""

    def eps(x_t, t):
        abar = T1000.alphas_cumprod[t].item()
        return math.sqrt(1 - abar) * (x_t - math.sqrt(abar) * mean) / (abar * std**2 + 1 - abar)

    return eps


def exact_moments(mean: float, std: float, chosen: list[int], kind: str) -> tuple[float, float]:
    """Mean and standard deviation of the sample for that network: Algorithm 2 applied to a Gaussian in closed form."""
    m, v = 0.0, 1.0
    for i in reversed(range(len(chosen))):
        abar = T1000.alphas_cumprod[chosen[i]].item()
        before = T1000.alphas_cumprod[chosen[i - 1]].item() if i else 1.0
        beta = 1 - abar / before
        gain = (
            math.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar)
        )  # E[x_0 | x_t] = mean + gain (x_t - sqrt(abar) mean)
        of_x_0, of_x_t = math.sqrt(before) * beta / (1 - abar), math.sqrt(1 - beta) * (1 - before) / (1 - abar)
        slope = of_x_0 * gain + of_x_t
        m = slope * m + of_x_0 * mean * (1 - gain * math.sqrt(abar))
        sigma2 = 0.0 if i == 0 else beta if kind == "fixed_large" else beta * (1 - before) / (1 - abar)
        v = slope**2 * v + sigma2
    return m, math.sqrt(v)


@pytest.mark.parametrize("steps", [1000, 200, 20])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_gaussian_data_is_reproduced(kind, steps):
    mean, std = 0.3, 0.5
    chosen = spaced(T1000, steps)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(1, 1, 200, 200, dtype=torch.float64, generator=generator)

    *_, last = ancestral(denoiser(gaussian_eps(mean, std), chosen, kind, clip_sample=False), noise(), noise)
    found = last.x_t.mean().item(), last.x_t.std().item()
    # 40,000 samples: three standard errors are 0.0075 for the mean and 1.1 % for the deviation.
    assert found == pytest.approx(exact_moments(mean, std, chosen, kind), rel=0.012, abs=0.0075)
    if steps == 1000:  # all steps reproduce the data
        assert found == pytest.approx((mean, std), rel=0.02, abs=0.01)


def test_a_point_is_recovered_exactly():
    """If the data is a single point, the posterior variance is exact, and the last step is its mean."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=generator)

    *_, last = ancestral(denoiser(gaussian_eps(-0.7, 0.0), spaced(T1000, 100)), noise(), noise)
    torch.testing.assert_close(last.x_t, torch.full_like(last.x_t, -0.7), rtol=0, atol=1e-9)


def test_the_loop_yields_every_state_once():
    asked, drawn = [], []

    def unet(x_t, t):
        asked.append(t.tolist())
        return torch.full_like(x_t, 100.0)

    def noise():
        drawn.append(1)
        return torch.zeros(2, 1, 4, 4, dtype=torch.float64)

    x_T = torch.randn(2, 1, 4, 4)
    states = list(ancestral(denoiser(unet, [0, 10, 500]), x_T, noise))
    assert [state.t for state in states] == [500, 10, 0, -1]
    assert asked == [[500], [10], [0]]
    assert len(drawn) == 2  # no noise at the last step
    assert torch.equal(states[0].x_t, x_T)
    assert states[1].x_t.dtype == torch.float32  # whatever the dtype of the noise
    assert all(state.x_0.abs().max() <= 1 for state in states[:3])  # clipped
    assert torch.equal(states[3].x_t, states[2].x_0)  # the last mean is the prediction itself
