"""Folders, archives, lists: the same images, wherever they come from."""

import bz2
import gzip
import inspect
import io
import lzma
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_cli.config import DataConfig
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import Listed, list_bytes, name_of, open_source, open_sources
from ddpm_cli.data.sources.hub_dataset import parse_address
from ddpm_cli.data.sources.lists import parse_list
from ddpm_cli.data.survey import survey
from ddpm_cli.data.work import in_threads
from ddpm_cli.errors import DataError
from ddpm_cli.text import printable


def source_of(path):
    source = open_source(path, Path("cache"))
    source.scan()
    return source


def pack_of(path, **settings):
    config = DataConfig(images=str(path), **({"size": 28, "channels": 1} | settings))
    return open_pack(open_source(path, Path("cache")), config, Path("cache"))


def png(gray: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (28, 28), gray).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tar(digits, tmp_path) -> Path:
    with tarfile.open(tmp_path / "digits.tar", "w") as archive:
        archive.add(digits, ".")
    return tmp_path / "digits.tar"


def test_all_kinds_hold_the_same_images(digits, tar, tmp_path):
    expected = pack_of(digits)
    with zipfile.ZipFile("digits.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in digits.rglob("*.png"):
            archive.write(path, path.relative_to(digits))
    Path("list.txt").write_text("".join(f"{digits / name}\n" for name in source_of(digits).names))
    compressed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    for suffix, compress in compressed.items():
        Path(f"digits.tar{suffix}").write_bytes(compress(tar.read_bytes()))
    shutil.copy("digits.tar.gz", "no suffix")
    kinds = ["digits.zip", "digits.tar", "list.txt", *(f"digits.tar{suffix}" for suffix in compressed)]
    for kind in [*kinds, "no suffix"]:
        pack = pack_of(kind)
        assert (len(pack), pack.fingerprint, pack.left_out) == (60, expected.fingerprint, []), kind
        assert survey(open_source(kind, Path("cache"))) == survey(source_of(digits)), kind
    assert {path.name for path in Path("cache").iterdir()} == {"packs", "locks", "CACHEDIR.TAG"}


def test_threads_read_archives_in_parallel(tar):
    with zipfile.ZipFile("many.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(256):
            archive.writestr(f"{i:03}.png", png(i))
    Path("digits.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    for path in ("many.zip", tar, "digits.tar.gz"):
        source = source_of(path)

        def read(name: str, source=source) -> bytes:
            with source.open(name) as file:
                return file.read()

        assert list(in_threads(read, source.names)) == [read(name) for name in source.names]


@pytest.mark.parametrize("kind", ["folder", "folder.tar", "folder.zip", "list.txt"])
def test_the_key_changes_when_a_file_does(kind, digits):
    def make() -> str:
        if kind == "folder.zip":
            shutil.make_archive("folder", "zip", "folder")
        elif kind == "folder.tar":
            shutil.make_archive("folder", "tar", "folder")
        elif kind == "list.txt":
            Path(kind).write_text("".join(f"{path}\n" for path in sorted(Path("folder").rglob("*.png"))))
        return open_source(kind, Path("cache")).key

    shutil.copytree(digits, "folder")
    one = next(Path("folder").rglob("*.png"))
    keys = [make()]
    if kind != "folder.tar":
        assert make() == keys[0]
    one.write_bytes(png(3))
    keys.append(make())
    one.rename(one.with_name("renamed.png"))
    keys.append(make())
    one.with_name("renamed.png").unlink()
    keys.append(make())
    assert len(set(keys)) == 4


def test_a_tar_with_a_pack_is_not_unpacked(tar, monkeypatch):
    Path("digits.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    assert len(pack_of("digits.tar.gz")) == 60
    monkeypatch.setattr("ddpm_cli.data.sources.archives.Tar.scan", lambda *args: pytest.fail("it was read"))
    assert len(pack_of("digits.tar.gz")) == 60


def test_members_of_a_tar(digits):
    def add(archive, name, data=b"", **fields):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in fields.items():
            setattr(info, key, value)
        archive.addfile(info, io.BytesIO(data))

    with tarfile.open("odd.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a/old.png", b"replaced below")
        add(archive, "./a/old.png", png(9))
        add(archive, "a/" + "long" * 80 + ".png", png(1))
        add(archive, "a/hard.png", type=tarfile.LNKTYPE, linkname="./a/old.png")
        add(archive, "a/soft.png", type=tarfile.SYMTYPE, linkname="../a/old.png")
        add(archive, "a/lost.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "a/pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "a/disk.png", type=tarfile.BLKTYPE)
        add(archive, "a/folder.png", type=tarfile.DIRTYPE)
        add(archive, "a/empty.png")
        add(archive, "a/.hidden.png", png())
        add(archive, "__MACOSX/a.png", png())
        add(archive, "a/text.txt", b"no image")
    Path("odd.tar.xz").write_bytes(lzma.compress(Path("odd.tar").read_bytes()))
    for name in ("odd.tar", "odd.tar.xz"):
        pack = pack_of(name)
        assert len(pack) == 4
        left_out = dict(pack.left_out)
        assert left_out.keys() == {"a/lost.png", "a/pipe.png", "a/disk.png", "a/empty.png"}
        assert "link" in left_out["a/lost.png"]
        assert left_out["a/empty.png"] == "is empty"


def test_truncated_archives(digits, tar):
    """Images before the damage are used, and the damage is reported."""
    whole = tar.read_bytes()
    cuts = {"header.tar": whole[: 40 * 1024 + 100], "noise.tar": whole[: 40 * 1024] + b"\xff" * 4096}
    cuts |= {"half.tar.gz": (packed := gzip.compress(whole))[: len(packed) // 2]}
    cuts |= {"half.tar.xz": (packed := lzma.compress(whole))[: len(packed) // 2]}
    for name, data in cuts.items():
        Path(name).write_bytes(data)
        pack = pack_of(name)
        assert 0 < len(pack) < 60, name
        assert any("damaged" in reason or "truncated" in reason for _, reason in pack.left_out), name


def test_damaged_members_of_a_zip(tmp_path):
    with zipfile.ZipFile("a.zip", "w") as archive:
        for name in ("crypt.png", "good.png", "moved.png", "huge.png", "crc.png"):
            archive.writestr(name, png())
    raw = bytearray(Path("a.zip").read_bytes())

    def directory(name: bytes) -> int:  # the start of the entry in the archive's directory
        return raw.rindex(name) - 46

    raw[directory(b"crypt.png") + 8] |= 1
    raw[directory(b"moved.png") + 42] ^= 0xFF
    raw[directory(b"huge.png") + 24 : directory(b"huge.png") + 28] = b"\xff\xff\xff\x7f"
    raw[directory(b"crc.png") + 16] ^= 0xFF
    Path("a.zip").write_bytes(raw)
    pack = pack_of("a.zip")
    assert len(pack) == 1
    left_out = dict(pack.left_out)
    assert "encrypted" in left_out["crypt.png"]
    assert "offset" in left_out["moved.png"]
    assert left_out["huge.png"] == "too large for an image (2.0 GiB)"
    assert "CRC" in left_out["crc.png"]


def test_a_list(digits, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(digits, folder / "images")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    (folder / "images" / "no suffix").write_bytes(png())
    lines = ["\ufeff# chosen by hand", "", names[0], f"  {names[1]}\r", str(folder / names[2]), names[0]]
    lines += ["images/no suffix", "images/gone.png", "images", "a\x00b.png"[:1] + ".png"]
    (folder / "some.lst").write_text("\n".join(lines), encoding="utf-8")
    pack = pack_of(folder / "some.lst")
    assert len(pack) == 5  # a file that is listed twice is used twice
    assert dict(pack.left_out) == {
        "images/gone.png": "no such file",
        "images": "not a file but a folder, pipe or device",
        "a.png": "no such file",
    }


def test_files_that_are_not_lists():
    for name, text in {"prose.txt": "Dear reader,\nthere are no paths here.", "none.txt": "# nothing\n"}.items():
        Path(name).write_text(text)
        with pytest.raises(DataError, match=f"{name}: none of the"):
            open_source(name, Path("cache"))
    Path("cut.tar.gz").write_bytes(gzip.compress(bytes(1000))[:15])
    for path in ("cut.tar.gz", "/dev/zero"):
        with pytest.raises(DataError, match="not a folder"):
            open_source(path, Path("cache"))


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        (b"", []),
        (b"a.png\nb.png", ["a.png", "b.png"]),
        ("\ufeff# by hand\r\n\r\n  a b.png \rb.png\r\n".encode(), ["a b.png", "b.png"]),
        ("a\u2028b\x0bc\x85.png\n".encode(), ["a\u2028b\x0bc\x85.png"]),
        (b"\xff.png\n", ["\udcff.png"]),
        (b"./a\n.png\0 b.png\0#c.png\0\xff.png\0", ["./a\n.png", " b.png", "#c.png", "\udcff.png"]),
    ],
)
def test_parse_list(data, paths):
    assert parse_list(data) == paths
    assert parse_list(list_bytes(paths)) == paths


def test_a_list_with_nuls(digits):
    """find -print0 writes it. Other files with NULs are not taken for lists."""
    files = sorted(digits.rglob("*.png"))[:3]
    names = [f"{i}\n {i}.png" for i in range(3)]
    for name, path in zip(names, files, strict=True):
        shutil.copy(path, name)
    Path("list").write_bytes(b"".join(name.encode() + b"\0" for name in names))
    assert list(source_of("list").names) == names
    assert len(pack_of("list")) == 3
    for data in (b"gone.png\0" * 9, b"\0", b"a\0\0b", b"n" * 9999 + b"\0", bytes(range(256))):
        Path("binary").write_bytes(data)
        with pytest.raises(DataError, match="binary: not a folder"):
            open_source("binary", Path("cache"))


def test_an_image_is_an_image_whatever_its_name():
    for name in ("a.png", "A.JPG", "no suffix", "notes.txt"):
        Path(name).write_bytes(png(7))
        source = source_of(name)
        assert (list(source.names), source.addresses) == ([name], (str(Path(name).resolve()),))
        assert len(pack_of(name)) == 1
    Path("bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of its 1 image files can be read, for example bad\.png: not an image"):
        survey(source_of("bad.png"))


def combined(*paths: str | Path, **settings):
    config = DataConfig(images="", **({"size": 28, "channels": 1} | settings))
    source = open_sources([str(path) for path in paths], Path("cache"))
    return source, open_pack(source, config, Path("cache"))


def grays(pack) -> list[int]:
    return pack[torch.arange(len(pack))][:, 0, 0, 0].tolist()


@pytest.fixture
def kinds() -> list[str]:
    """A source of each kind. Image i has gray i. Some sources also have a bad file."""
    Path("folder/sub").mkdir(parents=True)
    Path("folder/0.png").write_bytes(png(0))
    Path("folder/sub/1.png").write_bytes(png(1))
    Path("folder/bad.png").write_bytes(b"x")
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("2.png", png(2))
        archive.writestr("bad.png", b"x")
    with tarfile.open("a.tar", "w") as archive:
        for name, data in (("sub/3.png", png(3)), ("bad.png", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    Path("a.tar.gz").write_bytes(gzip.compress(Path("a.tar").read_bytes()))
    for i in (4, 5, 6):
        Path(f"{i}.png").write_bytes(png(i))
    Path("lists").mkdir()
    Path("lists/a.txt").write_text("../4.png\ngone.png\n")
    return ["folder/", "a.zip", "a.tar", "lists/a.txt", "5.png", "6.png", "a.tar.gz"]


def test_several_sources_are_one(kinds):
    source, pack = combined(*kinds)
    assert grays(pack) == [0, 1, 2, 3, 4, 5, 6, 3]
    assert [name for name, _ in pack.left_out] == [
        *("folder/bad.png", "a.zip/bad.png", "a.tar/bad.png", "lists/a.txt/gone.png", "a.tar.gz/bad.png")
    ]
    names = [source.names[i] for i in range(len(source.names))]
    assert names == list(source.names)
    assert len(set(names)) == 13
    with pytest.raises(IndexError):
        source.names[13]
    assert source.addresses == tuple(str(Path(kind).resolve()) for kind in kinds)
    assert source.path == "folder/ and 5 more"  # the two image files are one source
    found = survey(source)
    assert (found.files, found.readable, found.square_side) == (13, 8, 28)


def test_images_are_in_the_order_of_the_command(kinds):
    orders = [combined(*order)[1] for order in (kinds, kinds[::-1], ["6.png", "folder", "5.png", "a.zip"])]
    assert grays(orders[1]) == [3, 6, 5, 4, 3, 2, 0, 1]
    assert grays(orders[2]) == [6, 0, 1, 5, 2]
    assert len({pack.folder for pack in orders}) == 3
    again = combined(*kinds)[1]
    assert again.folder == orders[0].folder
    Path("folder/0.png").write_bytes(png(9))
    assert grays(combined(*kinds)[1])[0] == 9


def test_images_that_are_named_twice_are_used_twice(kinds):
    assert grays(combined("5.png", "5.png", "6.png")[1]) == [5, 5, 6]
    pack = combined("folder", "folder/sub", "folder/0.png", "folder", "a.zip", "a.zip")[1]
    assert grays(pack) == [0, 1, 1, 0, 0, 1, 2, 2]
    assert len(pack.left_out) == 4


def test_a_file_of_several_sources_that_comes_back_is_used(kinds, digits):
    assert len(combined(digits, "lists/a.txt")[1]) == 61
    Path("lists/gone.png").write_bytes(png())
    assert len(combined(digits, "lists/a.txt")[1]) == 62


def test_the_error_names_the_invalid_one_of_several_sources(kinds):
    Path("empty").mkdir()
    for path, message in {"gone.png": "no such", "empty": "no image files", "s3://a/b": "not a data set"}.items():
        with pytest.raises(DataError, match=f"{path}: {message}"):
            combined("folder", path, "a.zip")


@pytest.mark.parametrize(
    ("paths", "name"),
    {
        ("cats",): "cats",
        ("./a/cats.tar.gz",): "cats",
        ("a/cats/1.png",): "1",
        ("a/cats/1.png", "a/cats/2.JPG", "b/cats/"): "cats",
        ("cats", "dogs.zip"): "cats+dogs",
        ("a", "b", "c.txt"): "a+b+c",
        ("a", "b", "c", "d"): "a+3",
        ("hf://org/name@v1", "cats"): "name+cats",
        ("-",): "list",
        ("-", "cats"): "list+cats",
        ("pipe",): "list",
    }.items(),
)
def test_name_of(paths, name):
    os.mkfifo("pipe")
    assert name_of(paths) == name


def test_a_list_that_was_already_read(digits):
    files = sorted(digits.rglob("*.png"))
    listed = Listed("stdin", [str(path) for path in files], "run/list.txt")
    source = open_sources([listed], Path("cache"))
    assert (source.path, source.addresses, len(source.names)) == ("stdin", ("run/list.txt",), 60)
    Path("list.txt").write_bytes(list_bytes(listed.names))
    assert open_source("list.txt", Path("cache")).key == source.key  # so nothing is decoded again
    with pytest.raises(DataError, match=r"stdin: none of the 1 files that it lists exists, for example /gone\.png"):
        open_sources([Listed("stdin", ["/gone.png"], "")], Path("cache"))


def test_the_hint_for_a_name_on_the_hub():
    for name, hint in {
        "huggan/name": "hf://huggan/name",
        "./cats": "hf://org/name",
        "cats": "hf://org/name",
        "cats/1.png": "hf://org/name",
    }.items():
        with pytest.raises(DataError, match="no such folder or file") as caught:
            open_source(name, Path("cache"))
        assert hint in (caught.value.hint or "")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    """Its path is too long for the system, even for root."""
    Path("images").mkdir()
    Path("images/a.png").write_bytes(png())
    with monkeypatch.context() as patch:
        patch.chdir("images")
        for _ in range(20):
            Path("d" * 250).mkdir()
            patch.chdir("d" * 250)
    pack = pack_of(tmp_path / "images")
    assert len(pack) == 1
    ((name, reason),) = pack.left_out
    assert name.startswith("dddd")
    assert "name too long" in reason


def test_a_folder_that_nobody_may_read(monkeypatch):
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    Path("images").mkdir()
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"images: cannot be read \(Permission denied\)"):
        open_source("images", Path("cache"))


def test_folders_nested_deeper_than_the_stack(monkeypatch):
    Path("images").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("images")
        for _ in range(500):  # fewer than shutil can remove, if this test is killed
            Path("d").mkdir()
            patch.chdir("d")
        Path("a.png").write_bytes(png())
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 400)
    try:
        assert len(pack_of("images")) == 1
    finally:
        sys.setrecursionlimit(usual)


def test_names_are_printable():
    assert printable("a\nb\x1b[31m\udcff é 猫 \u2028.png") == r"a\nb\x1b[31m\udcff é 猫 \u2028.png"


def test_addresses_of_data_sets():
    for address, expected in {
        "hf://org/name": ("org/name", None),
        "hf://org/name@v1.0": ("org/name", "v1.0"),
        "hf://datasets/org/name": ("org/name", None),
        "https://huggingface.co/datasets/org/name": ("org/name", None),
        "https://huggingface.co/datasets/org/name/tree/v2/": ("org/name", "v2"),
    }.items():
        assert parse_address(address) == expected
    for address in ("hf://name", "hf://", "s3://bucket/key", "https://huggingface.co/org/name", "hf://a/b/c"):
        with pytest.raises(DataError, match="not a data set"):
            parse_address(address)


def test_without_the_library_datasets(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="need the library datasets") as caught:
        open_source("hf://org/name", Path("cache"))
    assert caught.value.hint == "pip install 'ddpm-cli[datasets]'"
