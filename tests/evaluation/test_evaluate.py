"""What is measured in parts: parts of other settings are never used, and those of the same ones always."""

import itertools

import pytest
import torch

from ddpm_cli import DDPM
from ddpm_cli.evaluation import evaluate
from ddpm_cli.evaluation.evaluate import Images, bound_of, bound_result, spread


class InMemory:
    """Images in memory: (N, C, H, W) uint8."""

    fingerprint = "f"

    def __init__(self, images):
        self.images, self.shape = images, tuple(images.shape[1:])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        return self.images[indices]


@pytest.fixture
def measured(small_model, tmp_path):
    """Measure the bound of a small model; returns it and how many terms were computed."""
    model = DDPM.from_pretrained(small_model, precision="fp32")
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def call(n=4, pixels=None, **settings):
        done = [(0, 0)]
        chosen = Images("images", pixels or InMemory(images))
        bound = bound_of(model, chosen, tmp_path, n, progress=lambda *now: done.append(now), **settings)
        computed, total = done[-1]
        assert computed == total
        return bound, computed

    return call


def test_a_sample_of_terms_continues_after_a_pilot_that_rounds_otherwise(measured, monkeypatch):
    first, done = measured(terms=3)
    assert done == 4 * 3
    sizes = evaluate.term_sizes
    monkeypatch.setattr(evaluate, "term_sizes", lambda *args: sizes(*args) * torch.linspace(1, 1 + 1e-6, 20))
    again, done = measured(terms=3)
    assert done == 0
    assert again.each.equal(first.each)
    more, done = measured(n=9, terms=3)
    assert done == 5 * 3
    both = torch.isin(more.numbers, first.numbers)
    assert more.each[both].equal(first.each)


def test_one_image_has_no_interval_in_words(measured):
    (one, _), (two, _) = measured(n=1), measured(n=2)
    assert "all 20 terms of 1 image: L_T" in bound_result(one, "images", 20)["how"]
    assert "all 20 terms of 2 images, 95 % interval " in bound_result(two, "images", 20)["how"]


@pytest.mark.parametrize("total", [1, 2, 7, 64, 1000])
def test_images_are_spread_and_those_of_fewer_are_among_them(total):
    before: set[int] = set()
    for n in range(1, total + 2):
        now = spread(n, total)
        assert list(now) == sorted(now)
        assert before <= set(now) <= set(range(total))
        assert len(set(now)) == min(n, total)
        before = set(now)
        places = [0, *now, total]
        assert max(b - a for a, b in itertools.pairwise(places)) <= 4 * total / n + 1


def test_parts_of_other_settings_are_not_used(measured):
    """Other images, another seed, another number of terms."""
    measured(terms=3)
    other = InMemory(torch.zeros(40, 1, 8, 8, dtype=torch.uint8))
    other.fingerprint = "g"
    for settings in ({"terms": 4}, {}, {"terms": 3, "seed": 1}, {"terms": 3, "pixels": other}):
        bound, done = measured(**settings)
        assert done == 4 * settings.get("terms", 20), settings
        assert len(bound) == 4
        assert measured(**settings)[1] == 0, settings
