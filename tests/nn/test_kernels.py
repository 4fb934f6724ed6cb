"""Attention and dropout on CPUs, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from ddpm_cli.nn import kernels
from ddpm_cli.nn.kernels import Dropout, attention, double_and_convolve


@pytest.mark.parametrize("positions", [49, 2048])
def test_attention_in_bf16_is_that_of_pytorch_in_float32(positions):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, positions, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    found = attention(q, k, v)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean().sqrt() < 0.01 * expected.square().mean().sqrt()
    weight = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((found.float() * weight).sum(), (q, k, v))
    for gradient, exact in zip(gradients, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        assert (gradient - exact).float().square().mean().sqrt() < 0.02 * exact.float().square().mean().sqrt()


def test_weights_of_many_positions_are_never_stored(monkeypatch):
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", lambda q, k, v: "fused")
    few, many = (torch.zeros(1, 1, n, 8, dtype=torch.bfloat16) for n in (1024, 1025))
    assert isinstance(attention(few, few, few), torch.Tensor)
    assert attention(many, many, many) == "fused"


def test_a_convolution_after_doubling():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((2, 3, 4, 5), (6, 3, 3, 3), (6,))
    )
    found = double_and_convolve(x, weight, bias)
    expected = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    gradients = (torch.autograd.grad(y, (x, weight, bias), upstream) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean(dtype):
    torch.manual_seed(0)
    x = torch.full((1000, 999), 2.0, dtype=dtype, requires_grad=True)
    y = Dropout(0.1)(x)
    dropped = (y == 0).float().mean().item()
    assert abs(dropped - 0.1) < 4 * (0.1 * 0.9 / x.numel()) ** 0.5
    assert len(y.detach().unique()) == 2
    assert y.max().item() == pytest.approx(2 / 0.9, rel=2**-8 if dtype == torch.bfloat16 else 1e-5)
    y.sum().backward()
    assert torch.equal(x.grad * 2, y)


def test_the_four_elements_of_a_random_number_are_independent():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(400_000)) > 0).double().view(-1, 4)
    assert (kept.mean(0) - 0.5).abs().max() < 0.01
    assert (kept.T.corrcoef() - torch.eye(4)).abs().max() < 0.02


def test_dropout_is_repeatable_and_off_for_samples():
    x = torch.randn(33)
    layer = Dropout(0.3)
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert layer.eval()(x) is x


@pytest.mark.parametrize(("p", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_at_its_limits(p, expected):
    assert torch.equal(Dropout(p)(torch.ones(8)), torch.full((8,), expected))
