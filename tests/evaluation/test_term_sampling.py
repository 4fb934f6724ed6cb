"""Samples of the terms: every step with exactly its chance, whatever the sizes of the terms are."""

import pytest
import torch

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.evaluation.bound import measure, merge
from ddpm_cli.evaluation.term_sampling import chances, draw, term_sizes

SIZES = 1 / torch.arange(1, 201).double() ** 2


@pytest.mark.parametrize("k", [2, 3, 20, 150, 199])
@pytest.mark.parametrize("sizes", [SIZES, SIZES.flip(0), torch.zeros(200).double(), (torch.arange(200) == 7).double()])
def test_chances_are_probabilities_that_sum_to_k(sizes, k):
    found = chances(sizes, k)
    assert float(found.sum()) == pytest.approx(k, rel=1e-12)
    assert ((found > 0) & (found <= 1)).all()
    assert found[0] == 1
    order = sizes[1:].argsort()
    assert (found[1:][order].diff() >= -1e-12).all()  # a larger term has no smaller chance


def test_with_all_terms_every_chance_is_one():
    assert (chances(SIZES, 200) == 1).all()
    assert (chances(SIZES, 999) == 1).all()
    assert (chances(torch.ones(1).double(), 1) == 1).all()
    with pytest.raises(ValueError, match="two terms"):
        chances(SIZES, 1)


@pytest.mark.parametrize("sizes", [SIZES, SIZES.flip(0)])
@pytest.mark.parametrize("k", [2, 20, 199])
def test_a_step_is_drawn_with_its_chance(sizes, k):
    chance, n = chances(sizes, k), 4000
    drawn = draw(chance, torch.arange(n))
    assert drawn.shape == (n, k)
    assert (drawn.diff(dim=1) < 0).all()  # descending, none twice
    frequency = torch.bincount(drawn.flatten(), minlength=200) / n
    deviation = (chance * (1 - chance) / n).sqrt()
    assert ((frequency - chance).abs() <= 4.5 * deviation + 1e-12).all()
    assert (frequency[chance == 1] == 1).all()


def test_a_sample_is_spread_over_the_steps():
    """Of the steps that are not always drawn, the first n have as many draws as their chances sum to, within one."""
    chance = chances(SIZES, 30)
    maybe = chance < 1
    for sample in draw(chance, torch.arange(50)):
        taken = torch.zeros(200).index_fill(0, sample, 1)
        expected, found = ((values * maybe).cumsum(0) for values in (chance, taken))
        assert ((found - expected).abs() <= 1 + 1e-9).all()


def test_a_sample_belongs_to_its_image_and_seed():
    chance = chances(SIZES, 20)
    together = draw(chance, torch.arange(10))
    assert torch.equal(draw(chance, torch.tensor([7, 2])), together[[7, 2]])
    assert not torch.equal(draw(chance, torch.arange(10), seed=1), together)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("T", [1, 2, 3, 50, 400])
def test_the_pilot_finds_the_sizes_of_the_terms(T):
    def network(x_t, t):
        abar = denoiser.schedule.alphas_cumprod[t].to(x_t).view(-1, 1, 1, 1)
        return x_t * abar.sqrt() / (abar + 4 * (1 - abar))  # the best for N(0, 1/4)

    config = ScheduleConfig(num_train_timesteps=T, prediction_type="sample", clip_sample=False)
    denoiser = Denoiser.from_config(network, config)
    images = 0.5 * torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = term_sizes(denoiser, images)
    assert found.shape == (T,)
    assert (found > 0).all()
    bound = merge(measure(denoiser, images, range(8)))
    ratio = (found / found.sum())[1:] * bound.terms.sum() / bound.terms[1:]
    if T > 2:
        assert ratio.max() / ratio.min() < 2
