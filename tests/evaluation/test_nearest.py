"""The nearest images of samples, against brute force in float64."""

import math

import pytest
import torch

from ddpm_cli.evaluation import neighbors
from ddpm_cli.evaluation.neighbors import nearest, squared_distances


class InMemory:
    """Images in memory: (N, C, H, W) uint8."""

    def __init__(self, images):
        self.images, self.shape = images, tuple(images.shape[1:])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        return self.images[indices]


def random(count, shape=(1, 6, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return InMemory(torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8))


def brute_force(samples, images, mirror):
    """Distances in float64, and whether the mirrored image is the nearer one: (N, M) each."""
    a, b = samples.images.double(), images.images.double()
    plain, mirrored = ((a[:, None] - other[None]).square().mean((2, 3, 4)).sqrt() for other in (b, b.flip(3)))
    return (torch.minimum(plain, mirrored), mirrored < plain) if mirror else (plain, torch.zeros_like(plain).bool())


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 20, 20)])
def test_brute_force_finds_the_same(shape, mirror):
    samples, images = random(7, shape), random(40, shape, seed=1)
    distances, mirrored = brute_force(samples, images, mirror)
    expected, order = distances.sort(1)
    found = nearest(samples, images, 4, mirror)
    assert found.indices.equal(order[:, :4])
    torch.testing.assert_close(found.distances, expected[:, :4], rtol=1e-14, atol=0)
    assert found.mirrored.equal(mirrored.gather(1, order[:, :4]))
    torch.testing.assert_close(found.ratio, expected[:, 0] / expected[:, 1], rtol=1e-14, atol=0)
    assert found.memorised.equal(expected[:, 0] < expected[:, 1] / 3)


def test_the_largest_distances_are_exact():
    """Black, white and gray images of more values than float32 can add."""
    a = torch.tensor([0, 255, 127], dtype=torch.uint8)[:, None].expand(3, 5000)
    b = torch.cat([a, a.roll(1, 0)])
    expected = (a[:, None].long() - b[None].long()).square().sum(2)
    assert squared_distances(a, b).equal(expected)
    assert expected.max() == 5000 * 255**2


@pytest.mark.parametrize(
    ("rows", "columns", "block_bytes"), [(1, 1, 2**25), (3, 7, 2**25), (512, 5, 2**25), (64, 64, 100)]
)
def test_blocks_change_nothing(monkeypatch, rows, columns, block_bytes):
    """Values of 0 and 1 give many equal distances."""
    samples, images = InMemory(random(10).images % 2), InMemory(random(50, seed=1).images % 2)
    whole = nearest(samples, images, 6)
    monkeypatch.setattr(neighbors, "_ROWS", rows)
    monkeypatch.setattr(neighbors, "_COLUMNS", columns)
    monkeypatch.setattr(neighbors, "_BLOCK_BYTES", block_bytes)
    for part, expected in zip(nearest(samples, images, 6), whole, strict=True):
        assert part.equal(expected)


def test_of_equally_near_images_the_first_is_named():
    same = torch.full((5, 1, 4, 4), 9, dtype=torch.uint8)
    found = nearest(InMemory(same[:1]), InMemory(same), 3)
    assert found.indices.tolist() == [[0, 1, 2]]
    assert not found.mirrored.any()


def test_a_copy_is_memorised_mirrored_or_with_little_noise():
    images = random(30)
    copies = images.images[[4, 5]]
    copies[1] = copies[1].flip(2)
    near = images.images[[6]] // 2 + 60
    found = nearest(InMemory(torch.cat([copies, near, random(1, seed=3).images])), images, 2)
    assert found.indices[:3, 0].tolist() == [4, 5, 6]
    assert found.mirrored[:3, 0].tolist() == [False, True, False]
    assert found.ratio[:2].tolist() == [0, 0]
    assert found.memorised.tolist() == [True, True, found.ratio[2].item() < 1 / 3, False]
    without = nearest(InMemory(copies), images, 2, mirror=False)
    assert without.memorised.tolist() == [True, False]


def test_the_mirror_of_an_image_is_not_its_second_nearest():
    """A symmetric image is as near mirrored. Only another image counts as the second."""
    symmetric = random(1).images
    symmetric = torch.maximum(symmetric, symmetric.flip(3))
    images = InMemory(torch.cat([symmetric, 255 - symmetric]))
    sample = InMemory((symmetric.int() + 1).clamp(max=255).to(torch.uint8))
    found = nearest(sample, images, 2)
    assert found.indices.tolist() == [[0, 1]]
    assert found.memorised.item()


def test_duplicates_hide_what_is_memorised_unless_it_is_exact():
    images = InMemory(torch.cat([random(5).images, random(5).images]))
    near = (random(1).images.int() + 1).clamp(max=255).to(torch.uint8)
    found = nearest(InMemory(torch.cat([near, random(1).images])), images, 2)
    assert found.indices.tolist() == [[0, 5], [0, 5]]
    assert found.ratio.tolist() == [1, 0]
    assert found.memorised.tolist() == [False, True]


def test_a_third_is_not_less_than_a_third():
    images = InMemory(torch.tensor([0, 40], dtype=torch.uint8).view(2, 1, 1, 1))
    samples = InMemory(torch.tensor([10, 9], dtype=torch.uint8).view(2, 1, 1, 1))
    assert nearest(samples, images, 1).memorised.tolist() == [False, True]


def test_one_image_has_no_second_nearest():
    found = nearest(random(2), random(1), 5)
    assert found.indices.tolist() == [[0], [0]]
    assert [math.isnan(ratio) for ratio in found.ratio.tolist()] == [False, True]  # the first is a copy
    assert found.memorised.tolist() == [True, False]


def test_the_second_nearest_counts_with_k_1():
    found, more = (nearest(random(3), random(9, seed=1), k) for k in (1, 2))
    assert found.indices.shape == (3, 1)
    assert found.ratio.equal(more.ratio)


def test_progress_counts_all_pairs():
    seen = []
    nearest(random(3), random(5000, seed=1), progress=lambda what, done, total: seen.append((done, total)))
    assert seen == [(6144, 15000), (12288, 15000), (15000, 15000)]


def test_misuse_is_refused():
    for samples, images, k in [
        (random(1), random(1, (3, 6, 6)), 1),
        (random(0), random(1), 1),
        (random(1), random(1), 0),
    ]:
        with pytest.raises(ValueError, match=r"samples|k >= 1"):
            nearest(samples, images, k)
