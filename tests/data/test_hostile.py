"""Hostile files, from scraped folders or attackers: none stops a run, and each one is used or reported."""

import base64
import gzip
import io
import os
import re
import socket
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_cli.config import DataConfig
from ddpm_cli.data import images, pack
from ddpm_cli.data.pack import Pack, open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.data.survey import survey
from ddpm_cli.errors import DataError
from ddpm_cli.text import printable
from processes import GUARD

Image.init()

SIDE = 8  # pixels; most images have this side, so that a pack has their exact pixels
COLOUR = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GRAY = COLOUR[:, :, 0]
RGB = Image.fromarray(COLOUR)
INDEXED = RGB.quantize(16)
SIX_COLOURS = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 6
BOMB = zlib.compress(bytes(2**26), 9)  # 64 MiB in 64 KiB


def encoded(kind: str, image: Image.Image = RGB, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """The pixels that Pillow decodes, for lossy formats."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    pixels: np.ndarray = GRAY,
    *more: bytes,
    colour: int = 0,
    depth: int = 8,
    size: tuple[int, int] = (SIDE, SIDE),
    data: bytes | None = None,
) -> bytes:
    """A handmade PNG with `more` chunks between its header and its pixels, which are `pixels` or the raw `data`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    if data is None:
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def flip(data: bytes, at: int) -> bytes:
    """The data with one bit flipped."""
    copy = bytearray(data)
    copy[at] ^= 1
    return bytes(copy)


def ifd(*tags: tuple[int, int, int, int], then: int = 0) -> bytes:
    """A TIFF's header and first directory. tags: (tag, type, count, value). then: the next directory's offset."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", then)


def tiff(then: int = 0, **changed: int) -> bytes:
    """A handmade TIFF of GRAY."""
    tags = {"width": (256, SIDE), "height": (257, SIDE), "bits": (258, 8), "compression": (259, 1)}
    tags |= {"photometric": (262, 1), "start": (273, 200), "samples": (277, 1), "rows": (278, SIDE), "bytes": (279, 64)}
    fields = ((tag, 4, 1, changed.get(name, value)) for name, (tag, value) in tags.items())
    return ifd(*fields, then=then).ljust(200, b"\0") + GRAY.tobytes()


def gif(size: tuple[int, int] = (SIDE, SIDE), frame: tuple[int, ...] = (), lzw: bytes = b"") -> bytes:
    """A handmade GIF, black and white: a canvas, and a frame (left, top, width, height) in it."""
    canvas = b"GIF89a" + struct.pack("<HHBBB", *size, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return canvas + (b"," + struct.pack("<HHHHB", *frame, 0) + lzw if frame else b"") + b";"


def bmp(header: int = 40, width: int = SIDE, height: int = SIDE, bits: int = 24, packing: int = 0) -> bytes:
    """A handmade BMP of COLOUR: its rows are upside down, and blue comes first."""
    body = (COLOUR[::-1] if height > 0 else COLOUR)[:, :, ::-1].tobytes()
    start = b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54)
    fields = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, packing, len(body), 0, 0, 0, 0)
    return start + fields + body


JPEG = encoded("JPEG", quality=95)
PROGRESSIVE = encoded("JPEG", progressive=True)
WEBP = encoded("WEBP", lossless=True)
TIFF = encoded("TIFF")
PNG = encoded("PNG")
SCAN = JPEG.index(b"\xff\xda") + 14  # where the pixels of JPEG begin
KINDS = {
    "png": PNG,
    "jpg": JPEG,
    "progressive.jpeg": PROGRESSIVE,
    "gif": encoded("GIF", INDEXED),
    "webp": WEBP,
    "bmp": encoded("BMP"),
    "tif": TIFF,
    "lzw.tiff": encoded("TIFF", compression="tiff_lzw"),
    "ppm": encoded("PPM"),
} | ({"avif": encoded("AVIF")} if "AVIF" in Image.SAVE else {})


def with_segment(marker: int, data: bytes) -> bytes:
    """JPEG with an additional segment of metadata."""
    return JPEG[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + JPEG[2:]


def with_exif(*tags: tuple[int, int, int, int]) -> bytes:
    return with_segment(0xE1, b"Exif\0\0" + ifd(*tags))


def changed(data: bytes, marker: bytes, at: int, new: bytes) -> bytes:
    """The data with other bytes at an offset from a marker."""
    start = data.index(marker) + at
    return data[:start] + new + data[start + len(new) :]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", PNG)
    return buffer.getvalue()


ORIENTATION = 0x0112
PALETTE = chunk(b"PLTE", bytes(range(18)))

# Files without an image, or with a damaged one.
BAD: dict[str, bytes] = {
    # not images
    "empty.png": b"",
    "one byte.jpg": b"\x89",
    "zeros.png": bytes(2**20),
    "noise.jpg": Random(0).randbytes(2**16),
    "error 404.jpg": b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n",
    "text.png": b"Image removed.\n",
    "json.webp": b'{"error": "rate limited", "retry_after": 3600}',
    "lfs pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
    "base64.jpg": b"data:image/jpeg;base64," + base64.b64encode(JPEG),
    "http.png": b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n" + PNG,
    "gzip.png": gzip.compress(PNG, mtime=0),
    "zip.png": zipped(),
    "pdf.jpg": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
    "svg.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "xml bomb.png": b'<!DOCTYPE x [<!ENTITY a "&b;&b;"><!ENTITY b "&a;&a;">]><svg>&a;</svg>',
    "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
    "video.gif": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(64),
    "jxl.jpg": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64),
    "elf.png": b"\x7fELF\2\1\1" + bytes(121),
    "exe.jpg": b"MZ\x90\0" + bytes(124),
    "pickle.png": b"\x80\4\x8c\5posix\x8c\6system\x93\x8c\4true\x85R.",
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n",
    "psd.png": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, SIDE, SIDE, 8, 3),
    "ico.png": b"\0\0\1\0\1\0\x08\x08\0\0\1\0\x20\0" + struct.pack("<II", 2**31, 2**31),
    "hdf5.tif": b"\x89HDF\r\n\x1a\n" + bytes(504),
    # PNG
    "unix2dos.png": PNG.replace(b"\n", b"\r\n"),
    "read as utf-8.png": PNG.decode("utf-8", "replace").encode(),
    "newline first.png": b"\n" + PNG,
    "header crc.png": flip(PNG, 30),
    "no width.png": png(size=(0, SIDE)),
    "no header.png": PNG[:8] + PNG[33:],
    "no pixels.png": PNG[:33] + chunk(b"IEND", b""),
    "no palette.png": png(SIX_COLOURS, colour=3),
    "empty palette.png": png(SIX_COLOURS, chunk(b"PLTE", b""), colour=3),
    "depth 3.png": png(depth=3),
    "colour 5.png": png(colour=5),
    "filter 9.png": png(data=zlib.compress((b"\x09" + bytes(SIDE)) * SIDE)),
    "garbage.png": png(data=b"this is not what zlib packs"),
    "adler.png": png(data=flip(zlib.compress((b"\0" + bytes(SIDE)) * SIDE), -1)),
    "short.png": png(data=zlib.compress(bytes((SIDE + 1) * SIDE - 3))),
    "50000 x 50000.png": png(size=(50_000, 50_000)),
    "2 to the 31.png": png(size=(2**31 - 1, 2**31 - 1)),
    "bomb in iCCP.png": png(GRAY, chunk(b"iCCP", b"x\0\0" + BOMB)),
    "bomb in zTXt.png": png(GRAY, chunk(b"zTXt", b"x\0\0" + BOMB)),
    "bomb in iTXt.png": png(GRAY, chunk(b"iTXt", b"x\0\1\0\0\0" + BOMB)),
    "transparency cut.png": png(GRAY, chunk(b"tRNS", b"\0")),
    # JPEG
    "0 x 0.jpg": changed(JPEG, b"\xff\xc0", 5, bytes(4)),
    "65535 x 65535.jpg": changed(JPEG, b"\xff\xc0", 5, b"\xff" * 4),
    "7 components.jpg": changed(JPEG, b"\xff\xc0", 9, b"\7"),
    "12 bits.jpg": changed(JPEG, b"\xff\xc0", 4, b"\x0c"),
    "huffman.jpg": changed(JPEG, b"\xff\xc4", 5, b"\xff" * 16),
    "no tables.jpg": JPEG.replace(b"\xff\xdb", b"\xff\xfe"),
    "no scan.jpg": JPEG[: SCAN - 14] + b"\xff\xd9",
    "segment of nothing.jpg": b"\xff\xd8\xff\xe0\0\0JFIF",
    "padding.jpg": b"\xff\xd8" + b"\xff" * 2**16,
    # GIF
    "no frames.gif": gif(),
    "frame far outside.gif": gif(frame=(60_000, 60_000, SIDE, SIDE), lzw=b"\2\2\x44\1\0"),
    "frame of 65535.gif": gif((1, 1), frame=(0, 0, 65_535, 65_535), lzw=b"\2\2\x44\1\0"),
    "frame of nothing.gif": gif(frame=(0, 0, 0, 0), lzw=b"\2\2\x44\1\0"),
    "lzw of 13 bits.gif": gif(frame=(0, 0, SIDE, SIDE), lzw=b"\x0d\2\x44\1\0"),
    "lzw garbage.gif": gif(frame=(0, 0, SIDE, SIDE), lzw=b"\2\x08" + b"\xff" * 8 + b"\0"),
    "lzw empty.gif": gif(frame=(0, 0, SIDE, SIDE), lzw=b"\2\0"),
    # BMP
    "width below 0.bmp": bmp(width=-SIDE),
    "height of -2 to the 31.bmp": bmp(height=-(2**31)),
    "huge header.bmp": bmp(header=2**32 - 1),
    "7 bytes of header.bmp": bmp(header=7),
    "7 bits.bmp": bmp(bits=7),
    "packed somehow.bmp": bmp(packing=99),
    # TIFF
    "directory beyond the end.tif": b"II*\0" + struct.pack("<I", 2**31) + bytes(100),
    "directory beyond any disk.tif": b"II+\0" + struct.pack("<HHQ", 8, 0, 2**62) + bytes(100),
    "pixels beyond the end.tif": tiff(start=2**31),
    "3 bits.tif": tiff(bits=3),
    "12 bits.tif": tiff(bits=12),
    "200 samples.tif": tiff(samples=200),
    "2 to the 32 pixels wide.tif": tiff(width=2**32 - 1, height=2**32 - 1),
    "0 pixels high.tif": tiff(height=0),
    "deflated garbage.tif": tiff(compression=8),
    "packed somehow.tif": tiff(compression=34_925),
    "floating point.tif": encoded("TIFF", Image.new("F", (SIDE, SIDE), 0.5)),
    # WebP
    "length too large.webp": WEBP[:4] + struct.pack("<I", 2**31) + WEBP[8:],
    "length too small.webp": WEBP[:4] + struct.pack("<I", 16) + WEBP[8:],
    "canvas of 16M.webp": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6,
    # PNM
    "absurd.ppm": b"P6\n99999999999999999999 1\n255\n\0\0\0",
    "below 0.ppm": b"P6\n-8 8\n255\n" + bytes(192),
    "maxval 0.pgm": b"P5\n8 8\n0\n" + bytes(64),
    "neither black nor white.pbm": b"P1\n4 2\n1 0 2 0 0 1 0 1\n",
    "float.ppm": b"Pf\n1 1\n-1.0\n" + bytes(4),
    "comment without end.ppm": b"P6\n#" + b"a" * 2**16,
}
# A name with line breaks, one that is not valid in any encoding, and one of the maximum length.
BAD |= dict.fromkeys(("a\nb.png: fine\x1b[2J\u202e.png", "��.jpg", "n" * 251 + ".png"), b"x")
BAD |= {f"{kind} begins.{kind.rpartition('.')[2]}": data[:12] for kind, data in KINDS.items()}
BAD |= {
    f"{part} percent.{kind}": data[: len(data) * part // 100] for kind, data in KINDS.items() for part in (25, 60, 90)
}

ON_WHITE = np.where((SIX_COLOURS == 1)[:, :, None], 255, np.arange(18, dtype=np.uint8).reshape(6, 3)[SIX_COLOURS])
DEEP = GRAY.astype(">u2") * 257
CMYK = encoded("JPEG", RGB.convert("CMYK"))
TURNED = with_exif((ORIENTATION, 3, 1, 6))
OTHER = Image.fromarray(COLOUR[::-1, ::-1])
MASK = Image.fromarray(np.where(GRAY > 99, 255, 0).astype(np.uint8))
FADED = Image.merge("LA", (Image.fromarray(GRAY), MASK))

# Unusual files that are images, with the pixels that training should get.
GOOD: dict[str, tuple[bytes, np.ndarray]] = {
    "plain.png": (PNG, COLOUR),
    "LOUD.PNG": (PNG, COLOUR),
    "a png.jpg": (PNG, COLOUR),
    "a jpeg.png": (JPEG, decoded(JPEG)),
    "a webp.gif": (WEBP, COLOUR),
    "a jpeg 2000.jpg": (encoded("JPEG2000", num_resolutions=1), COLOUR),
    "good\n\x1b[31m\u202e.png": (PNG, COLOUR),
    "\udcfc\udce4.png": (PNG, COLOUR),
    "g" * 251 + ".png": (PNG, COLOUR),
    "16 bits.png": (png(DEEP, depth=16), GRAY),
    "16 bits, one transparent.png": (
        png(DEEP, chunk(b"tRNS", struct.pack(">H", GRAY[0, 0])), depth=16),
        GRAY,
    ),
    "16 bits, one transparent indeed.png": (
        png(DEEP, chunk(b"tRNS", struct.pack(">H", DEEP[0, 0])), depth=16),
        np.where(GRAY[0, 0] == GRAY, 255, GRAY),
    ),
    "16 bits.tif": (encoded("TIFF", Image.fromarray(DEEP.astype("<u2"))), GRAY),
    "palette.png": (png(SIX_COLOURS, PALETTE, chunk(b"tRNS", b"\xff\0"), colour=3), ON_WHITE),
    "gray and alpha.png": (encoded("PNG", FADED), np.where(GRAY > 99, GRAY, 255)),
    "one pixel.png": (encoded("PNG", Image.new("RGB", (1, 1), "teal")), np.full((SIDE, SIDE, 3), (0, 128, 128))),
    "stripe.png": (encoded("PNG", Image.new("RGB", (1, 5000), "teal")), np.full((SIDE, SIDE, 3), (0, 128, 128))),
    "cmyk.jpg": (CMYK, decoded(CMYK)),
    "progressive.jpg": (PROGRESSIVE, decoded(PROGRESSIVE)),
    "turned.jpg": (TURNED, np.rot90(decoded(JPEG), -1)),
    "turned, with a width in words.jpg": (
        with_exif((256, 2, 4, 0x636261), (ORIENTATION, 3, 1, 6)),
        np.rot90(decoded(JPEG), -1),
    ),
    "orientation 99.jpg": (with_exif((ORIENTATION, 3, 1, 99)), decoded(JPEG)),
    "orientation in words.jpg": (with_exif((ORIENTATION, 2, 4, 0x636261)), decoded(JPEG)),
    "orientation of a billion.jpg": (with_exif((ORIENTATION, 3, 10**9, 8)), decoded(JPEG)),
    "exif beyond the end.jpg": (with_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), decoded(JPEG)),
    "exif garbage.jpg": (with_segment(0xE1, b"Exif\0\0garbage"), decoded(JPEG)),
    "exif garbage.png": (png(GRAY, chunk(b"eXIf", b"garbage")), GRAY),
    "exif garbage.webp": (encoded("WEBP", lossless=True, exif=b"Exif\0\0garbage"), COLOUR),
    "profile garbage.jpg": (with_segment(0xE2, b"ICC_PROFILE\0\1\1garbage"), decoded(JPEG)),
    "profile garbage.png": (png(GRAY, chunk(b"iCCP", b"x\0\0garbage")), GRAY),
    "photoshop garbage.jpg": (with_segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\xff\xff\xff\xff"), decoded(JPEG)),
    "animated.gif": (encoded("GIF", save_all=True, append_images=[OTHER]), decoded(encoded("GIF"))),
    "animated.webp": (encoded("WEBP", lossless=True, save_all=True, append_images=[OTHER]), COLOUR),
    "animation garbage.png": (png(GRAY, chunk(b"acTL", b"\xff" * 8)), GRAY),
    "and more.png": (PNG + b"trailing garbage", COLOUR),
    "and more.jpg": (JPEG + zipped(), decoded(JPEG)),
    "two.jpg": (JPEG + PROGRESSIVE, decoded(JPEG)),
    "no end.png": (PNG[:-12], COLOUR),  # all pixels and their check sum are correct
    "pixels' crc.png": (flip(png(), -13), GRAY),
    "top down.bmp": (bmp(height=-SIDE), COLOUR),
    "by hand.tif": (tiff(), GRAY),
    "directories in a circle.tif": (tiff(then=8), GRAY),
    "text.pbm": (b"P1\n# by hand\n8 8\n" + b"01101001" * 8, np.tile(255 * (np.array([*b"01101001"]) == 48), (8, 1))),
    "folder.png/inside.png": (PNG, COLOUR),
}


def as_batch(good: dict[str, np.ndarray]) -> torch.Tensor:
    """(N, 3, 8, 8) uint8, in the order of a source."""
    shown = (np.broadcast_to(np.atleast_3d(good[name]), (SIDE, SIDE, 3)) for name in sorted(good))
    return torch.from_numpy(np.stack([pixels.astype(np.uint8) for pixels in shown])).permute(0, 3, 1, 2)


EVERY_GOOD = {name: pixels for name, (_, pixels) in GOOD.items()} | {"link to a good one.jpg": COLOUR}
FILES = BAD | {name: data for name, (data, _) in GOOD.items()}
NO_FILES = ("gone.png", "self.png", "pipe.png", "socket.jpg", "zero.png", "null.gif", "memory.bmp", "sparse.tif")
EVERY_BAD = (*BAD, *NO_FILES, "locked.png")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """All files above, and things that no archive can hold."""
    folder = tmp_path_factory.mktemp("hostile") / "images"
    (folder / "folder.png").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "locked.png").write_bytes(b"root may read it, and finds no image")
    (folder / "locked.png").chmod(0)
    with (folder / "sparse.tif").open("wb") as file:
        file.truncate(5 * 2**30)
    os.mkfifo(folder / "pipe.png")
    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as listener:
        patch.chdir(folder)  # a socket's path must be short
        listener.bind("socket.jpg")
    links = {"link to a good one.jpg": "plain.png", "gone.png": "nowhere.png", "self.png": "self.png"}
    links |= {"zero.png": "/dev/zero", "null.gif": "/dev/null", "memory.bmp": "/proc/self/mem"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "around").symlink_to(folder)
    return folder


def pack_of(path: Path, **settings: object) -> Pack:
    config = DataConfig(images=str(path), **({"size": SIDE, "channels": 3} | settings))
    return open_pack(open_source(path, Path("cache")), config, Path("cache"))


def assert_left_out(lines: list[str], names: Iterable[str]) -> None:
    """lines: `name: reason`. A name may contain a colon."""
    expected = [f"{printable(name)}: " for name in sorted(names)]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert all(line[len(start) :].strip() for line, start in zip(lines, expected, strict=True))


def assert_holds(pack: Pack, good: dict[str, np.ndarray], bad: Iterable[str]) -> None:
    """Exactly the pixels of the good files, and the names of the bad ones."""
    assert_left_out([f"{name}: {reason}" for name, reason in pack.left_out], bad)
    expected, found = as_batch(good), pack[torch.arange(len(pack))]
    assert len(pack) == len(good)
    assert [name for name, a, b in zip(sorted(good), found, expected, strict=True) if not torch.equal(a, b)] == []


def test_the_corpus_is_large():
    assert len(EVERY_BAD) >= 45
    assert not EVERY_GOOD.keys() & set(EVERY_BAD)


def test_a_run_trains_on_good_files_and_names_the_others(ddpm, corpus, tmp_path):
    """It shows no warnings of Pillow. It does not run PostScript: this program would not end."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    (tmp_path / "bin/gs").chmod(0o755)
    options = ["--steps", 2, "--preset", "tiny", "--size", SIDE, "--batch-size", 4, "-o", "run"]
    done = ddpm("train", corpus, *options, env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    shown = done.stderr.decode()
    assert (done.returncode, done.stdout) == (0, b"run\n"), shown
    assert not re.search(r"Traceback|Warning|More samples per pixel|\x1b\[2J|\u202e", shown)
    assert f"{len(EVERY_GOOD)} in {corpus}, {len(EVERY_BAD)} left out" in shown
    assert not Path("ran").exists()
    assert_left_out(Path("run/left_out.txt").read_text().splitlines(), EVERY_BAD)
    (folder,) = Path("cache/packs").iterdir()
    assert_holds(Pack(folder, (3, SIDE, SIDE)), EVERY_GOOD, EVERY_BAD)


def test_strict_refuses(cli, corpus):
    code, out, err = cli("train", corpus, "--steps", 2, "--preset", "tiny", "--size", SIDE, "--strict")
    assert (code, out) == (1, "")
    assert f"Error: --strict: {len(EVERY_BAD)} images cannot be used" in err
    assert f"\n  {printable(min(EVERY_BAD))}: " in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_damaged_files_are_not_tried_at_every_start(corpus):
    """Only files that the disk failed to read are tried again. Pillow may report damaged files like them."""
    first = pack_of(corpus)
    assert set(first.unread) <= {"gone.png", "self.png", "locked.png"}
    made = (first.folder / "index.json").stat().st_ino
    assert (pack_of(corpus).folder / "index.json").stat().st_ino == made


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "empty.png": "is empty",
        "error 404.jpg": "not an image in a supported format",
        "postscript.jpg": "not an image in a supported format",
        "no palette.png": "has no palette",
        "empty palette.png": "has no palette",
        "25 percent.png": "truncated",
        "90 percent.jpg": "truncated",
        "50000 x 50000.png": "exceeds limit",
        "bomb in zTXt.png": "too large",
        "directory beyond any disk.tif": "an image",
        "floating point.tif": "floating point",
        "gone.png": "no such file",
        "self.png": "cannot be read",
        "pipe.png": "not a file but",
        "socket.jpg": "not a file but",
        "zero.png": "not a file but",
        "null.gif": "not a file but",
        "sparse.tif": "too large for an image (5.0 GiB)",
    }.items(),
)
def test_reasons(reasons, name, reason):
    assert reason in reasons[name]


