"""`ddpm denoise-trace`: the reverse process, from an image or from noise."""

import json
from pathlib import Path

import pytest
from PIL import Image

from conftest import picture


def test_trace_from_noise_ends_in_the_sample(cli, color_model):
    options = ("-m", color_model, "--sampler", "ddpm", "--steps", 20)
    assert cli("denoise-trace", *options, "-o", "frames/", "--frames", 4)[0] == 0
    names = sorted(path.name for path in Path("frames").iterdir())
    assert names == [f"{i:03d}-t{t:04d}-{row}.png" for i, t in enumerate((1000, 632, 316, 0)) for row in ("x0", "xt")]
    assert cli("sample", *options, "--n", 1, "-o", "one/")[0] == 0
    assert picture("frames/003-t0000-xt.png").tobytes() == picture("one/000000.png").tobytes()


@pytest.mark.parametrize(
    "options", [(), ("--sampler", "ddim", "--eta", 0.5), ("--sampler", "langevin", "--updates", 2)]
)
def test_a_trace_with_any_sampler_ends_in_its_sample(cli, color_model, options):
    assert cli("denoise-trace", "-m", color_model, *options, "-o", "frames/", "--frames", 3)[0] == 0
    assert cli("sample", "-m", color_model, *options, "--n", 1, "-o", "one/")[0] == 0
    assert picture("frames/002-t0000-xt.png").tobytes() == picture("one/000000.png").tobytes()


@pytest.mark.parametrize(("show", "rows"), [("both", 2), ("xt", 1), ("x0", 1)])
def test_trace_strips(cli, color_model, emoji, show, rows):
    code, out, _ = cli(
        "denoise-trace", emoji, "-m", color_model, "--t", 12, "--frames", 5, "--show", show, "-o", "t.png", "--json"
    )
    assert code == 0
    assert json.loads(out)["t"] == [12, 9, 6, 3, 0]
    assert picture("t.png").size == (24 + 5 * 66 + 2, 16 + rows * 66 + 2)


@pytest.mark.parametrize("name", ["t.gif", "t.webp"])
def test_trace_animations(cli, color_model, emoji, name):
    assert cli("denoise-trace", emoji, "-m", color_model, "--t", 30, "-o", name, "--frames", 7)[0] == 0
    with Image.open(name) as animation:
        assert (animation.n_frames, animation.size) == (7, (2 * 66 + 2, 16 + 66 + 2))


def test_a_gif_of_height_123_is_an_image(cli, color_model):
    """Byte 8 of a GIF is the low byte of its height. 123 is `{`, which a safetensors file has there."""
    Image.new("L", (50, 123), 90).save("tall.gif")
    assert cli("denoise-trace", "tall.gif", "-m", color_model, "--t", 5, "-o", "trace.png")[0] == 0


def test_an_image_needs_no_file_in_between(cli, color_model, emoji):
    """denoise-trace IMG --t N equals noise IMG --t N followed by denoise-trace."""
    picture(emoji).resize((8, 8)).save("small.png")
    assert cli("denoise-trace", "small.png", "-m", color_model, "--t", 30, "-o", "one.png")[0] == 0
    assert cli("noise", "small.png", "--t", 30, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    assert cli("denoise-trace", "n.safetensors", "-m", color_model, "-o", "two.png")[0] == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_invalid_input_is_refused(cli, small_model, color_model, digits, emoji):
    digit = next(digits.rglob("*.png"))
    assert cli("noise", digit, "--t", 30, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    Path("cut.safetensors").write_bytes(Path("n.safetensors").read_bytes()[:-5])
    common = ("-o", "t.png", "-m", color_model)
    for args, expected, names in [
        (("n.safetensors", *common), 1, "gray"),
        (("cut.safetensors", *common), 1, "cut.safetensors"),
        (("n.safetensors", *common, "--t", 40), 2, "t=30"),
        (("n.safetensors", "-o", "t.png", "-m", small_model), 2, "another schedule"),
        ((emoji, *common, "--t", 1001), 2, "--t 1001"),
        (("--t", 10, *common), 2, "pure noise"),
        ((emoji, *common, "--t", 10, "--steps", 11), 2, "--steps 11"),
    ]:
        code, _, err = cli("denoise-trace", *args)
        assert (code, "Error: " in err) == (expected, True), err
        assert names in err
    assert not Path("t.png").exists()
