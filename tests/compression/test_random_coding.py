"""Minimal random coding of Gaussians, where everything is known in closed form."""

import math

import pytest
import torch

from ddpm_cli.compression.bits import BitReader, BitWriter
from ddpm_cli.compression.random_coding import CandidateBook, block_rate


def direction(size, length, seed=0):
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return v * (length / v.norm())


def coded(book, v, blocks, step):
    stream = BitWriter()
    z = book.encode(v, blocks, step, stream)
    assert stream.count == blocks * book.bits
    assert book.decode(blocks, step, BitReader(stream.to_bytes())).equal(z)
    return z


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_the_rate_of_a_block_is_the_mean_of_the_largest_normal(bits):
    largest = torch.randn(4000, 2**bits, generator=torch.Generator().manual_seed(1)).amax(1).mean().item()
    assert block_rate(bits) == pytest.approx(largest**2 / 2 / math.log(2), rel=0.04)
    assert block_rate(bits) < bits


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_the_mean_is_that_of_q_and_the_rest_is_normal(blocks):
    """N(v, I), with the KL that the blocks can carry: the projection on v is |v|, all other directions are N(0, 1)."""
    book = CandidateBook(8, 60)
    length = math.sqrt(2 * math.log(2) * blocks * book.rate)
    along, rest = [], []
    for step in range(300):
        v = direction(60, length, seed=step)
        assert book.blocks_for(length**2 / 2 / math.log(2)) == blocks
        z = coded(book, v, blocks, step)
        unit = v / v.norm()
        along.append(float(z @ unit))
        rest.append(z - (z @ unit) * unit)
    assert sum(along) / len(along) == pytest.approx(length, rel=0.05)
    orthogonal = torch.cat(rest)
    assert orthogonal.mean().item() == pytest.approx(0, abs=0.03)
    # 59 of 60 directions are normal, and the choice narrows some more, one for each other block.
    assert orthogonal.square().mean().item() == pytest.approx(1, abs=0.02 + blocks / 60)


def test_nothing_is_sent_for_almost_nothing():
    book = CandidateBook(8, 60)
    assert book.blocks_for(book.rate / 2 - 0.01) == 0
    z = torch.stack([coded(book, torch.zeros(60), 0, step) for step in range(200)])
    assert z.mean().item() == pytest.approx(0, abs=0.03)
    assert z.std().item() == pytest.approx(1, abs=0.03)


def test_a_vector_that_is_wider_than_the_book():
    book = CandidateBook(6, 2500)
    v = direction(2500, 30.0)
    blocks = book.blocks_for(float(v @ v) / 2 / math.log(2))
    assert blocks >= 3
    assert book.blocks_for(1.4 * book.rate) == 0  # three blocks are the fewest
    z = coded(book, v, blocks, 0)
    assert float(z @ v / v.norm()) == pytest.approx(30, rel=0.1)


def test_blocks_get_equal_shares():
    """Also of a vector with all its length in one value."""
    book = CandidateBook(4, 784)
    v = torch.zeros(784)
    v[300] = 10.0
    turned = book._rotate(v, 3)
    shares = [turned[place].square().sum().item() for place in book._places(4)]
    assert sum(shares) == pytest.approx(100, rel=1e-4)
    assert shares == pytest.approx([25] * 4, rel=0.05)
    torch.testing.assert_close(book._rotate_back(turned, 3), v, rtol=0, atol=1e-5)
