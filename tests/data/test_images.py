"""Image files to tensors and back, and pictures of tensors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_cli.data import images, pictures
from ddpm_cli.errors import DataError, UsageError
from ddpm_cli.files import write_file


def pixels(image: Image.Image, channels: int, background: str = "white") -> torch.Tensor:
    return images.from_pil(images.flatten(image, channels, background))


def test_all_256_values_survive_a_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    x = images.to_float(values)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(images.to_uint8(x), values)
    assert torch.equal(images.to_uint8(torch.tensor([-9.0, 9.0])), torch.tensor([0, 255], dtype=torch.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_tensor_to_picture_and_back(channels):
    image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    assert torch.equal(images.from_pil(images.to_pil(image)), image)
    png = Image.open(io.BytesIO(pictures.picture_bytes(images.to_pil(image))))
    assert torch.equal(images.from_pil(png), image)


def test_modes():
    gray = Image.new("L", (2, 2), 100)
    assert pixels(gray, 3).flatten().tolist() == [100] * 12
    assert pixels(gray.convert("1"), 1).max() <= 255
    assert pixels(Image.new("CMYK", (1, 1), (0, 0, 0, 0)), 3).flatten().tolist() == [255] * 3
    assert pixels(Image.new("RGB", (1, 1), (255, 0, 0)), 1).item() == 76
    palette = Image.new("RGB", (2, 2), (10, 20, 30)).quantize(4)
    assert pixels(palette, 3)[:, 0, 0].tolist() == [10, 20, 30]
    with pytest.raises(DataError, match="floating point"):
        pixels(Image.new("F", (1, 1)), 1)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16)).save(path)
    assert images.from_pil(images.decode(path, "deep.png")).flatten().tolist() == [0, 1, 128, 255]


def test_transparency_shows_the_background(tmp_path):
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert pixels(clear, 3).flatten().tolist() == [255, 255, 255]
    assert pixels(clear, 3, "#102030").flatten().tolist() == [16, 32, 48]
    assert pixels(Image.new("LA", (1, 1), (0, 128)), 1).item() == 127
    palette = Image.new("P", (1, 1), 0)
    palette.save(tmp_path / "clear.png", transparency=0)
    assert pixels(Image.open(tmp_path / "clear.png"), 3, "blue").flatten().tolist() == [0, 0, 255]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # a rotation by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert images.decode(tmp_path / "turned.jpg", "turned.jpg").size == (2, 4)


def test_fit():
    image = Image.new("RGB", (8, 4), "black")
    image.paste("red", (2, 0, 6, 4))
    red = [255, 0, 0]
    assert images.from_pil(images.fit(image, 4)).float().mean((1, 2)).tolist() == pytest.approx(red, abs=1)
    padded = images.from_pil(images.fit(image, 8, "pad", "lime"))
    assert padded[:, 0, 0].tolist() == [0, 255, 0]
    assert padded[:, 4, 4].tolist() == red
    assert images.fit(image, 4, "stretch").size == (4, 4)
    assert images.fit(image.resize((4, 4)), 4).size == (4, 4)


def test_a_file_without_an_image_is_named(tmp_path, photo):
    for data in (b"", b"hello", photo.read_bytes()[:600]):
        with pytest.raises(DataError, match=r"^cat\.png: "):
            images.decode(data, "cat.png")
    with pytest.raises(DataError, match="no such file"):
        images.decode(tmp_path / "none.png", "none.png")
    with pytest.raises(UsageError, match="--background greenish"):
        images.check_background("greenish")


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation(suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    animation = Image.open(io.BytesIO(pictures.animate(frames, suffix)))
    assert animation.n_frames == 3
    animation.seek(2)
    assert animation.convert("RGB").getpixel((4, 4)) == (0, 0, 255)


def test_numpy_reads_the_npz():
    batches = [torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8), torch.randint(256, (1, 3, 4, 5), dtype=torch.uint8)]
    array = np.load(io.BytesIO(pictures.npz_bytes(batches, 3)))["arr_0"]
    assert array.dtype == np.uint8
    assert np.array_equal(array, torch.cat(batches).permute(0, 2, 3, 1).numpy())


def test_files_are_written_whole(tmp_path):
    write_file(tmp_path / "new" / "a.bin", b"1")
    write_file(tmp_path / "new" / "a.bin", b"2")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "new").iterdir()] == [("a.bin", b"2")]
    (tmp_path / "plain").touch()
    assert (tmp_path / "new" / "a.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UsageError, match=r"\.xyz"):
        pictures.picture_bytes(Image.new("L", (1, 1)), ".xyz")
