"""`ddpm neighbors`: samples beside their nearest training images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import picture


@pytest.fixture
def samples(digits) -> Path:
    """Four samples: a copy, a mirrored copy, and two that are no copies."""
    folder = Path("samples")
    folder.mkdir()
    first, second, third, fourth, *_ = sorted(digits.rglob("*.png"))
    shutil.copy(first, folder / "copy.png")
    ImageOps.mirror(picture(second)).save(folder / "flipped.png")
    Image.blend(picture(third), picture(fourth), 0.5).save(folder / "new.png")
    Image.effect_noise((28, 28), 90).save(folder / "noise.png")
    return folder


def test_copies_are_counted_and_named(cli, digits, samples):
    code, out, err = cli("neighbors", samples, "--data", digits, "--k", 3, "-o", "n.png", "--json")
    assert code == 0
    assert "2 of 4 samples are memorised" in err
    result = json.loads(out)
    assert (result["samples"], result["images"], result["memorised"]) == (4, 60, 2)
    rows = {row["name"]: row for row in result["neighbors"]}
    assert [rows[name]["memorised"] for name in ("copy.png", "flipped.png", "new.png", "noise.png")] == [
        True,
        True,
        False,
        False,
    ]
    names = [path.relative_to(digits).as_posix() for path in sorted(digits.rglob("*.png"))]
    assert rows["copy.png"]["nearest"][0] == {"name": names[0], "distance": 0, "mirrored": False}
    assert rows["flipped.png"]["nearest"][0] == {"name": names[1], "distance": 0, "mirrored": True}
    assert {image["name"] for image in rows["new.png"]["nearest"][:2]} == set(names[2:4])
    assert all(len(row["nearest"]) == 3 for row in rows.values())


def test_the_picture_shows_the_most_suspicious_samples_first(cli, digits, samples):
    assert cli("neighbors", samples, "--data", digits, "--k", 3, "--show", 2, "--no-flip", "-o", "n.png")[0] == 0
    sheet = picture("n.png")
    assert sheet.size == (8 + 4 * 120 + 112 // 6, 16 + 8 + 2 * (112 + 8 + 2 * 14 + 4))
    copy = picture(samples / "copy.png").resize((112, 112), Image.Resampling.NEAREST)
    for left in (8, 8 + 120 + 112 // 6):  # the sample, and its nearest image
        assert sheet.crop((left, 24, left + 112, 136)).tobytes() == copy.tobytes()


def test_samples_of_ddpm_sample_in_both_forms(cli, digits, small_model):
    for output in ("samples/", "samples.npz"):
        assert cli("sample", "-m", small_model, "--n", 5, "-o", output)[0] == 0
    found = []
    for given in ("samples", "samples.npz"):
        code, out, _ = cli("neighbors", given, "--data", digits, "-o", f"{given}.png", "--json")
        assert code == 0
        found.append([(row["ratio"], row["nearest"]) for row in json.loads(out)["neighbors"]])
    assert found[0] == found[1]
    assert Path("samples.png").stat().st_size > 1000


def test_the_images_are_fitted_to_the_samples(cli, digits, photo):
    """Gray and RGB, and another size and shape: as training would see them."""
    digit = next(digits.rglob("*.png"))
    picture(digit).convert("RGB").save("rgb.png")
    picture(photo).convert("L").crop((16, 0, 80, 64)).save("gray.png")
    for sample, data, name in [("rgb.png", digits, digit.relative_to(digits)), ("gray.png", photo, photo)]:
        code, out, _ = cli("neighbors", sample, "--data", data, "--json", "-o", f"n-{sample}")
        assert code == 0
        assert json.loads(out)["neighbors"][0]["nearest"][0] == {"name": str(name), "distance": 0, "mirrored": False}


def test_a_name_follows_its_image_past_files_that_are_left_out(cli, digits):
    Path("data").mkdir()
    paths = sorted(digits.rglob("*.png"))
    for i, path in enumerate(paths[:4]):
        shutil.copy(path, f"data/{i}.png")
    Path("data/1.png").write_bytes(b"no image")
    Path("data/00.png").write_bytes(b"no image")
    for _ in range(2):  # the second time from the cache
        code, out, err = cli("neighbors", paths[3], "--data", "data", "--json", "--force", "-o", "n.png")
        assert code == 0
        assert "2 files cannot be used, for example 00.png: not an image" in err
        near = [(image["name"], image["distance"]) for image in json.loads(out)["neighbors"][0]["nearest"]]
        assert near[0] == ("3.png", 0)
        assert {name for name, _ in near} == {"0.png", "2.png", "3.png"}


def test_one_image_and_several_data(cli, digits):
    one, two, *_ = sorted(digits.rglob("*.png"))
    code, out, err = cli("neighbors", two, "--data", one, "--json", "-o", "n.png")
    assert (code, json.loads(out)["neighbors"][0]["ratio"]) == (0, None)
    assert "only one image" in err
    code, out, _ = cli("neighbors", two, "--data", one, "--data", digits, "--json", "-o", "m.png")
    assert (code, json.loads(out)["images"]) == (0, 61)


def test_a_list_in_a_pipe_and_a_picture_in_a_pipe(ddpm, digits, samples):
    names = b"".join(bytes(path) + b"\0" for path in sorted(samples.iterdir()))
    result = ddpm("neighbors", "-", "--data", digits, stdin=names)
    assert (result.returncode, result.stdout[:4]) == (0, b"\x89PNG")
    assert b"2 of 4 samples are memorised" in result.stderr


def test_invalid_input_is_refused(cli, digits, emoji, samples):
    np.savez("wide.npz", np.zeros((2, 4, 6, 3), np.uint8))
    shutil.copy(emoji, "samples2.png")
    Path("empty").mkdir()
    for args, expected, names in [
        ((samples,), 2, "--data"),
        ((samples, "--data", digits, "--fit", "fold"), 2, "--fit fold"),
        ((samples, "--data", digits, "--background", "blurple"), 2, "blurple"),
        (("-", "--data", "-"), 2, "stdin"),
        ((samples, "wide.npz", "--data", digits), 2, ".npz"),
        ((samples, "samples2.png", "--data", digits), 1, "one size"),
        (("wide.npz", "--data", digits), 1, "6x4"),
        (("nowhere", "--data", digits), 1, "nowhere"),
        ((samples, "--data", "nowhere"), 1, "nowhere"),
        (("empty", "--data", digits), 1, "empty"),
        ((samples, "--data", "empty"), 1, "empty"),
    ]:
        code, out, err = cli("neighbors", *args, "-o", "n.png")
        assert (code, out, "Error: " in err) == (expected, "", True), err
        assert names in err
    assert not Path("n.png").exists()


def test_a_grid_is_no_sample(cli, digits, samples):
    """It is one of any size, so it is compared; but a note asks before the training images are enlarged."""
    Image.effect_noise((257, 257), 90).save("grid.png")
    for given, noted in (("grid.png", True), (samples / "copy.png", False)):
        code, _, err = cli("neighbors", given, "--data", digits, "-o", "n.png", "--force")
        assert (code, "one sample of 257x257 pixels: is it a grid?" in err) == (0, noted)
