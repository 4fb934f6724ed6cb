"""`ddpm noise`: the forward process."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load

from conftest import picture
from ddpm_cli.data.images import from_pil, to_float
from ddpm_cli.diffusion.schedule import NoiseSchedule, ScheduleConfig


def test_noise_is_equation_4(cli, emoji):
    def noised(seed: int) -> bytes:
        options = ("--t", 300, "--seed", seed, "--format", "safetensors", "-o", "x_t.safetensors", "--force")
        assert cli("noise", emoji, *options)[0] == 0
        return Path("x_t.safetensors").read_bytes()

    data = noised(4)
    x_t = load(data)["x_t"].double()
    image = picture(emoji)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    x_0 = to_float(from_pil(image))[None].double()
    abar = NoiseSchedule.from_config(ScheduleConfig()).alphas_cumprod[299]  # the paper's t=300
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    assert abs(eps.mean()) < 0.05
    assert eps.std().item() == pytest.approx(1, abs=0.05)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["ddpm"])
    assert (about["t"], about["seed"], about["schedule"]["beta_end"]) == (300, 4, 0.02)
    assert noised(4) == data
    assert noised(5) != data


def test_noise_keeps_the_size_and_t_0_is_the_image(cli, photo, digits):
    assert cli("noise", photo, "--t", 0, "-o", "same.png")[0] == 0
    assert picture("same.png").tobytes() == picture(photo).tobytes()
    digit = next(digits.rglob("*.png"))
    code, out, _ = cli("noise", digit, "-o", "gray.png")
    assert (code, out) == (0, "gray.png\n")
    assert (picture("gray.png").mode, picture("gray.png").size) == ("L", (28, 28))


def test_several_t_make_a_strip(cli, emoji):
    code, out, err = cli("noise", emoji, "--t", "0,250,1000", "-o", "strip.png", "--json")
    assert json.loads(out) == {
        "schema": 1,
        "command": "noise",
        "output": "strip.png",
        "t": [0, 250, 1000],
        "seed": 0,
        "size": [32, 32],
        "format": "png",
    }
    assert (code, err) == (0, "")
    assert picture("strip.png").size == (3 * 102 + 6, 16 + 102 + 6)


@pytest.mark.parametrize("output", ["/proc/x.png", "file/x.png"])
def test_an_impossible_output_is_named(cli, emoji, output):
    Path("file").touch()
    code, _, err = cli("noise", emoji, "-o", output)
    assert code == 1
    assert err.startswith((f"Error: {output}: ", f"Error: -o {output}: "))


def test_the_target_of_a_link_is_written(cli, emoji):
    Path("link.png").symlink_to("target.png")
    assert cli("noise", emoji, "-o", "link.png")[0] == 0
    assert Path("link.png").is_symlink()
    assert Path("target.png").read_bytes().startswith(b"\x89PNG")
