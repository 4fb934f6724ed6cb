"""`ddpm convert`: the converted network computes the same as the networks of the other programs."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline

from ddpm_cli import DDPM
from ddpm_cli.diffusion.schedule import NoiseSchedule
from foreign import Weights, openai, pesser

# The flags of a small model of improved-diffusion, as its README would list them.
COSINE = "--image_size 32 --num_channels 32 --num_res_blocks 1 --learn_sigma True --diffusion_steps 4000"
COSINE = [*COSINE.split(), "--noise_schedule", "cosine", "--dropout", "0.3"]
LINEAR = "--diffusion_steps 500 --noise_schedule linear --rescale_timesteps False --num_heads 1 --sigma_small True"
LINEAR = LINEAR.split()
MULTS = (1, 2, 2, 2)


def noise(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def saved(weights: Weights, name: str) -> str:
    torch.save(dict(weights), name)
    return name


@pytest.fixture
def cosine():
    """An improved-diffusion model that learned its variance, in 4000 rescaled steps."""
    weights = Weights()
    openai(weights, noise(32), torch.tensor([0, 0]), 32, MULTS, 1, {16, 8}, c_last=6)
    return weights


@pytest.mark.parametrize(("mults", "size", "variance"), [(MULTS, 32, "fixed_large"), ((1, 1, 2), 64, "fixed_small")])
def test_the_authors_weights(cli, mults, size, variance):
    weights, x, t = Weights(), noise(size), torch.tensor([987, 3])
    expected = pesser(weights, x, t, 32, mults, 2, {16})
    code, out, err = cli("convert", saved(weights, "model.ckpt"), "-o", "model")
    assert (code, out) == (0, "model\n"), err
    model = DDPM.from_pretrained("model", precision="fp32")
    assert model.shape == (3, size, size)
    assert model.schedule_config.variance_type == variance
    close(model.unet(x, t), expected)
    with torch.no_grad():
        close(DDPMPipeline.from_pretrained("model").unet(x, t).sample, expected)


def test_improved_diffusion(cli, cosine):
    """Flags as their README lists them. The network gets t * 1000 / T, in ddpm and in diffusers."""
    x, t = noise(32), torch.tensor([3999, 5])
    expected = openai(cosine, x, t * 1000 / 4000, 32, MULTS, 1, {16, 8}, c_last=6)
    code, out, err = cli("convert", saved(cosine, "ema.pt"), "-o", "model", *COSINE, "--json")
    assert code == 0, err
    assert json.loads(out)["origin"] == "improved-diffusion"
    model = DDPM.from_pretrained("model", precision="fp32")
    assert model.schedule_config.variance_type == "learned_range"
    assert model.schedule_config.beta_schedule == "squaredcos_cap_v2"
    assert model.schedule.T == 4000
    assert model.unet.config.dropout == 0.3
    close(model.unet(x, t), expected)
    with torch.no_grad():
        close(DDPMPipeline.from_pretrained("model").unet(x, t).sample, expected)


def test_improved_diffusion_with_plain_settings(cli):
    """No scale_shift, one head, a fixed variance, a linear schedule of 500 steps that are not rescaled."""
    weights, x, t = Weights(), noise(32), torch.tensor([499, 5])
    expected = openai(weights, x, t, 32, MULTS, 2, {16}, heads=1, scale_shift=False)
    assert cli("convert", saved(weights, "a.pt"), "-o", "model", *LINEAR)[0] == 0
    model = DDPM.from_pretrained("model", precision="fp32")
    close(model.unet(x, t), expected)
    assert model.schedule_config.variance_type == "fixed_small"
    full = NoiseSchedule.from_config(model.schedule_config)
    assert full.betas[[0, -1]].tolist() == pytest.approx(
        [0.0002, 0.04]
    )  # the paper's, twice as large in half the steps


def test_as_many_heads_at_every_width(cli):
    """UNet2DModel of diffusers does not support this: a note names it, and diffusers refuses the model."""
    weights, x, t = Weights(), noise(64), torch.tensor([999, 5])
    expected = openai(weights, x, t, 32, (1, 2, 3, 4), 1, {16, 8})
    code, _, err = cli("convert", saved(weights, "a.pt"), "-o", "m", *LINEAR[2:4], "--diffusion-steps", "1000")
    assert code == 0
    assert "runs only in ddpm" in err
    model = DDPM.from_pretrained("m", precision="fp32")
    assert model.unet.config.attention_head_dim == (8, 16, 24, 32)
    close(model.unet(x, t), expected)
    with pytest.raises(TypeError):
        DDPMPipeline.from_pretrained("m")


def test_missing_and_wrong_flags_are_named(cli, cosine):
    path = saved(cosine, "ema.pt")

    def refusal(*flags: str) -> str:
        code, out, err = cli("convert", path, "-o", "model", *flags)
        assert (code, out) == (2, "")
        return err

    assert "--diffusion-steps is needed" in refusal("--noise-schedule", "cosine")
    assert "--noise-schedule is needed" in refusal("--diffusion-steps", "4000")
    for flag, value, shown in [
        ("--num-channels", "64", "32"),
        ("--num-res-blocks", "3", "1"),
        ("--learn-sigma", "False", "True"),
        ("--use-scale-shift-norm", "False", "True"),
        ("--attention-resolutions", "8", r"(16, 8)"),
    ]:
        assert f"{flag} " in refusal(*COSINE, flag, value)
        assert f"the weights show {shown}" in refusal(*COSINE, flag, value)
    assert "does not divide" in refusal(*COSINE, "--num-heads", "3")
    assert "is not one of linear, cosine" in refusal(*COSINE, "--noise-schedule", "quadratic")
    assert "neither True nor False" in refusal("--learn-sigma", "perhaps")


def test_what_cannot_be_converted_is_named(cli, cosine, small_model, photo):
    def refusal(path: object) -> str:
        code, out, err = cli("convert", path, "-o", "model", *COSINE)
        assert (code, out) == (1, "")
        assert err.startswith(f"Error: {path}: ")
        return err

    assert "missing" in refusal("nothing.pt")
    assert "cannot be read (it is no file of PyTorch)\nHint: Give the .safetensors, .bin, .pt or" in refusal(photo)
    whole = Path(saved(cosine, "cut.pt"))
    whole.write_bytes(whole.read_bytes()[:-100])
    assert "cannot be read (it is damaged or incomplete)\nHint: Copy or download it again.\n" in refusal(whole)
    assert "class-conditional" in refusal(saved(cosine | {"label_emb.weight": torch.zeros(2, 2)}, "class.pt"))
    assert "has 1 tensors that no improved-diffusion model has, such as extra" in refusal(
        saved(cosine | {"extra": torch.zeros(1)}, "more.pt")
    )
    without = {name: value for name, value in cosine.items() if name != "out.0.bias"}
    assert "lacks 1 of the U-Net's" in refusal(saved(without, "less.pt"))
    assert "conv_norm_out.bias" in refusal("less.pt")
    torch.save({"step": 1, "model": dict(cosine)}, "model-1.pt")
    assert "lucidrains" in refusal("model-1.pt")
    assert "neither of pytorch_diffusion nor" in refusal(saved({"a.weight": torch.zeros(1)}, "other.pt"))
    weights = small_model / "unet" / "diffusion_pytorch_model.safetensors"
    assert "is a file of diffusers already" in refusal(weights)


def test_nothing_is_overwritten(cli, cosine, tmp_path):
    path = saved(cosine, "ema.pt")
    (tmp_path / "empty").mkdir()
    assert cli("convert", path, "-o", "empty", *COSINE)[0] == 0
    assert "exists" in cli("convert", path, "-o", "empty", *COSINE)[2]
    assert cli("convert", path, "-o", "empty", *COSINE, "--force")[0] == 0
    (tmp_path / "empty" / "thesis.txt").touch()
    assert "exists" in cli("convert", path, "-o", "empty", *COSINE, "--force")[2]