@pytest.fixture(scope="module")
def reasons(corpus, tmp_path_factory) -> dict[str, str]:
    """Why each file was left out. These settings are gray and padded."""
    config = DataConfig(images="", size=SIDE, channels=1, fit="pad")
    cache = tmp_path_factory.mktemp("cache")
    pack = open_pack(open_source(corpus, cache), config, cache)
    assert len(pack) == len(EVERY_GOOD)
    return dict(pack.left_out)


def test_survey(corpus):
    found = survey(open_source(corpus, Path("cache")))
    assert found.files == len(EVERY_GOOD) + len(EVERY_BAD)
    assert len(EVERY_GOOD) <= found.readable < found.files
    assert (found.channels, found.median_side) == (3, SIDE)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_of_hostile_files(kind):
    """All files whose names an archive can hold."""
    files = {name: data for name, data in FILES.items() if name.isascii()}
    if kind == "zip":
        with zipfile.ZipFile("all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open("all.tar", "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    good = {name: pixels for name, (_, pixels) in GOOD.items() if name in files}
    assert_holds(pack_of(Path(f"all.{kind}")), good, files.keys() - good.keys())


@pytest.mark.filterwarnings("ignore")
def test_the_error_for_a_single_file_names_it():
    """`ddpm noise` shows it."""
    for name, data in BAD.items():
        with pytest.raises(DataError, match=f"^{re.escape(name)}: ."):
            images.decode(data, name)


def test_large_images_are_not_decoded_all_at_once(monkeypatch):
    """Files of some kilobytes may decode to gigabytes each, and many cores would decode many of them."""
    load, alone, all_there = images.load, threading.Lock(), threading.Barrier(8)

    def by_itself(*args: object) -> Image.Image:
        assert alone.acquire(blocking=False)
        try:
            return load(*args)
        finally:
            alone.release()

    def together(*args: object) -> Image.Image:
        all_there.wait(timeout=GUARD)
        return load(*args)

    Path("large").mkdir()
    for i in range(8):
        Path(f"large/{i}.png").write_bytes(PNG)
    monkeypatch.setattr("ddpm_cli.data.work.usable_cpus", lambda: 8)
    one = SIDE * SIDE * 2 * pack._PIXEL_BYTES  # bytes of free memory that one image takes up
    for free, how, background in ((2 * one - 1, by_itself, "white"), (8 * one, together, "black")):
        monkeypatch.setattr("ddpm_cli.data.pack.free_memory", lambda free=free: free)
        monkeypatch.setattr("ddpm_cli.data.images.load", how)
        assert len(pack_of(Path("large"), background=background)) == 8
