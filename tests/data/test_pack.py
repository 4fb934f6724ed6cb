"""Packs: from a folder of any files to batches of pixels."""

import io
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import DIGITS
from ddpm_cli.config import DataConfig
from ddpm_cli.data import images
from ddpm_cli.data.batches import Batches
from ddpm_cli.data.cache import pack_lock
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.data.survey import survey
from ddpm_cli.errors import DataError
from ddpm_cli.files import lock
from processes import GUARD


def source_of(path):
    source = open_source(path, Path("cache"))
    source.scan()
    return source


def pack_of(path, cache, **settings):
    config = DataConfig(images=str(path), **({"size": 28, "channels": 1} | settings))
    return open_pack(source_of(path), config, cache)


def test_pixels_of_a_pack_are_those_of_the_files(digits, tmp_path):
    pack = pack_of(digits, tmp_path)
    assert len(pack) == 60
    names = source_of(digits).names
    expected = torch.stack([images.from_pil(Image.open(digits / name)) for name in names])
    assert torch.equal(pack[torch.arange(60)], expected)
    assert torch.equal(pack[torch.tensor([7, 7, 3])], expected[[7, 7, 3]])


def test_waiting_for_another_run_is_reported(digits, tmp_path):
    reports = []
    busy = threading.Event()

    def report(what, done, total):
        reports.append(what)
        if "waiting" in what:
            busy.set()

    def decode():
        open_pack(source_of(digits), DataConfig(images="", size=28, channels=1), tmp_path, report)

    decode()
    assert not busy.is_set()
    (pack,) = (tmp_path / "packs").iterdir()
    shutil.rmtree(pack)
    with lock(pack_lock(tmp_path, pack.name)):
        thread = threading.Thread(target=decode)
        thread.start()
        assert busy.wait(GUARD)
    thread.join()
    assert pack.is_dir()
    assert reports.count("waiting for another run that decodes these images") == 1


def test_a_zip_gives_the_same_pack_as_a_folder(digits, tmp_path):
    archive = tmp_path / "digits.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(digits.rglob("*.png")):
            file.write(path, path.relative_to(digits))
        file.writestr("__MACOSX/._1.png", b"")
    packs = [pack_of(path, tmp_path / "cache") for path in (digits, archive)]
    assert torch.equal(*(pack[torch.arange(60)] for pack in packs))
    assert survey(source_of(archive)) == survey(source_of(digits))


def test_shards(digits, tmp_path, monkeypatch):
    whole = pack_of(digits, tmp_path / "one")
    monkeypatch.setattr("ddpm_cli.data.pack._SHARD_BYTES", 7 * 784)
    pieces = pack_of(digits, tmp_path / "many")
    assert len(list(pieces.folder.glob("shard-*"))) == 9
    some = torch.randint(60, (100,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pieces[some], whole[some])


def test_a_pack_is_made_once_for_the_same_files(digits, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    first = pack_of(folder, tmp_path / "cache")
    made = (first.folder / "index.json").stat().st_ino
    assert (pack_of(folder, tmp_path / "cache", flip=False).folder / "index.json").stat().st_ino == made
    assert pack_of(folder, tmp_path / "cache", size=32).fingerprint != first.fingerprint
    next(folder.rglob("*.png")).unlink()
    assert len(pack_of(folder, tmp_path / "cache")) == 59
    assert (tmp_path / "cache" / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def test_bad_files_are_left_out_and_named(digits, photo, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(digits, folder)
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_bytes(b"not looked at")
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.jpg").write_bytes(photo.read_bytes()[:700])
    (folder / "text.png").write_text("hello")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "really a jpeg.png").write_bytes(photo.read_bytes())
    seen = []
    config = DataConfig(images="", size=28, channels=3)
    source = source_of(folder)
    pack = open_pack(source, config, tmp_path / "cache", lambda what, done, total: seen.append((done, total)))
    assert len(pack) == 61
    assert [name for name, _ in pack.left_out] == ["empty.png", "gone.png", "half.jpg", "text.png"]
    assert all(reason and not reason.startswith(name) for name, reason in pack.left_out)
    assert seen[-1] == (65, 65)
    assert (tmp_path / "cache" / "packs").exists()
    assert not list((tmp_path / "cache" / "packs").glob(".*"))


def test_damaged_metadata_and_members_are_left_out(digits, photo, tmp_path):
    """Pillow's plugins and zipfile may raise any exception; none may end a run."""
    data = bytearray(photo.read_bytes())
    broken_exif = (
        data[:2]
        + b"\xff\xe1\x00\x22Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x09\x00"
        + b"\xff" * 12
        + data[2:]
    )
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("exif.jpg", bytes(broken_exif))
        file.writestr("float.tiff", _tiff())
        file.writestr("good.png", next(digits.rglob("*.png")).read_bytes())
        file.writestr("packed.png", b"0" * 5000, compress_type=zipfile.ZIP_LZMA)
    raw = bytearray(archive.read_bytes())
    at = raw.index(b"packed.png") + len(b"packed.png")
    raw[at + 4 : at + 40] = b"\xff" * 36
    archive.write_bytes(raw)
    pack = pack_of(archive, tmp_path / "cache", channels=3)
    assert {name for name, _ in pack.left_out} >= {"float.tiff", "packed.png"}
    assert len(pack) + len(pack.left_out) == 4
    (tmp_path / "bad.zip").write_bytes(bytes(raw[:-30]) + b"PK\x05\x06" + b"\xff" * 18)
    with pytest.raises(DataError, match=r"bad\.zip"):
        source_of(tmp_path / "bad.zip")


def _tiff() -> bytes:
    buffer = io.BytesIO()
    Image.new("F", (4, 4)).save(buffer, "TIFF")
    return buffer.getvalue()


def test_cycles_of_links_and_runs_are_skipped(digits, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    (folder / "self").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    run = folder / "runs" / "digits"
    shutil.copytree(digits, run / "samples")
    (run / "config.json").touch()
    (run / "metrics.jsonl").touch()
    assert len(source_of(folder).names) == 60


def test_a_damaged_pack_is_made_again(digits, tmp_path):
    good = pack_of(digits, tmp_path)
    for damage in (
        lambda: (good.folder / "index.json").unlink(),
        lambda: (good.folder / "index.json").write_text('{"count": 60'),
        lambda: (good.folder / "shard-00000.u8").write_bytes(b"short"),
    ):
        damage()
        again = pack_of(digits, tmp_path)
        assert (len(again), again.fingerprint) == (60, good.fingerprint)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1, 8]},
        {"shape": [1, 14, 56]},
        {"shape": "x"},
        {"mean": [float("nan")]},
        {"mean": []},
        {"count": 59},
        {"count": -1},
        {"per_shard": 0},
        {"pixels": "x"},
        {"left_out": [["a.png"]]},
        {"left_out": [["\x1b[31m.png", "is red"]]},
        {"unread": [[1]]},
        {"mean": None},
        {"new": 1},
    ],
)
def test_a_pack_with_a_wrong_index_is_made_again(digits, tmp_path, change):
    index = pack_of(digits, tmp_path).folder / "index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps(good | change))
    again = pack_of(digits, tmp_path)
    assert json.loads(index.read_text()) == good
    assert (len(again), again.shape, again.mean) == (60, (1, 28, 28), good["mean"])


