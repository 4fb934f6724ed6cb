"""Samples that share a state of the reverse process."""

import pytest
import torch

from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.models.sharing import evaluations_to, sample_from, state_at
from ddpm_cli.rng import ImageNoise


@pytest.fixture(scope="module")
def model(small_model) -> DDPM:
    return DDPM.from_pretrained(small_model, precision="fp32")


@pytest.mark.parametrize(
    ("sampler", "settings"), [("ddpm", {}), ("ddim", {"eta": 1.0}), ("dpm++", {"eta": 1.0}), ("langevin", {})]
)
def test_the_state_is_on_the_way_of_image_0(model, sampler, settings):
    """A plan of all steps visits every t."""
    plan = model.sampling(sampler, 20, **settings)
    noise = ImageNoise(3, [0], model.shape)
    states = {}
    for step in model.sample_loop(noise(), plan, noise=noise):
        states.setdefault(step.t, step.x_t)
    for t in (19, 10, 0):
        assert state_at(model, t, plan, seed=3).equal(states[t])


def test_all_steps_below_t_are_those_of_the_plan(model):
    """From x_t, with the noise that image 0 draws from there on, the sample is that of image 0."""
    plan = model.sampling("ddpm", 20)
    noise = ImageNoise(0, [0], model.shape)
    steps = list(model.sample_loop(noise(), plan, noise=noise))
    noise = ImageNoise(0, [0], model.shape)
    for _ in range(1 + 19 - 7):  # x_T, and those of the steps down to 7
        noise()
    again = list(model.sample_loop(state_at(model, 7, plan), plan.sampler, start=7, noise=noise))
    assert again[-1].x_t.equal(steps[-1].x_t)


def test_a_state_between_the_steps_of_a_plan_leaves_it_once(model):
    """With few steps there may be none at t: the way there is the plan's, but for the last step."""
    plan = model.sampling("ddpm", 4)
    assert plan.timesteps == [4, 9, 14, 19]
    noise = ImageNoise(0, [0], model.shape)
    steps = list(model.sample_loop(noise(), plan, noise=noise))
    assert state_at(model, 14, plan).equal(steps[1].x_t)
    denoiser = model.denoiser.subsequence([4, 9, 10, 14, 19])
    noise = ImageNoise(0, [0], model.shape)
    for _ in range(2):
        noise()
    prediction = denoiser(steps[1].x_t.expand(2, -1, -1, -1), 3)
    sigma = torch.tensor(0.5 * prediction.log_variance).exp()
    torch.testing.assert_close(state_at(model, 10, plan), prediction.mean[:1] + sigma * noise(), rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_the_others(model):
    plan = model.sampling("ddpm", 20)
    x_t = state_at(model, 9, plan)
    many = sample_from(model, x_t, 9, 3, plan)
    assert many.dtype == torch.uint8
    assert sample_from(model, x_t, 9, 1, plan).equal(many[:1])
    assert not many[0].equal(many[1])
    assert not sample_from(model, x_t, 9, 1, plan, seed=1).equal(many[:1])


def test_the_smaller_t_the_more_is_shared(model):
    plan = model.sampling("ddpm", 20)
    spread = [sample_from(model, state_at(model, t, plan), t, 8, plan).double().std(0).mean() for t in (19, 8, 1, 0)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] == 0  # the last step adds no noise


@pytest.mark.parametrize(("sampler", "steps", "settings"), [("ddpm", 20, {}), ("langevin", 7, {"updates": 3})])
@pytest.mark.parametrize("t", [0, 5, 15, 19])
def test_the_evaluations_to_a_state_are_known(model, sampler, steps, settings, t):
    plan = model.sampling(sampler, steps, **settings)
    seen = []
    state_at(model, t, plan, progress=seen.append)
    assert sum(seen) == evaluations_to(plan, t)


def test_progress_counts_the_evaluations(model):
    plan = model.sampling("ddpm", 20)
    seen = []
    x_t = state_at(model, 15, plan, progress=seen.append)
    sample_from(model, x_t, 15, 3, plan, progress=seen.append)
    assert seen == [1] * 5 + [3] * 16


def test_a_step_that_does_not_exist_is_refused(model):
    for t in (-1, 20):
        with pytest.raises(ValueError, match="ascending"):
            state_at(model, t, model.sampling("ddpm"))
