"""The U-Net against diffusers.UNet2DModel, with the same random weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel

from conftest import SMALL, randomize
from ddpm_cli.config import UNetConfig
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.presets import PRESETS

CIFAR10 = PRESETS["cifar10"].unet(32, 3)
BIG = PRESETS["256"].unet(256, 3)
# diffusers' own defaults but for their width: head_dim 8, eps 1e-5, padding 1, cosines first, no shift.
DIFFUSERS = UNetConfig.from_dict({"sample_size": 32, "block_out_channels": (32, 64, 96, 128)})
CONFIGS = {
    "cifar10": (replace(CIFAR10, dropout=0.0), 2),
    "256": (replace(BIG, sample_size=64), 1),  # the same network on smaller images
    "diffusers": (DIFFUSERS, 2),
    "scale_shift": (replace(SMALL, resnet_time_scale_shift="scale_shift"), 2),
    "mid_block": (replace(SMALL, mid_block_scale_factor=1.4, add_attention=False), 2),
}


def theirs_of(config: UNetConfig) -> UNet2DModel:
    return UNet2DModel(**{key: value for key, value in config.to_dict().items() if not key.startswith("_")}).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_same_as_diffusers(name):
    config, batch = CONFIGS[name]
    ours = UNet(config).eval()
    randomize(ours)
    theirs = theirs_of(config)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    t = torch.tensor([987, 3][:batch])
    with torch.no_grad():
        expected = theirs(x_t, t).sample
        found = ours(x_t, t)
    assert expected.std() > 0.1  # the weights are large enough to show a difference
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_torch_compile_takes_it_as_one_graph():
    """With dropout, whose bits for CPUs torch.compile cannot read. The backend runs the graph as it is."""
    unet = UNet(replace(SMALL, dropout=0.1)).train()
    randomize(unet)
    x_t, t = torch.ones(2, SMALL.in_channels, SMALL.sample_size, SMALL.sample_size), torch.tensor([987, 3])
    assert torch.compile(unet, backend="eager", fullgraph=True)(x_t, t).std() > 0.1


def test_the_papers_parameter_counts():
    """35.7M for CIFAR-10 and 114M for 256x256 (Appendix B)."""
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(CIFAR10).parameters()) == 35_746_307
        assert sum(p.numel() for p in UNet(BIG).parameters()) == 113_673_219


def test_diffusers_defaults_are_read_as_such():
    assert UNet(DIFFUSERS).state_dict().keys() == theirs_of(DIFFUSERS).state_dict().keys()
    assert (DIFFUSERS.attention_head_dim, DIFFUSERS.flip_sin_to_cos, DIFFUSERS.freq_shift) == (8, True, 0)
    assert (DIFFUSERS.norm_eps, DIFFUSERS.downsample_padding) == (1e-5, 1)


def test_one_t_for_the_batch_is_the_same():
    unet = UNet(SMALL).eval()
    randomize(unet)
    x_t = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(unet(x_t, torch.tensor([7])), unet(x_t, torch.tensor([7, 7, 7])))
    with pytest.raises(ValueError, match="t must have shape"):
        unet(x_t, torch.tensor([1, 2]))


def test_the_first_prediction_is_zero():
    """The last layers of branches start at almost zero, so eps starts at 0 and the loss at 1; the rest is Xavier."""
    unet = UNet(SMALL)
    unet.reset_parameters()
    assert unet(torch.randn(2, 1, 8, 8), torch.tensor([5])).abs().max() < 1e-3
    resnet = unet.down_blocks[1].resnets[0]
    bound = (6 / (9 * (4 + 8))) ** 0.5
    assert 0.8 * bound < resnet.conv1.weight.abs().max() <= bound
    assert resnet.conv2.weight.abs().max() < 1e-4
    assert resnet.conv1.bias.abs().max() == 0


def test_dropout_only_in_training():
    unet = UNet(replace(SMALL, dropout=0.5))
    randomize(unet)
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([5])
    assert not torch.equal(unet.train()(x_t, t), unet(x_t, t))
    assert torch.equal(unet.eval()(x_t, t), unet(x_t, t))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_memory_format(memory_format):
    """PyTorch's channels-last group norm is slow on CPUs, and rounds differently for each batch size."""
    unet = UNet(SMALL).to(memory_format=memory_format)
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    seen = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    size = SMALL.sample_size
    unet(torch.randn(2, SMALL.in_channels, size, size).to(memory_format=memory_format), torch.tensor([5]))
    assert len(seen) == len(norms)
    assert all(x.is_contiguous(memory_format=memory_format) for x in seen)
