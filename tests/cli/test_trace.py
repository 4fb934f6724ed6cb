"""`ddpm denoise-trace`: the reverse process, from an image or from noise."""

import json
from pathlib import Path

import pytest
from PIL import Image

from conftest import SMALL, picture, write_model
from ddpm_cli.config import ScheduleConfig


def test_trace_from_noise_ends_in_the_sample(cli, color_model):
    options = ("-m", color_model, "--sampler", "ddpm", "--steps", 20)
    assert cli("denoise-trace", *options, "-o", "frames/", "--frames", 4)[0] == 0
    names = sorted(path.name for path in Path("frames").iterdir())
    assert names == [f"{i:03d}-t{t:04d}-{row}.png" for i, t in enumerate((1000, 650, 350, 0)) for row in ("x0", "xt")]
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
    assert picture("t.png").size == (24 + 5 * 120 + 24, 16 + rows * 120 + 24)


@pytest.mark.parametrize("name", ["t.gif", "t.webp"])
def test_trace_animations(cli, color_model, emoji, name):
    assert cli("denoise-trace", emoji, "-m", color_model, "--t", 30, "-o", name, "--frames", 7)[0] == 0
    with Image.open(name) as animation:
        assert (animation.n_frames, animation.size) == (7, (2 * 120 + 24, 16 + 120 + 24))


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


def test_an_image_with_a_model_of_one_step(cli, emoji):
    write_model(Path("model"), SMALL, ScheduleConfig(num_train_timesteps=1))
    code, out, err = cli("denoise-trace", emoji, "-m", "model", "-o", "t.png", "--json")
    assert (code, err.count("Error")) == (0, 0), err
    assert json.loads(out)["t"] == [1, 0]


def test_more_frames_than_states(cli, color_model):
    code, _, err = cli("denoise-trace", "-m", color_model, "--steps", 3, "--frames", 9, "-o", "t.png")
    assert (code, "--frames 9: 3 steps have 4 states" in err) == (0, True), err


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


def test_the_traces_of_several_images_are_those_of_the_samples(cli, color_model):
    options = ("-m", color_model, "--steps", 6)
    assert cli("denoise-trace", *options, "--n", 3, "--frames", 3, "--show", "xt", "-o", "frames/")[0] == 0
    assert cli("sample", *options, "--n", 3, "-o", "all/")[0] == 0
    assert sorted(path.name for path in Path("frames").iterdir()) == ["000000", "000001", "000002"]
    for i in range(3):
        last = max(Path(f"frames/{i:06d}").iterdir())
        assert last.name == "002-t0000-xt.png"
        assert picture(last).tobytes() == picture(f"all/{i:06d}.png").tobytes()


@pytest.mark.parametrize(("show", "rows"), [("both", 2), ("x0", 1)])
def test_traces_are_rows_of_a_strip_and_columns_of_an_animation(cli, color_model, show, rows):
    options = ("-m", color_model, "--n", 3, "--steps", 5, "--frames", 4, "--show", show)
    code, out, _ = cli("denoise-trace", *options, "-o", "t.png", "--json")
    assert (code, json.loads(out)["n"]) == (0, 3)
    assert picture("t.png").size == (24 + 4 * 120 + 24, 16 + 3 * rows * 120 + 24 + (2 * 16 if rows > 1 else 0))
    assert cli("denoise-trace", *options, "-o", "t.gif")[0] == 0
    with Image.open("t.gif") as animation:
        assert (animation.n_frames, animation.size) == (4, (24 + 3 * 120 + 24, 16 + rows * 120 + 24))


def test_traces_of_an_image_begin_with_other_noise_each(cli, color_model, emoji):
    options = ("-m", color_model, "--t", 30, "--frames", 2, "--show", "xt")
    assert cli("denoise-trace", emoji, *options, "--n", 2, "-o", "two/")[0] == 0
    assert cli("denoise-trace", emoji, *options, "-o", "one/")[0] == 0
    first, second = (picture(f"two/{i:06d}/000-t0030-xt.png").tobytes() for i in range(2))
    assert first != second
    assert first == picture("one/000-t0030-xt.png").tobytes()


