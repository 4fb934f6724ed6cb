"""Sheets of images: where the tiles are, and how large."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_cli.data import images, pictures
from ddpm_cli.errors import UsageError

TILES = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 4) * 40


def test_grid_and_strip_put_tiles_where_they_belong():
    picture = images.from_pil(pictures.grid(TILES, scale=1))[0]
    assert picture.shape == (14, 20)  # 2 rows and 3 columns of 4 pixels with 2 between
    assert [picture[3, 3], picture[3, 9], picture[3, 15], picture[9, 3], picture[9, 9]] == [40, 80, 120, 160, 200]
    assert picture[9, 15] == 255  # white instead of a sixth tile
    # Four pixels become 96, and the two between them 48.
    labelled = pictures.strip([TILES, TILES], [f"t={i}" for i in range(5)], ["x_t", "x_0"])
    assert labelled.size == (24 + 5 * 144 + 48, 16 + 2 * 144 + 48)
    assert pictures.strip([TILES], ["t=1000"] * 5).size == (5 * 144 + 48, 16 + 144 + 48)


@pytest.mark.parametrize("scale", [2, 3, 7])
def test_a_grid_is_the_exact_one_with_larger_pixels(scale):
    exact = np.asarray(pictures.grid(TILES, scale=1))
    large = np.asarray(pictures.grid(TILES, scale=scale))
    assert np.array_equal(large, exact.repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize(("size", "scale"), [(8, 12), (16, 6), (28, 4), (32, 3), (64, 2), (95, 2), (96, 1), (512, 1)])
def test_small_images_are_enlarged(size, scale):
    assert pictures.scale_for(size, size, 64) == scale
    assert pictures.scale_for(size, size // 2, 64) == scale  # the longer side counts
    assert pictures.grid(torch.zeros(4, 3, size, size, dtype=torch.uint8)).size == ((2 * (size + 2) + 2) * scale,) * 2


@pytest.mark.parametrize("size", [8, 28, 64, 256])
@pytest.mark.parametrize("count", [100, 1000, 50_000])
def test_many_images_are_enlarged_less(size, count):
    scale = pictures.scale_for(size, size, count)
    assert scale == 1 or count * (size * scale) ** 2 <= 2048**2
    assert scale == pictures.scale_for(size, size, 1) or count * (size * (scale + 1)) ** 2 > 2048**2


def test_labels_have_room_beside_exact_pixels():
    """A column is as wide as its label, and an image is in its middle."""
    sheet = np.asarray(pictures.strip([TILES[:2] * 0], ["t=1000", "t=1000"], scale=1))
    columns = np.flatnonzero((sheet[-6:-2] == 0).all(0))  # those of the tiles
    assert columns.tolist() == [*range(columns[0], columns[0] + 4), *range(columns[4], columns[4] + 4)]
    text = np.flatnonzero((sheet[:16] < 128).any(0))
    middle = (columns[0] + columns[7] + 1) / 2
    left, right = text[text < middle], text[text > middle]
    assert right[0] - left[-1] >= 2
    assert abs((left[0] + left[-1]) / 2 - columns[:4].mean()) <= 2
    assert left[0] >= 0
    assert right[-1] < sheet.shape[1]


def test_a_single_image_is_itself():
    assert np.array_equal(np.asarray(pictures.grid(TILES[:1])), TILES[0, 0].numpy())
    assert pictures.grid(TILES[:1], scale=5).size == (20, 20)


def test_things_are_picked_evenly():
    assert pictures.evenly(51, 6) == [0, 10, 20, 30, 40, 50]
    assert pictures.evenly(3, 10) == [0, 1, 2]
    assert pictures.evenly(1, 10) == [0]


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_a_picture_that_is_too_large_for_its_format_is_named(suffix):
    with pytest.raises(UsageError, match=f"^1x70000 pixels cannot be written as {suffix}"):
        pictures.picture_bytes(Image.new("L", (1, 70_000)), suffix)
