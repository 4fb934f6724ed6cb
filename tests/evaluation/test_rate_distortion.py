"""Rate against distortion, against closed forms for Gaussian images."""

import json
import math

import pytest
import torch

from conftest import picture
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.evaluation.rate_distortion import rate_distortion

VARIANCE = 0.25


@pytest.fixture(scope="module")
def measured():
    """Images of independent pixels from N(0, 1/4), and the ideal denoiser, E[x_0 | x_t]."""

    def network(x_t, t):
        abar = float(denoiser.schedule.alphas_cumprod[int(t)])
        return x_t * math.sqrt(abar) * VARIANCE / (abar * VARIANCE + 1 - abar)

    config = ScheduleConfig(num_train_timesteps=100, beta_end=0.2, prediction_type="sample", clip_sample=False)
    denoiser = Denoiser.from_config(network, config)
    x_0 = VARIANCE**0.5 * torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return denoiser.schedule, x_0, denoiser, rate_distortion(denoiser, x_0)


def test_distortion_and_rate_are_those_of_a_gaussian(measured):
    """mse = v / (1 + v SNR), and the terms are 1/2 (SNR_{t-1} - SNR_t) mse_t (Kingma et al. 2021, Eq. 14)."""
    schedule, x_0, _, depths = measured
    assert [depth.t for depth in depths] == list(range(99, -1, -1))
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    mse = VARIANCE / (1 + VARIANCE * snr)
    terms = 0.5 * (snr[:-1] - snr[1:]) * mse[1:]
    power = float(x_0.double().square().mean())
    abar = float(schedule.alphas_cumprod[-1])
    prior = 0.5 * (-abar + abar * power - math.log(1 - abar))
    rate = prior
    for depth in depths:
        assert depth.mse == pytest.approx(float(mse[depth.t]), rel=0.08)
        assert depth.rate == pytest.approx(rate / math.log(2), rel=0.05)
        rate += float(terms[depth.t - 1])
    assert depths[0].rate == pytest.approx(prior / math.log(2), rel=1e-9)


def test_it_does_not_depend_on_the_batches(measured):
    _, x_0, denoiser, depths = measured
    done = []
    again = rate_distortion(denoiser, x_0, batch_size=3, progress=done.append)
    assert done[-1] == 8 * 100
    for one, other in zip(depths, again, strict=True):
        assert (one.t, one.rate, one.mse) == pytest.approx((other.t, other.rate, other.mse), rel=1e-6)


def test_fewer_steps_have_a_higher_bound(measured):
    schedule, x_0, denoiser, depths = measured
    fewer = rate_distortion(denoiser.subsequence([0, *spaced(schedule, 9)]), x_0)
    assert [depth.t for depth in fewer] == [*spaced(schedule, 9)[::-1], 0]
    assert fewer[-1].rate > depths[-1].rate
    assert fewer[-1].rmse == pytest.approx(depths[-1].rmse, rel=0.05)


def test_the_command(cli, small_model, color_model, digits, photo):
    code, out, err = cli("rate-distortion", digits, "-m", small_model, "-n", 5, "-o", "rd.png", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["n"], found["steps"], len(found["rows"])) == (5, 20, 20)
    assert [row["reverse_steps"] for row in found["rows"]] == list(range(1, 21))
    assert [row["t"] for row in found["rows"]] == list(range(20, 0, -1))
    rates = [row["rate"] for row in found["rows"]]
    assert rates == sorted(rates)
    assert len([line for line in err.splitlines() if line.startswith("  ")]) == 11
    assert picture("rd.png").size == (1280, 36 + 2 * 360)
    code, out, _ = cli("rate-distortion", photo, "-m", color_model, "--steps", 7, "-o", "one.png", "--json")
    assert (code, json.loads(out)["n"], len(json.loads(out)["rows"])) == (0, 1, 7)


def test_images_that_cannot_be_used_are_named(cli, small_model, digits, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.png").write_bytes(b"nothing")
    code, _, err = cli("rate-distortion", "mixed", "-m", small_model, "-o", "rd.png")
    assert (code, "mixed: none of 1 image files can be decoded, for example a.png: not an image" in err) == (1, True)
    (tmp_path / "mixed" / "b.png").write_bytes(next(digits.rglob("*.png")).read_bytes())
    code, _, err = cli("rate-distortion", "mixed", "-m", small_model, "-o", "rd.png")
    assert (code, "left out 1 images that cannot be used, for example a.png: not an image" in err) == (0, True)