def test_samples_that_share_a_state(cli, color_model):
    options = ("denoise-trace", "-m", color_model, "--steps", 8, "--share-from")
    code, out, _ = cli(*options, "1000,300,2", "-n", 3, "-o", "shared.png", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["t"], facts["n"], facts["sampler"]) == ([1000, 300, 2], 3, "ddpm")
    height = 16 + 3 * 120 + 24
    sheet = picture("shared.png")
    assert sheet.height == height
    assert sheet.width > 4 * 120 + 16  # the labels are as wide as they need
    assert cli(*options, "300,1000", "-n", 2, "-o", "frames/")[0] == 0
    assert sorted(path.as_posix() for path in Path("frames").rglob("*.png")) == [
        f"frames/t{t:04d}/{name}.png" for t in (300, 1000) for name in ("000000", "000001", "xt")
    ]
    left = sheet.width - 4 * 120 - 16
    for row, t in ((0, 1000), (1, 300)):  # neither the order of t nor the number of samples changes an image
        for column, name in enumerate(("xt", "000000", "000001")):
            x, y = left + column * 120 + 16 * (column > 0), 16 + 24 + row * 120
            tile = sheet.crop((x, y, x + 96, y + 96)).resize((8, 8), Image.Resampling.NEAREST)
            assert tile.tobytes() == picture(f"frames/t{t:04d}/{name}.png").tobytes(), (t, name)


def test_an_image_is_the_shared_state(cli, color_model, emoji):
    assert cli("denoise-trace", emoji, "-m", color_model, "--share-from", "20,40", "-o", "shared/")[0] == 0
    assert len(list(Path("shared/t0040").glob("0*.png"))) == 4
    assert cli("denoise-trace", emoji, "-m", color_model, "--t", 40, "-o", "trace/")[0] == 0
    assert Path("shared/t0040/xt.png").read_bytes() == Path("trace/000-t0040-xt.png").read_bytes()
    small = picture(emoji).resize((8, 8))
    small.save("small.png")
    assert cli("noise", "small.png", "--t", 40, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    for source in ("small.png", "n.safetensors"):
        assert cli("denoise-trace", source, "-m", color_model, "--share-from", 40, "-o", f"{source}.shared/")[0] == 0
    for path in Path("small.png.shared").rglob("*.png"):
        assert path.read_bytes() == Path("n.safetensors.shared", *path.parts[1:]).read_bytes()


def test_what_cannot_be_shared_is_refused(cli, color_model, emoji):
    assert cli("noise", emoji, "--t", 30, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    for args, names in [
        (("--share-from", 500, "--sampler", "ddim"), "--sampler ddim: draws no noise"),
        (("--share-from", 500, "--sampler", "dpm++", "--eta", 0), "--sampler dpm++: draws no noise"),
        (("--share-from", 500, "--eta", 1), "--eta"),
        (("--share-from", 1001), "--share-from 1001"),
        (("--share-from", "500,0"), "--share-from 0"),
        (("--share-from", ""), "--share-from"),
        (("--share-from", "500;250"), "--share-from 500;250"),
        (("--share-from", 500, "--t", 500), "--t"),
        (("--share-from", 500, "--frames", 5), "--frames"),
        (("--share-from", 500, "--show", "x0"), "--show"),
        (("n.safetensors", "--share-from", "30,20"), "t=30"),
        (("n.safetensors", "--n", 2, "--sampler", "ddim"), "draws no noise"),
    ]:
        code, _, err = cli("denoise-trace", "-m", color_model, *args, "-o", "t.png")
        assert (code, "Error: " in err) == (2, True), err
        assert names in err
    assert "no animation" in cli("denoise-trace", "-m", color_model, "--share-from", 500, "-o", "t.gif")[2]
    assert not Path("t.png").exists()
