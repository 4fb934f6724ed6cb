"""Previews: their share of a run's time, the last one, and a stop during a preview."""

from dataclasses import replace

import pytest
import torch

from conftest import SMALL
from ddpm_cli.config import ScheduleConfig, TrainConfig
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.previews import IMAGES, draw, plan_previews

SETTINGS = TrainConfig(steps=800, batch_size=32, lr=1e-3, sample_every=200)


def cost_of(plan, settings, first, cost):
    """The steps with previews, and the time of these in training steps, counted step by step."""
    due = [step for step in range(first + 1, settings.steps + 1) if plan.is_due(step) or step == settings.steps]
    return due, len(due) * 2 * plan.steps * cost


@pytest.mark.parametrize("first", [0, 350, 799])
@pytest.mark.parametrize("cost", [0.001, 0.05, 0.17, 1.0])
@pytest.mark.parametrize("steps", [10, 800, 1001, 800_000])
def test_previews_take_a_small_share_of_the_time(steps, cost, first):
    settings = replace(SETTINGS, steps=steps)
    first = min(first, steps - 1)
    plan = plan_previews(settings, first, 1000, cost, asked=False)
    due, spent = cost_of(plan, settings, first, cost)
    left = steps - first
    assert plan.share == pytest.approx(spent / (left + spent))
    assert due[-1] == steps
    assert plan.every % 200 == 0
    if plan.share > 0.05:  # then only the last preview is left, with the fewest steps
        assert (len(due), plan.steps) == (1, 20)


def test_cheap_previews_have_all_useful_steps():
    plan = plan_previews(SETTINGS, 0, 1000, cost=0.001, asked=False)
    assert (plan.every, plan.steps) == (200, 100)
    assert plan_previews(SETTINGS, 0, 7, cost=0.001, asked=False).steps == 7


def test_expensive_previews_are_shorter_and_then_fewer():
    plans = [plan_previews(SETTINGS, 0, 1000, cost, asked=False) for cost in (0.08, 0.15, 0.4, 3.0)]
    assert [(plan.every, plan.steps) for plan in plans] == [(200, 65), (400, 70), (800, 52), (800, 20)]


def test_an_interval_that_the_user_chose_stays():
    plan = plan_previews(SETTINGS, 0, 1000, cost=1.0, asked=True)
    assert (plan.every, plan.steps) == (200, 20)


def test_a_stop_ends_a_preview_between_two_layers():
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) > 10

    unet = UNet(SMALL).eval()
    schedule = ScheduleConfig(20)
    assert draw(unet, schedule, 0, 20, should_stop) is None
    assert len(asked) == 11  # fewer than the layers of a U-Net, so the first step was not finished
    samples = draw(unet, schedule, 0, 20, lambda: False)
    assert samples is not None
    assert samples.shape == (IMAGES, 1, 8, 8)
    assert torch.equal(samples, draw(unet, schedule, 0, 20, lambda: False))


def test_a_finished_run_can_be_planned():
    assert plan_previews(SETTINGS, 800, 1000, cost=0.1, asked=False).steps == 20
