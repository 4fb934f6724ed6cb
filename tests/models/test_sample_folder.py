"""A folder of samples: filled in parts, or by several processes, it has the same images as from one call."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from ddpm_cli.errors import DDPMError
from ddpm_cli.models.sample_folder import opened

COMMON = ("sample", "-o", "images/", "--batch-size", 2)


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("images").glob("*.png")}


@pytest.fixture
def whole(cli, small_model) -> dict[str, bytes]:
    """Seven images from one call."""
    assert cli(*COMMON, "-m", small_model, "--n", 7, "-q")[0] == 0
    drawn = files()
    assert sorted(drawn) == [f"{i:06d}.png" for i in range(7)]
    shutil.rmtree("images")
    return drawn


def test_only_missing_images_are_drawn(cli, small_model, whole):
    assert cli(*COMMON, "-m", small_model, "--n", 3)[0] == 0
    record = json.loads(Path("images/samples.json").read_text())
    assert (record["seed"], record["steps"], len(record["model"])) == (0, 20, 16)
    Path("images/000001.png").unlink()
    Path("images/.ddpm-half").write_bytes(b"what a killed process left")
    made = {path: path.stat().st_mtime_ns for path in Path("images").glob("*.png")}
    code, out, err = cli(*COMMON, "-m", small_model, "-n", 7, "--json")
    assert (code, json.loads(out)["n"], json.loads(out)["drawn"]) == (0, 7, 5)
    assert "2 of 7 images exist already" in err
    assert files() == whole
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert not Path("images/.ddpm-half").exists()
    code, out, _ = cli(*COMMON, "-m", small_model, "--n", 4, "--json")
    assert (code, json.loads(out)["drawn"]) == (0, 0)


def test_samples_with_other_settings_are_not_mixed(cli, small_model, color_model, whole):
    assert cli(*COMMON, "-m", small_model, "--n", 7)[0] == 0
    for options, named in [
        (("-m", small_model, "--seed", 1), "seed 0, not 1"),
        (("-m", small_model, "--steps", 5), "steps 20, not 5"),
        (("-m", color_model, "--steps", 20), "model "),
    ]:
        code, _, err = cli(*COMMON, *options, "--n", 8)
        assert (code, named in err, "--force" in err) == (1, True, True), err
        assert files() == whole
    assert cli(*COMMON, "-m", small_model, "--seed", 1, "--n", 2, "--force")[0] == 0
    assert sorted(files()) == ["000000.png", "000001.png"]  # and none of the other seed stay
    Path("images/samples.json").write_text("{")
    code, _, err = cli(*COMMON, "-m", small_model, "--n", 2)
    assert (code, "samples.json is damaged" in err) == (1, True)


def test_an_empty_file_is_drawn_again(cli, small_model, whole):
    """A power failure may leave one, since images are not flushed to the disk."""
    assert cli(*COMMON, "-m", small_model, "--n", 7)[0] == 0
    Path("images/000003.png").write_bytes(b"")
    assert json.loads(cli(*COMMON, "-m", small_model, "--n", 7, "--json")[1])["drawn"] == 1
    assert files() == whole


def test_images_are_not_flushed(cli, small_model, monkeypatch):
    waits = []
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda handle: waits.append(fsync(handle)))
    assert cli(*COMMON, "-m", small_model, "--n", 7)[0] == 0
    assert len(waits) == 2  # samples.json, and its name
    assert cli("denoise-trace", "-m", small_model, "-o", "trace/")[0] == 0
    assert len(waits) == 2
    assert len(list(Path("trace").glob("*.png"))) == 20


def test_a_folder_that_cannot_be_locked_is_filled_with_a_warning(cli, small_model, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    code, _, err = cli(*COMMON, "-m", small_model, "--n", 1)
    assert (code, "images: cannot be locked here" in err) == (0, True), err


def test_errors_in_sampling_are_not_reported_as_errors_of_the_folder(tmp_path):
    made_with = {"seed": 0}
    with pytest.raises(OSError, match="the GPU fell off"), opened(tmp_path, 1, made_with):
        raise OSError(errno.EIO, "the GPU fell off")
    below_a_file = tmp_path / "samples.json" / "x"
    with pytest.raises(DDPMError, match=r"^/.*samples.json/x: "), opened(below_a_file, 1, made_with):
        pass


@pytest.mark.parametrize("record", [b"{", b"[]", b"[" * 100_000, b'{"seed": "\xff"}', None])
def test_a_damaged_record_is_named(cli, small_model, record):
    Path("images").mkdir()
    if record is None:
        os.mkfifo("images/samples.json")
    else:
        Path("images/samples.json").write_bytes(record)
    code, _, err = cli(*COMMON, "-m", small_model, "--n", 2)
    assert code == 1
    assert ("not empty" if record is None else "samples.json is damaged") in err


def test_only_images_count_as_images(cli, small_model, whole):
    """A link to nothing is drawn, a folder is named, and what cannot be removed is left alone."""
    assert cli(*COMMON, "-m", small_model, "--n", 1)[0] == 0
    Path("images/.ddpm-half").mkdir()
    Path("images/000001.png").symlink_to("elsewhere.png")
    Path("images/000002.png").mkdir()
    for force, text in (((), "images/000002.png: cannot be written (is a folder)"), (("--force",), "000002.png: Is a")):
        code, _, err = cli(*COMMON, "-m", small_model, "--n", 3, *force)
        assert (code, text in err) == (1, True), err
        assert Path("images/elsewhere.png").read_bytes() == whole["000001.png"]


def test_other_files_stay(cli, small_model):
    Path("images").mkdir()
    for name in ("000001.png", "000005.png", "cat.png"):
        Path("images", name).write_text("precious")
    assert cli(*COMMON, "-m", small_model, "--n", 2)[0] == 1
    assert cli(*COMMON, "-m", small_model, "--n", 2, "--force")[0] == 0
    assert Path("images/000001.png").read_bytes().startswith(b"\x89PNG")
    assert Path("images/000005.png").read_text() == Path("images/cat.png").read_text() == "precious"
