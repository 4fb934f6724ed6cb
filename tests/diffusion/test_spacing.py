"""Which steps a sampler visits, and what is chosen for it."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.samplers import SAMPLERS, SPACINGS, plan_sampling, spaced
from ddpm_cli.diffusion.schedule import NoiseSchedule

PAPER = NoiseSchedule.from_config(ScheduleConfig())
COSINE = NoiseSchedule.from_config(ScheduleConfig(beta_schedule="squaredcos_cap_v2"))
SHORT = NoiseSchedule.from_config(ScheduleConfig(num_train_timesteps=20))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", [PAPER, COSINE, SHORT], ids=["linear", "cosine", "short"])
def test_any_number_of_distinct_steps_up_to_the_start(schedule, spacing):
    for start in {0, 1, 7, schedule.T // 2, schedule.T - 1}:
        for n in {1, 2, 3, 5, 10, 15, 20, 50, start, start + 1}:
            if 1 <= n <= start + 1:
                steps = spaced(schedule, n, start, spacing)
                assert len(steps) == n
                assert steps == sorted(set(steps))
                assert steps[0] >= 0
                assert steps[-1] == start
            if n == start + 1:
                assert steps == list(range(n))


def test_uniform_steps():
    assert spaced(PAPER, 4, 999, "uniform") == [249, 499, 749, 999]
    theirs = DDPMScheduler(timestep_spacing="trailing")
    for n in (1, 3, 20, 50, 600, 1000):
        theirs.set_timesteps(n)
        assert spaced(PAPER, n) == theirs.timesteps.tolist()[::-1]


def test_quadratic_steps_are_even_in_the_square_root_of_t():
    steps = torch.tensor(spaced(PAPER, 50, 999, "quadratic"), dtype=torch.float64)
    exact = (1000**0.5 * torch.arange(1, 51, dtype=torch.float64) / 50) ** 2 - 1
    assert (steps - exact).abs().max() <= 1.5  # rounded; the first ones make room for each other
    assert (steps - exact)[5:].abs().max() <= 0.5


def test_logsnr_steps_are_even_in_lambda():
    steps = spaced(PAPER, 20, 999, "logsnr")
    gaps = PAPER.lambdas[steps].diff().abs()
    even = (PAPER.lambdas[0] - PAPER.lambdas[999]) / 20
    # Where one step of the schedule is longer than that, the nearest one is taken.
    assert (gaps[5:] / even - 1).abs().max() < 0.05


def test_logsnr_steps_are_where_there_is_an_image():
    """The cosine schedule ends at lambda = -10, but from -5.1 on there is nothing but noise."""
    lambdas = COSINE.lambdas[spaced(COSINE, 20, 999, "logsnr")]
    assert COSINE.lambdas[-1] < -9
    assert (lambdas < -5.2).sum() == 1  # the start


def test_a_schedule_of_a_million_steps_needs_little_memory():
    betas = torch.full((1_000_000,), 5e-6, dtype=torch.float64)
    steps = spaced(NoiseSchedule(betas), 500_000, spacing="logsnr")
    assert steps == sorted(set(steps))


def test_bad_steps_are_refused():
    for n in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            spaced(PAPER, n)
    with pytest.raises(ValueError, match="spacing spiral"):
        spaced(PAPER, 5, spacing="spiral")


def test_the_default_is_fast_and_exact_where_that_costs_the_same():
    fast = plan_sampling(PAPER, 32)
    assert (fast.sampler, fast.evaluations) == ("dpm++", 20)
    assert plan_sampling(PAPER, 32, steps=1000).sampler == "ddpm"
    assert plan_sampling(SHORT, 32).facts() == {"sampler": "ddpm", "steps": 20, "spacing": "uniform"}
    assert plan_sampling(PAPER, 32, start=9).evaluations == 10
    exact = plan_sampling(PAPER, 32, "ddpm")
    assert exact.timesteps == list(range(1000))
    assert (fast.spacing, plan_sampling(PAPER, 256).spacing) == ("logsnr", "uniform")
    assert plan_sampling(PAPER, 256, "langevin").spacing == "logsnr"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_has_a_plan_for_every_start(sampler):
    for start in (0, 3, 19):
        plan = plan_sampling(SHORT, 8, sampler, start=start)
        assert plan.timesteps[-1] == start
        assert 1 <= len(plan.timesteps) <= start + 1


def test_randomness_is_known():
    names = {name for name in SAMPLERS if plan_sampling(PAPER, 32, name).is_random}
    assert names == {"ddpm", "dpm++", "langevin"}
    assert plan_sampling(PAPER, 32, "ddim", eta=0.5).is_random
    assert not plan_sampling(PAPER, 32, "dpm++", eta=0).is_random
    assert not plan_sampling(PAPER, 32, "dpm++", order=3).is_random


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler": "euler"}, r"^sampler euler: is not one of ddpm, ddim"),
        ({"sampler": "ddpm", "eta": 0.5}, r"^eta 0.5: is a setting of ddim and dpm\+\+, not of ddpm"),
        ({"eta": 0.5, "order": 3}, "^eta 0.5: needs order 1 or 2"),
        ({"sampler": "ddim", "eta": 1.5}, "^eta 1.5: must be between 0 and 1"),
        ({"sampler": "ddim", "order": 2}, "^order 2: is a setting of dpm"),
        ({"order": 4}, "^order 4: must be between 1 and 3"),
        ({"sampler": "langevin", "updates": 0}, "^updates 0: must be"),
        ({"spacing": "even"}, "^spacing even: is not one of uniform"),
        ({"steps": 1001}, "^steps 1001: must be between 1 and 1000"),
    ],
)
def test_values_that_make_no_plan_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        plan_sampling(PAPER, 32, **values)
