"""`ddpm invert`: an image, its latent, and the way back."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from conftest import picture
from ddpm_cli.diffusion.noised_image import Noised


@pytest.fixture
def small(emoji) -> Path:
    """An RGB image of the size of `color_model`, with white, black and everything between."""
    path = Path("small.png")
    image = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), picture(emoji)).convert("RGB").resize((8, 8))
    image.putpixel((0, 0), (0, 0, 0))
    image.save(path)
    return path


def test_the_image_returns_through_a_pipe(ddpm, color_model, small):
    """The pixels are the same, with the options that the command itself names for the way back."""
    done = ddpm("invert", "-", "-m", color_model, "--precision", "fp32", "--format", "safetensors", "--steps", 10,
                stdin=small.read_bytes())  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = done.stderr.decode()
    assert "every pixel is the same" in notes
    advice = notes.partition("to go back: ")[2].splitlines()[0]
    program, *args, option, output = shlex.split(advice)
    assert (program, args[:2], option, output) == ("ddpm", ["denoise-trace", "-"], "-o", "back.png")
    back = ddpm(*args, "-o", "back/", "--frames", 2, stdin=done.stdout)
    assert back.returncode == 0, back.stderr
    assert picture("back/001-t0000-xt.png").tobytes() == picture(small).tobytes()


def test_the_error_of_the_way_back(cli, color_model, small):
    def error(*options: object) -> dict[str, object]:
        code, out, _ = cli("invert", small, "-m", color_model, "--precision", "fp32", "--steps", 20, *options, "--json")
        assert code == 0
        return json.loads(out)

    solved, plain = error(), error("--iterations", 0, "-o", "plain.png")
    assert set(solved) == {
        *("schema", "command", "output", "t", "sampler", "steps", "spacing", "eta", "iterations", "format"),
        *("rmse", "largest", "psnr"),
    }
    assert (solved["output"], solved["t"], solved["steps"]) == ("small-latent.png", 1000, 20)
    assert solved["psnr"] > 75  # the rounding of float32, which these random weights amplify
    assert plain["psnr"] < 60
    assert plain["largest"] > plain["rmse"] > solved["largest"]


@pytest.mark.parametrize(
    ("options", "advice"), [(("--iterations", 0, "--steps", 5), "more --iterations"), (("--steps", 1), "more --steps")]
)
def test_an_image_that_does_not_return_is_said(cli, color_model, small, options, advice):
    code, _, err = cli("invert", small, "-m", color_model, "--precision", "fp32", *options, "-o", "x.png")
    assert (code, "every pixel is the same" in err) == (0, False)
    assert f"to come closer: {advice}\n" in err


def test_a_strip_shows_the_way_up_and_back(cli, color_model, small):
    assert cli("invert", small, "-m", color_model, "--steps", 10, "-o", "strip.png")[0] == 0
    strip = picture("strip.png")
    assert (strip.height, strip.mode) == (16 + 2 * 120 + 24, "RGB")
    assert 0 < strip.width - 24 - 6 * 120 < 50  # six columns, and the labels of the rows
    assert cli("invert", small, "-m", color_model, "--steps", 2, "-o", "short.png")[0] == 0
    assert picture("short.png").width == strip.width - 3 * 120


def test_up_to_a_timestep(cli, color_model, small):
    options = ("-m", color_model, "--t", 300, "--steps", 5, "--format", "safetensors")
    assert cli("invert", small, *options, "-o", "a.safetensors")[0] == 0
    noised = Noised.from_bytes(Path("a.safetensors").read_bytes(), "a")
    assert (noised.t, tuple(noised.x_t.shape)) == (300, (1, 3, 8, 8))
    assert cli("invert", small, *options, "-o", "b.safetensors")[0] == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_what_does_not_fit_together_is_refused(cli, color_model, small):
    for options, code, names in [
        (("--t", 1001), 2, "--t 1001"),
        (("--t", 10, "--steps", 11), 2, "--steps 11"),
        (("--format", "npz"), 2, "--format npz"),
        (("-o", "x.safetensors"), 2, "Add --format safetensors"),
        (("--format", "safetensors", "-o", "x.png"), 2, "cannot write .png"),
        (("--spacing", "odd"), 2, "--spacing odd"),
        (("--format", "safetensors", "--scale", 2), 2, "safetensors has the exact pixels"),
    ]:
        found, _, err = cli("invert", small, "-m", color_model, *options)
        assert (found, "Error: " in err) == (code, True), err
        assert names in err


def test_no_bytes_at_a_terminal(in_a_terminal, color_model, small):
    code, seen = in_a_terminal("invert", small, "-m", color_model, "--steps", 5, "-o", "-")
    assert (code, "not written to a terminal" in seen) == (2, True)
