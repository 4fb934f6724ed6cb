"""Mixtures of two states, in closed form."""

import math

import pytest
import torch

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.interpolation import linear, spherical
from ddpm_cli.diffusion.schedule import NoiseSchedule

SHARES = torch.linspace(0, 1, 5, dtype=torch.float64)


def draw(seed: int, size: int = 4) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mix", [linear, spherical])
def test_the_ends_are_exact(mix):
    a, b = draw(0), draw(1)
    mixed = mix(a, b, SHARES)
    assert (mixed.shape, mixed.dtype) == ((5, 3, 4, 4), torch.float32)
    assert torch.equal(mixed[:1], a)
    assert torch.equal(mixed[-1:], b)


def test_with_one_noise_the_linear_mixture_is_a_noised_mixture():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    a, b, eps = draw(0).double(), draw(1).double(), draw(2).double()
    mixed = linear(schedule.q_sample(a, 499, eps), schedule.q_sample(b, 499, eps), SHARES)
    of_images = linear(a, b, SHARES)
    torch.testing.assert_close(mixed, schedule.q_sample(of_images, 499, eps.expand_as(of_images)))


def test_the_spherical_mixture_is_an_arc():
    a, b = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    a[..., 0] = b[..., 1] = 3
    expected = [[3 * math.cos(share * math.pi / 2), 3 * math.sin(share * math.pi / 2)] for share in SHARES.tolist()]
    torch.testing.assert_close(spherical(a, b, SHARES).view(5, 2), torch.tensor(expected, dtype=torch.float64))


def test_the_spherical_mixture_of_noise_is_noise():
    a, b = draw(0, 100), draw(1, 100)  # 30,000 values: three standard errors of a deviation are 1.2 %
    torch.testing.assert_close(spherical(a, b, SHARES).std((1, 2, 3)), torch.ones(5), rtol=0.012, atol=0)
    assert linear(a, b, SHARES)[2].std().item() == pytest.approx(math.sqrt(0.5), rel=0.012)


def test_without_an_angle_the_spherical_mixture_is_linear():
    a = draw(0)
    for b in (a, 2 * a, torch.zeros_like(a)):
        assert torch.equal(spherical(a, b, SHARES), linear(a, b, SHARES))
