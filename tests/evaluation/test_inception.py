"""The Inception network of FID, against values of torch-fidelity's and a resize that is derived otherwise."""

import pytest
import torch

from ddpm_cli.evaluation.inception import Inception, resize


def random_weights():
    """Weights that keep features of a size near 1, drawn in the order of the names."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in sorted(Inception().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith(("running_var", "bn.weight")):
            drawn = 1 + 0.1 * drawn.clamp(-3, 3)
        elif value.ndim == 4:
            drawn *= (2 / value[0].numel()) ** 0.5
        else:
            drawn *= 0.1
        weights[name] = drawn
    return weights


def image():
    return (torch.arange(3 * 40 * 50) * 7919 % 251).to(torch.uint8).view(1, 3, 40, 50)


@pytest.fixture(scope="module")
def network():
    network = Inception().eval()
    missing, unexpected = network.load_state_dict(random_weights(), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert not unexpected
    return network


def test_values_of_torch_fidelity(network):
    """From FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with these weights and this image."""
    with torch.no_grad():
        features, logits = network(image())
    assert (features.shape, logits.shape) == ((1, 2048), (1, 1008))
    close = {"rel": 1e-4}
    assert features[0, [0, 511, 1024, 2047]].tolist() == pytest.approx(
        [1.7233213, 0.8731755, 0.3196907, 0.3150865], **close
    )
    assert float(features.square().mean()) == pytest.approx(0.3833140, **close)
    assert logits[0, [0, 500, 1007]].tolist() == pytest.approx([-3.7759838, 1.8014090, 6.6953721], **close)
    assert float(logits.square().mean()) == pytest.approx(8.0020102, **close)


def one_way(size, side):
    """The matrix of a resize of one axis, (side, size) float64: a hat of width 1 around i * size / side."""
    places = torch.arange(side, dtype=torch.float64)[:, None] * size / side
    hats = (1 - (places - torch.arange(size + 1)).abs()).clamp(min=0)
    hats[:, size - 1] += hats[:, size]  # beyond the last pixel is the last pixel
    return hats[:, :size]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (299, 299), (28, 47), (512, 640), (1, 2)])
def test_images_are_resized_without_half_pixel_centres(height, width):
    images = torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = one_way(height, 299) @ images @ one_way(width, 299).T
    torch.testing.assert_close(resize(images, 299), expected, rtol=0, atol=2e-4)  # places are rounded to float32
    if height == width == 299:
        assert resize(images, 299).equal(images)
