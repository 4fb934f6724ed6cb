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
    return due, len(due) * 2 * cost


@pytest.mark.parametrize("first", [0, 350, 799])
@pytest.mark.parametrize("cost", [0.02, 1.0, 3.4, 20.0])
@pytest.mark.parametrize("steps", [10, 800, 1001, 800_000])
def test_previews_take_a_small_share_of_the_time(steps, cost, first):
    settings = replace(SETTINGS, steps=steps)
    first = min(first, steps - 1)
    plan = plan_previews(settings, first, cost, asked=False)
    due, spent = cost_of(plan, settings, first, cost)
    left = steps - first
    assert plan.share == pytest.approx(spent / (left + spent))
    assert due[-1] == steps
    assert plan.every % 200 == 0
    if plan.share > 0.05:  # then only the last preview is left
        assert len(due) == 1


def test_cheap_previews_are_not_thinned():
    assert plan_previews(SETTINGS, 0, cost=0.02, asked=False).every == 200


def test_expensive_previews_are_fewer():
    assert [plan_previews(SETTINGS, 0, cost, asked=False).every for cost in (5, 8, 12, 60)] == [200, 400, 800, 800]


def test_an_interval_that_the_user_chose_stays():
    assert plan_previews(SETTINGS, 0, cost=20.0, asked=True).every == 200


def test_a_stop_ends_a_preview_between_two_layers():
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) > 10

    unet = UNet(SMALL).eval()
    schedule = ScheduleConfig(20)
    assert draw(unet, schedule, 0, should_stop) is None
    assert len(asked) == 11  # fewer than the layers of a U-Net, so the first step was not finished
    samples = draw(unet, schedule, 0, lambda: False)
    assert samples is not None
    assert samples.shape == (IMAGES, 1, 8, 8)
    assert torch.equal(samples, draw(unet, schedule, 0, lambda: False))


def test_a_finished_run_can_be_planned():
    assert plan_previews(SETTINGS, 800, cost=2.0, asked=False).share == pytest.approx(4 / 5)
