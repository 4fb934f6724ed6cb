"""Images that are opened for a comparison, and what is said of them."""

from pathlib import Path

import pytest

from ddpm_cli.evaluation.collection import open_images

CACHE = Path("cache")


def opened(images, *shape):
    found = open_images([str(images)], shape, CACHE)
    assert found.pixels.shape == shape
    return found.changes


def test_images_that_fit_are_not_changed(digits):
    assert opened(digits, 1, 28, 28) == []


def test_changes_of_size_and_channels_are_said(digits, photo):
    assert opened(digits, 3, 16, 16) == [
        "the images are 28x28: resized to 16x16 (bicubic, crop)",
        "60 of 60 images are gray: repeated to three channels",
    ]
    assert opened(photo, 1, 64, 64) == [
        "the images are of several sizes or not square: resized to 64x64 (bicubic, crop)",
        "1 of 1 images have colours: converted to gray",
    ]


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_the_way_to_a_square_is_said(photo, fit):
    (change,) = open_images([str(photo)], (3, 8, 8), CACHE, fit).changes
    assert change.endswith(f"8x8 (bicubic, {fit})")
