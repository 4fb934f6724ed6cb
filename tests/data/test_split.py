"""Held-out images: which they are does not depend on where the images are, nor on other images."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from ddpm_cli.config import DataConfig
from ddpm_cli.data.pack import names_in, open_pack
from ddpm_cli.data.sources import Listed, open_sources
from ddpm_cli.data.split import Part, is_held_out, open_part
from ddpm_cli.errors import DataError, UsageError

CACHE = Path("cache")


def split(*paths, fraction=0.3):
    """The names of the training part and of the held-out part."""
    source = open_sources([path if isinstance(path, Listed) else str(path) for path in paths], CACHE)
    parts = [Part(source, fraction, held_out) for held_out in (False, True)]
    for part in parts:
        part.scan()
    assert parts[0].held_out == len(parts[1].names)
    return [list(part.names) for part in parts]


def packs(images, fraction=0.3, **settings):
    config = DataConfig(images=images, **({"size": 28, "channels": 1, "holdout": fraction} | settings))
    return [open_part(config, CACHE, held_out)[0] for held_out in (False, True)]


def pixels(*packs):
    return sorted(image.numpy().tobytes() for pack in packs for image in pack[torch.arange(len(pack))])


@pytest.fixture
def copy(digits, tmp_path) -> Path:
    return shutil.copytree(digits, tmp_path / "some" / "where")


def test_the_parts_are_all_images_and_have_none_in_common(digits):
    train, held = split(digits)
    assert not set(train) & set(held)
    source = open_sources([str(digits)], CACHE)
    assert sorted(train + held) == list(source.names)
    assert 8 <= len(held) <= 28  # of 60: 18, give or take 2.8 standard deviations


def test_the_fraction_is_that_of_many_names():
    held = [is_held_out(f"{i:05}.png", 0.1) for i in range(20_000)]
    assert sum(held) == pytest.approx(2000, abs=4 * (20_000 * 0.09) ** 0.5)
    assert not any(is_held_out(f"{i}.png", 0.0) for i in range(100))


def test_the_choice_never_changes():
    """Of a version that held out other images, a run would be evaluated on images that it has seen."""
    assert [i for i in range(20) if is_held_out(f"{i}.png", 0.3)] == [0, 2, 6, 7, 8, 14, 16, 18]


def test_a_held_out_image_stays_so_when_the_fraction_grows(digits):
    few, more = (set(split(digits, fraction=fraction)[1]) for fraction in (0.1, 0.4))
    assert few < more


def test_other_images_move_none(copy):
    train, held = split(copy)
    moved = next(copy.rglob("*.png"))
    for i in range(20):
        shutil.copy(moved, copy / f"new-{i}.png")
    new_train, new_held = split(copy)
    assert set(train) < set(new_train)
    assert set(held) < set(new_held)


def test_the_place_of_the_images_does_not_matter(digits, copy, monkeypatch):
    """The same pixels are held out of a folder, a copy, a .zip, a .tar and a list beside them."""
    expected = packs(str(digits))
    with zipfile.ZipFile("digits.zip", "w") as archive:
        for path in digits.rglob("*.png"):
            archive.write(path, path.relative_to(digits))
    with tarfile.open("digits.tar", "w") as archive:
        archive.add(digits, ".")
    (copy / "list.txt").write_text("".join(f"{path.relative_to(copy)}\n" for path in sorted(copy.rglob("*.png"))))
    for images in (str(copy), "digits.zip", "digits.tar", str(copy / "list.txt")):
        found = packs(images)
        assert [pack.fingerprint for pack in found] == [pack.fingerprint for pack in expected], images
    monkeypatch.chdir(digits.parent)
    assert split(digits.name) == split(digits)


def test_several_sources_hold_out_what_each_of_them_would(digits, copy):
    folders = [copy / "0", copy / "1"]
    _, held = split(*folders)
    alone = [f"{folder}/{name}" for folder in folders for name in split(folder)[1]]
    assert held == alone
    loose = sorted((copy / "2").glob("*.png"))
    assert {name for name in split(*folders, *loose)[1] if name.startswith(f"{folders[0]}/")} == {
        name for name in held if name.startswith(f"{folders[0]}/")
    }


def test_images_that_were_named_one_by_one_are_found_again(digits, monkeypatch):
    """A run's configuration has their absolute paths, whatever was typed."""
    monkeypatch.chdir(digits)
    typed = [str(path) for path in sorted(Path("3").glob("*.png"))]
    source = open_sources(typed, CACHE)
    train, held = split(*typed, fraction=0.5)
    again_train, again_held = split(*source.addresses, fraction=0.5)
    assert [Path(name).name for name in again_held] == [Path(name).name for name in held]
    assert [Path(name).name for name in again_train] == [Path(name).name for name in train]
    assert held
    assert train