@pytest.mark.parametrize("name", ["index.json", "shard-00000.u8"])
def test_a_pack_that_is_odd_is_made_again(digits, tmp_path, name):
    """Neither deep nesting nor a pipe ends or stops the program."""
    folder = pack_of(digits, tmp_path).folder
    (folder / name).write_text("[" * 100_000)
    assert len(pack_of(digits, tmp_path)) == 60
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert len(pack_of(digits, tmp_path)) == 60


def test_a_file_that_comes_back_is_used(digits, tmp_path):
    """The target of a link was on an unmounted disk; the link itself has not changed."""
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    (folder / "link.png").symlink_to(tmp_path / "away.png")
    assert len(pack_of(folder, tmp_path / "cache")) == 60
    made = next((tmp_path / "cache" / "packs").iterdir()).stat().st_ino
    assert len(pack_of(folder, tmp_path / "cache")) == 60
    assert next((tmp_path / "cache" / "packs").iterdir()).stat().st_ino == made
    shutil.copy(next(digits.rglob("*.png")), tmp_path / "away.png")
    assert len(pack_of(folder, tmp_path / "cache")) == 61


def test_the_fingerprint_is_of_the_pixels(digits, tmp_path):
    """Copies of the images have the same fingerprint."""
    shutil.copytree(digits, tmp_path / "copy", copy_function=shutil.copyfile)
    packs = [pack_of(path, tmp_path / "cache") for path in (digits, tmp_path / "copy")]
    assert packs[0].folder != packs[1].folder
    assert packs[0].fingerprint == packs[1].fingerprint


def test_survey(digits, emoji, photo, tmp_path):
    found = survey(source_of(digits))
    assert (found.files, found.gray, found.square_side, found.channels) == (60, 60, 28, 1)
    folder = tmp_path / "mixed"
    shutil.copytree(digits, folder)
    shutil.copy(emoji, folder)
    shutil.copy(photo, folder)
    (folder / "broken.png").write_bytes(b"x")
    found = survey(source_of(folder))
    assert (found.files, found.readable, found.gray) == (63, 62, 60)
    assert (found.channels, found.square_side, found.median_side) == (3, None, 28)


def test_nothing_to_train_on(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    (tmp_path / "file.txt").write_text("x")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    for name in ("none", "empty", "file.txt", "empty.zip"):
        with pytest.raises(DataError, match=name):
            source_of(tmp_path / name)
    with pytest.raises(DataError, match="none of its 1 image files"):
        survey(source_of(tmp_path / "bad"))
    with pytest.raises(DataError, match=r"a\.png"):
        pack_of(tmp_path / "bad", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "packs").iterdir())


def test_every_epoch_shows_every_image_once():
    batches = Batches(10, 4, seed=1)
    shown = torch.cat([batches[step] for step in range(10)])
    for epoch in range(4):
        assert sorted(shown[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert shown[:10].tolist() != shown[10:20].tolist()
    assert shown.tolist() == torch.cat([Batches(10, 4, seed=1)[step] for step in range(10)]).tolist()
    assert batches[3].tolist() != Batches(10, 4, seed=2)[3].tolist()
    assert batches[0].tolist() == shown[:4].tolist()  # any batch, in any order
    assert len(Batches(3, 8, seed=0)[5]) == 8  # a batch larger than the data


def test_the_bundled_digits():
    source = source_of(DIGITS)
    assert len(source.names) == 5000
    assert survey(source).square_side == 28
