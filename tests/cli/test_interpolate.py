"""`ddpm interpolate`: between two images, two seeds, or one of each."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import picture


@pytest.fixture
def ends(emoji, photo) -> tuple[Path, Path]:
    """Two RGB images of the size of `color_model`."""
    for name, source in (("a.png", emoji), ("b.png", photo)):
        with Image.open(source) as image:
            rgba = image.convert("RGBA")
        Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB").resize((8, 8)).save(name)
    return Path("a.png"), Path("b.png")


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(picture(path)).astype(float)


def test_a_row_for_each_t_and_one_of_pixels(cli, color_model, ends):
    options = ("-m", color_model, "--t", "500,20", "-n", 5, "--sampler", "ddpm", "--steps", 4)
    code, out, _ = cli("interpolate", *ends, *options, "-o", "x.png", "--json")
    assert code == 0
    about = json.loads(out)
    assert (about["via"], about["t"], about["n"], about["steps"]) == ("noise", [0, 20, 500], 5, [4, 4])
    table = picture("x.png")
    assert table.height == 16 + 3 * 120 + 24
    assert 5 * 120 + 24 < table.width < 6 * 120
    assert cli("interpolate", *ends, *options, "-o", "x/")[0] == 0
    names = sorted(path.name for path in Path("x").iterdir())
    assert names == [f"{i:03d}-t{t:04d}.png" for i in range(5) for t in (0, 20, 500)]
    a, b = map(pixels, ends)
    for i in range(5):
        assert np.abs(pixels(f"x/{i:03d}-t0000.png") - (a + i / 4 * (b - a))).max() <= 0.5


def test_the_ends_are_those_of_denoise_trace(cli, color_model, ends):
    """So they have its noise, and the same one in every column, also with a sampler that draws some."""
    options = ("-m", color_model, "--t", 500, "--sampler", "ddpm", "--steps", 6, "--seed", 3)
    assert cli("interpolate", *ends, *options, "-n", 3, "-o", "x/")[0] == 0
    for end, place in zip(ends, (0, 2), strict=True):
        assert cli("denoise-trace", end, *options, "--frames", 2, "-o", f"trace{place}/")[0] == 0
        assert picture(f"x/{place:03d}-t0500.png").tobytes() == picture(f"trace{place}/001-t0000-xt.png").tobytes()
    assert cli("interpolate", ends[0], ends[0], *options, "-n", 3, "-o", "same/")[0] == 0
    assert len({picture(f"same/{i:03d}-t0500.png").tobytes() for i in range(3)}) == 1


def test_between_seeds(cli, color_model):
    """The ends are the images of ddpm sample, without its noise."""
    assert cli("interpolate", "seed:1", "seed:2", "-m", color_model, "-n", 4, "-o", "x/")[0] == 0
    for seed, place in ((1, 0), (2, 3)):
        assert cli("sample", "-m", color_model, "--seed", seed, "--n", 1, "--eta", 0, "-o", f"seed{seed}/")[0] == 0
        end = picture(f"seed{seed}/000000.png").tobytes()
        assert picture(f"x/{place:03d}-latent.png").tobytes() == end
        assert picture(f"x/{place:03d}-pixels.png").tobytes() == end


@pytest.mark.parametrize("other", ["b.png", "seed:4"])
def test_through_latents_the_ends_are_the_images(cli, color_model, ends, other):
    options = ("-m", color_model, "--via", "latent", "--steps", 20, "--precision", "fp32", "-n", 3)
    assert cli("interpolate", ends[0], other, *options, "-o", "x/")[0] == 0
    for row in ("pixels", "latent"):
        assert picture(f"x/000-{row}.png").tobytes() == picture(ends[0]).tobytes()
    last = picture("x/002-latent.png").tobytes()
    assert picture("x/002-pixels.png").tobytes() == last
    if other == "b.png":
        assert last == picture(other).tobytes()
    assert picture("x/001-latent.png").tobytes() != picture("x/001-pixels.png").tobytes()


@pytest.mark.parametrize("name", ["x.gif", "x.webp"])
def test_an_animation_runs_forth_and_back(cli, color_model, ends, name):
    assert cli("interpolate", *ends, "-m", color_model, "--t", 300, "-n", 6, "-o", name)[0] == 0
    with Image.open(name) as animation:
        assert (animation.n_frames, animation.height) == (11, 2 * 120 + 24)
        durations, frames = [], []
        for i in range(11):
            animation.seek(i)
            frames.append(animation.convert("RGB").tobytes())
            durations.append(animation.info["duration"])
    assert frames == frames[::-1]
    assert durations == [80] * 5 + [2000] + [80] * 4 + [2000]


def test_one_end_from_a_pipe(ddpm, color_model, ends):
    done = ddpm("interpolate", "-", ends[1], "-m", color_model, "-n", 2, stdin=ends[0].read_bytes())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\x89PNG")


def test_what_has_no_meaning_is_refused(cli, color_model, ends):
    a, b = ends
    latent = ("--via", "latent")
    for args, names in [
        ((a, b, "--via", "dreams"), "--via dreams"),
        (("-", "-"), "stdin holds one image"),
        ((a, "seed:3", "--via", "noise"), "seed:3 is noise already"),
        (("seed:x", b), "seed:x: not a seed"),
        ((a, b, *latent, "--t", "500"), "at the last timestep"),
        (("seed:1", "seed:2", "--t", "500"), "at the last timestep"),
        ((a, b, *latent, "--sampler", "dpm++"), "only ddim"),
        ((a, b, *latent, "--eta", "0.5"), "--eta: only ddim"),
        (("seed:1", "seed:2", "--sampler", "ddpm"), "--sampler ddpm: draws noise"),
        (("seed:1", "seed:2", "--eta", "0.5"), "--eta: draws noise"),
        ((a, b, "--t", "0"), "always shown"),
        ((a, b, "--t", "1001"), "--t 1001"),
        ((a, b, "--t", "100,5", "--steps", "6"), "--steps 6"),
        ((a, b, "-n", "1"), "-n"),
    ]:
        code, _, err = cli("interpolate", *args, "-m", color_model, "-o", "x.png")
        assert (code, "Error: " in err) == (2, True), (args, err)
        assert names in err
    assert not Path("x.png").exists()