def test_a_list_from_a_pipe_is_split_as_the_list_that_the_run_keeps(digits):
    names = [str(path) for path in sorted(digits.rglob("*.png"))]
    Path("list.txt").write_text("".join(f"{name}\n" for name in names))
    assert split(Listed("stdin", names, "list.txt")) == split("list.txt")


def test_the_packs_of_the_parts_are_all_pixels(digits):
    config = DataConfig(images=str(digits), size=28, channels=1)
    everything = open_pack(open_sources([str(digits)], CACHE), config, CACHE)
    train, held = packs(str(digits))
    assert pixels(train, held) == pixels(everything)
    assert (train.held_out, held.held_out, everything.held_out) == (len(held), 0, 0)
    assert len({pack.fingerprint for pack in (train, held, everything)}) == 3
    assert len({pack.folder for pack in (train, held, everything)}) == 3
    means = [(pack.mean[0], len(pack)) for pack in (train, held)]
    assert sum(mean * count for mean, count in means) / 60 == pytest.approx(everything.mean[0])
    more = packs(str(digits), fraction=0.4)
    assert len({pack.folder for pack in (train, held, *more)}) == 4
    assert packs(str(digits), flip=False)[0].folder == train.folder


def test_without_held_out_images_a_pack_has_the_name_it_always_had(digits):
    """Such packs exist in caches, where they would be decoded again under another name."""
    config = DataConfig(images=str(digits), size=28, channels=1)
    whole = open_sources([str(digits)], CACHE)
    assert open_part(config, CACHE, held_out=False)[0].folder == open_pack(whole, config, CACHE).folder
    with pytest.raises(DataError, match="the run holds out none of its images"):
        open_part(config, CACHE, held_out=True)


def test_a_file_that_cannot_be_decoded_counts_in_its_part(copy):
    train, held = split(copy)
    (copy / train[3]).write_bytes(b"nothing")
    (copy / held[2]).write_bytes(b"nothing")
    (copy / held[4]).write_bytes(b"nothing")
    config = DataConfig(images=str(copy), size=28, channels=1, holdout=0.3)
    for held_out, names, bad in ((False, train, [3]), (True, held, [2, 4])):
        pack, source = open_part(config, CACHE, held_out)
        assert [name for name, _ in pack.left_out] == [names[i] for i in bad]
        good = [name for i, name in enumerate(names) if i not in bad]
        assert list(names_in(pack, source, range(len(pack))).values()) == good


def test_what_the_source_cannot_read_is_reported_once(digits):
    with tarfile.open("digits.tar", "w") as archive:
        archive.add(digits, ".")
        link = tarfile.TarInfo("broken.png")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere.png"
        archive.addfile(link)
    train, held = packs("digits.tar")
    assert [name for name, _ in train.left_out] == ["broken.png"]
    assert held.left_out == []
    assert len(train) + len(held) == 60


def test_too_few_images(digits):
    one = next(digits.rglob("*.png"))
    for held_out, fraction, error, words in (
        (False, 1 - 1e-12, UsageError, "--holdout 1: none of the one image of .*is left to train on"),
        (True, 1e-12, DataError, "none of the one image is held out by --holdout 1e-12"),
    ):
        with pytest.raises(error, match=words):
            Part(open_sources([str(one)], CACHE), fraction, held_out).scan()
        with pytest.raises(error, match="none of the 60 images"):
            Part(open_sources([str(digits)], CACHE), fraction, held_out).scan()
