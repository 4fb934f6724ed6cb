"""The images of an .npz file: those of ddpm sample, and files that are hostile or something else."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_cli.data import pictures
from ddpm_cli.data.npz import Npz
from ddpm_cli.errors import DataError

CACHE = Path("cache")
IMAGES = torch.arange(5 * 3 * 4 * 6, dtype=torch.int64).view(5, 3, 4, 6).to(torch.uint8)


def test_what_ddpm_sample_writes_is_read(tmp_path):
    Path("a.npz").write_bytes(pictures.npz_bytes([IMAGES[:2], IMAGES[2:]], 5))
    npz = Npz(Path("a.npz"), CACHE)
    assert (len(npz), npz.shape) == (5, (3, 4, 6))
    assert npz[torch.tensor([4, 0, 4])].equal(IMAGES[[4, 0, 4]])
    assert not list(CACHE.iterdir())  # the unpacked images have no name


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(save):
    save("a.npz", IMAGES.permute(0, 2, 3, 1).numpy(), np.arange(5))  # classes, as guided-diffusion adds them
    assert Npz(Path("a.npz"), CACHE)[torch.arange(5)].equal(IMAGES)


def packed(array, name="arr_0.npy", **options) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        content = io.BytesIO()
        np.lib.format.write_array(content, array)
        archive.writestr(name, content.getvalue())
    return buffer.getvalue()


def with_header(text: str, pixels: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + pixels)
    return buffer.getvalue()


def damaged() -> bytes:
    data = bytearray(packed(np.zeros((2, 4, 4, 1), np.uint8)))
    data[data.index(b"\x93NUMPY") + 130] ^= 255
    return bytes(data)


GOOD = np.zeros((2, 4, 4, 3), np.uint8)
HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an .npz file"),
        (b"\x89PNG\r\n\x1a\n", "not an .npz file"),
        (packed(GOOD)[:-40], "not an .npz file"),
        (damaged(), "damaged"),
        (packed(GOOD, "images.npy"), "has no arr_0"),
        (packed(GOOD.astype(np.float32)), "float32"),
        (packed(np.array([{}], object)), "object"),
        (packed(np.asfortranarray(np.ones((2, 4, 4, 3), np.uint8))), "Fortran"),
        (packed(GOOD[0]), "(4, 4, 3)"),
        (packed(GOOD[:, :, :, :2]), "(2, 4, 4, 2)"),
        (packed(GOOD[:0]), "(0, 4, 4, 3)"),
        (with_header(HEADER % "(1000000000, 4, 4, 3)"), "does not fit"),
        (with_header(HEADER % "(1, 4, 4, 3)", bytes(49)), "does not fit"),
        (with_header(HEADER % "(-1, 4, 4, 3)", bytes(48)), "shape"),
        (with_header("__import__('os').system('touch hacked')"), "damaged"),
        (with_header("(" * 5000), "damaged"),
    ],
)
def test_other_files_are_refused(data, reason):
    Path("a.npz").write_bytes(data)
    with pytest.raises(DataError) as caught:
        Npz(Path("a.npz"), CACHE)
    assert caught.value.message.startswith("a.npz: ")
    assert reason in caught.value.message
    assert not Path("hacked").exists()


def test_a_missing_file_and_a_folder_are_named():
    for path in (Path("none.npz"), Path()):
        with pytest.raises(DataError, match="cannot be read"):
            Npz(path, CACHE)
