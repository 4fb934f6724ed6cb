"""Pictures in the terminal: what a terminal is asked, and what is written to it."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from base64 import b64decode
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from conftest import picture
from ddpm_cli.cli import terminal, terminal_pictures
from ddpm_cli.data import pictures

LARGE = {"TERM": "xterm-kitty", "COLUMNS": "1000", "LINES": "1000"}


@pytest.mark.parametrize(
    ("environ", "sixel", "way"),
    [
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, False, "kitty"),
        ({"TERM": "xterm-kitty"}, False, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, False, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, True, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, False, "iterm2"),  # through ssh
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "TMUX": "/tmp/tmux"}, False, "blocks"),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, True, "sixel"),
        ({"TERM": "xterm-256color"}, True, "sixel"),
        ({"TERM": "xterm-256color"}, False, "blocks"),
        ({}, False, "blocks"),
    ],
)
def test_a_terminal_is_known_by_name_or_asked(environ, sixel, way):
    asked = []
    assert terminal.pick_way(environ, lambda: bool(asked.append(1)) or sixel) == way
    assert bool(asked) == (way in ("sixel", "blocks"))


@pytest.mark.parametrize(
    ("parts", "sixel", "reads"),
    [
        ([b"\x1b[?62;4;22c"], True, 1),
        ([b"\x1b[?6", b"2;", b"4c"], True, 3),  # in parts
        ([b"ls\r\x1b[?1;2;4c"], True, 1),  # something was typed before
        ([b"\x1b[?62;22c"], False, 1),
        ([b"\x1b[?4;6c"], False, 1),  # a VT132: the first number is no attribute
        ([b"\x1b[?62;14;42c"], False, 1),
        ([], False, 1),  # it never answers
        ([b"\x1b[?62"], False, 2),  # only half an answer
        ([b"y" * 64] * 1000, False, 4),  # a key that is held down
    ],
)
def test_an_answer_is_read_to_its_end_and_no_further(parts, sixel, reads):
    rest, count = iter(parts), 0

    def read() -> bytes:
        nonlocal count
        count += 1
        return next(rest, b"")

    assert terminal.answers_sixel(read) is sixel
    assert count == reads


ASK = """
import sys, termios
from ddpm_cli.cli.terminal import has_sixel
before = termios.tcgetattr(0)
print(has_sixel(), termios.tcgetattr(0) == before)
"""
IN_THE_BACKGROUND = """
import os
if os.fork():
    os.wait()
    os._exit(0)
os.setpgid(0, 0)
"""


def ask(answer: bytes, foreground: bool = True) -> tuple[str, bytes]:
    """Ask a terminal that answers this to DA1. Returns what the process printed, and what the terminal got."""
    main, other = pty.openpty()

    process = subprocess.Popen(
        [sys.executable, "-c", ASK if foreground else IN_THE_BACKGROUND + ASK],
        stdin=other, stdout=subprocess.PIPE, stderr=other, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(other)
    got = b""
    with contextlib.suppress(OSError):  # the process has ended
        while part := os.read(main, 64):
            got += part
            if answer and got.endswith(b"\x1b[c"):
                os.write(main, answer)
    out = process.communicate()[0].decode()
    os.close(main)
    assert process.returncode == 0
    return out, got


@pytest.mark.parametrize(("answer", "sixel"), [(b"\x1b[?62;4c", True), (b"\x1b[?62c", False), (b"", False)])
def test_a_real_terminal_is_asked_and_left_as_it_was(answer, sixel):
    """The answer is not echoed. One that never answers is not waited for."""
    assert ask(answer) == (f"{sixel} True\n", b"\x1b[c")


def test_a_process_in_the_background_does_not_ask():
    """The system would stop it, as it stops every process in the background that changes the terminal."""
    assert ask(b"\x1b[?62;4c", foreground=False) == ("False True\n", b"")


def test_the_size_of_a_character():
    main, other = pty.openpty()
    assert terminal.cell_size(other) == (8, 16)  # this terminal does not know
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 1000, 600))
    assert terminal.cell_size(other) == (10, 20)
    os.close(main)
    os.close(other)


@pytest.fixture
def colours(photo) -> Image.Image:
    return picture(photo).convert("RGB")


def from_kitty(text: str) -> list[Image.Image]:
    """The pictures in an output."""
    found, data = [], ""
    for keys, part in re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text):
        assert len(part) <= 4096
        assert "q=2" in keys
        assert ("a=T,f=100" in keys) == (not data)
        data += part
        if "m=0" in keys:
            found.append(Image.open(io.BytesIO(b64decode(data))))
            data = ""
    assert not data
    return found


def test_kitty_gets_a_png(colours):
    large = colours.resize((400, 300))
    text = terminal_pictures.kitty(large)
    assert text.count("\x1b_G") > 10
    [found] = from_kitty(text)
    assert (found.size, found.tobytes()) == (large.size, large.tobytes())


def test_iterm2_gets_a_png(colours):
    match = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);width=96px;height=64px:([^\x07]*)\x07", terminal_pictures.iterm2(colours)
    )
    assert match
    data = b64decode(match[2])
    assert len(data) == int(match[1])
    assert Image.open(io.BytesIO(data)).tobytes() == colours.tobytes()


def from_sixel(text: str) -> np.ndarray:
    """(H, W, 3), in percent of each colour; -1 where nothing was drawn."""
    head = re.match(r'\x1bPq"1;1;(\d+);(\d+)', text)
    assert head
    assert text.endswith("\x1b\\")
    width, height = map(int, head.groups())
    pixels = np.full((height + 5, width, 3), -1)
    palette: dict[int, list[int]] = {}
    x = y = 0
    colour: list[int] = []
    for define, use, repeat, bits, move in re.findall(
        r"#(\d+;2;\d+;\d+;\d+)|#(\d+)|(?:!(\d+))?([?-~])|([$-])", text[head.end() : -2]
    ):
        if define:
            number, _, *rgb = map(int, define.split(";"))
            palette[number] = rgb
        elif use:
            colour = palette[int(use)]
        elif move:
            x, y = 0, y + 6 * (move == "-")
        else:
            count = int(repeat or 1)
            for row in range(6):
                if ord(bits) - 63 >> row & 1:
                    pixels[y + row, x : x + count] = colour
            x += count
            assert x <= width
    assert (pixels[height:] == -1).all()
    return pixels[:height]


def test_sixels_are_the_picture(digits, colours):
    """To the percent in which they give colours, and for many colours to the nearest of 256."""
    gray = picture(next(digits.rglob("*.png"))).convert("L")
    flat = Image.new("L", (40, 20), 70)
    for image, worst, mean in [(gray, 0.51, 0.51), (flat, 0.51, 0.51), (colours, 25, 1.5)]:
        percent = np.asarray(image.convert("RGB")) * (100 / 255)
        off = np.abs(from_sixel(terminal_pictures.sixel(image)) - percent)
        assert off.max() <= worst
        assert off.mean() <= mean


def from_blocks(text: str) -> np.ndarray:
    """(H, W, 3) of the half blocks in an output with 24 bits for a colour; -1 where nothing is drawn."""
    rows: list[list[list[int]]] = []
    for line in text.splitlines():
        upper, lower = [], []
        for codes, blocks in re.findall(r"\x1b\[([\d;]+)m(▀+)\x1b\[0m", line):
            colour = [int(code) for code in codes.split(";")]
            assert (colour[:2], colour[5:7]) in (([38, 2], [48, 2]), ([38, 2], []))
            upper += [colour[2:5]] * len(blocks)
            lower += [colour[7:10] or [-1] * 3] * len(blocks)
        if upper:
            rows += [upper, lower]
    return np.array(rows)


def shown(draw: terminal_pictures.Draw, way: terminal.Way, columns: int = 100, lines: int = 50) -> str:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, color_system="truecolor", width=columns, height=lines, soft_wrap=True
    )
    console.print(terminal_pictures.Shown(draw, way, (8, 16)))
    return file.getvalue()


@pytest.mark.parametrize("height", [64, 63])
def test_half_blocks_are_the_picture(colours, height):
    image = colours.crop((0, 0, 96, height))
    found = from_blocks(shown(lambda scale: image, "blocks"))
    assert np.array_equal(found[:height], np.asarray(image))
    assert (found[height:] == -1).all()
    assert len(found) == 64


GRID = partial(pictures.grid, (torch.arange(16 * 64, dtype=torch.int32) % 256).to(torch.uint8).view(16, 1, 8, 8))


def test_half_blocks_are_exact_if_they_fit():
    """Whatever the scale of a file, a character is a pixel of an image. A wider picture is reduced."""
    exact = np.asarray(GRID(1))
    assert np.array_equal(from_blocks(shown(GRID, "blocks"))[..., 0], exact)
    assert from_blocks(shown(GRID, "blocks", columns=30)).shape == (30, 30, 3)
    assert from_blocks(shown(GRID, "blocks", lines=5)).shape == (42, 42, 3)  # taller ones scroll


def test_graphics_are_as_large_as_the_terminal_allows():
    sizes = [from_kitty(shown(GRID, "kitty", *size))[0].size for size in [(100, 50), (40, 50), (100, 12)]]
    assert sizes == [(504, 504), (320, 320), (160, 160)]
    [alone] = from_kitty(shown(lambda scale: pictures.enlarged(GRID(1), 1), "kitty"))
    assert alone.size == (126, 126)  # a small picture is enlarged


class Terminal(io.StringIO):
    """A stream that says that it is a terminal, which is faster than a process in one."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


@pytest.fixture
def on_screen(cli, monkeypatch):
    """Run ddpm in this process, with a terminal as stderr. Returns its exit code, stdout, and what the terminal got."""

    def run(*args: object, **env: str) -> tuple[int, str, str]:
        screen = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", screen)
            for name, value in ({"TERM": "xterm"} | env).items():
                patch.setenv(name, value)
            code, out, _ = cli(*args)
        return code, out, screen.getvalue()

    return run


def test_a_sample_in_a_terminal(in_a_terminal, on_screen, small_model):
    options = ("--n", 5, "--preview", "-o")
    code, seen = in_a_terminal("sample", "-m", small_model, *options, "a.png", TERM="xterm-kitty")
    [found] = from_kitty(seen)
    assert (code, found.tobytes()) == (0, picture("a.png").tobytes())
    assert seen.index("\x1b_G") < seen.index("a.png")
    code, seen = in_a_terminal("sample", "-m", small_model, *options, "b.png", "--scale", 1, COLORTERM="truecolor")
    assert code == 0
    assert np.array_equal(from_blocks(seen)[..., 0], np.asarray(picture("b.png")))
    for output in ("x.npz", "x/"):
        seen = on_screen("sample", "-m", small_model, *options, output, **LARGE)[2]
        assert from_kitty(seen)[0].tobytes() == picture("a.png").tobytes()


def test_a_narrow_terminal_shortens_the_bar_and_not_the_numbers(on_screen, digits, quick_model):
    run = ("train", digits, "--from", quick_model, "--batch-size", 4, "--steps", 20, "--sample-every", 99)
    code, _, seen = on_screen(*run, COLUMNS="57")
    bars = [bar for bar in re.sub(r"\x1b\[[0-9;]*m", "", seen).split("\x1b[2K") if bar.startswith("training")]
    assert (code, any("/20" in bar for bar in bars)) == (0, True), seen
    assert not [bar for bar in bars if "…" in bar]


def test_every_command_shows_its_picture(cli, on_screen, color_model, emoji, digits):
    """Also where it writes something else than a picture."""
    model = ("-m", color_model)
    assert cli("compress", emoji, *model, "--t", 900, "-o", "x.ddpm")[0] == 0
    assert cli("sample", *model, "--n", 3, "-o", "s/")[0] == 0
    for args, outputs in [
        (("noise", emoji, "--t", "1,500"), ("strip.png",)),
        (("denoise-trace", *model), ("trace.png", "trace.gif", "trace/")),
        (("denoise-trace", *model, "--share-from", "300", "--steps", 8), ("shared.png", "shared/")),
        (("interpolate", "seed:1", "seed:2", *model), ("between.png", "between.webp", "between/")),
        (("invert", emoji, *model, "--steps", 4), ("latent.png",)),
        (("neighbors", "s", "--data", digits), ("near.png",)),
        (("decompress", "x.ddpm", *model, "--frames", 3), ("frames.png",)),
    ]:
        for output in outputs:
            code, out, seen = on_screen(*args, "--preview", "-o", output, **LARGE)
            assert (code, out) == (0, f"{output.rstrip('/')}\n"), seen
            [found] = from_kitty(seen)
            if output.endswith(".png"):
                sheet = picture(output)
            assert found.tobytes() == sheet.tobytes(), args
    latent = ("invert", emoji, *model, "--steps", 4, "--format", "safetensors", "-o", "x.safetensors")
    assert from_kitty(on_screen(*latent, "--preview", **LARGE)[2])[0].tobytes() == picture("latent.png").tobytes()
    for args in (("noise", emoji), ("decompress", "x.ddpm", *model)):  # one image is enlarged only in the terminal
        [found] = from_kitty(on_screen(*args, "--preview", "-o", f"{args[0]}.png", **LARGE)[2])
        assert found.tobytes() == pictures.enlarged(picture(f"{args[0]}.png")).tobytes()
    assert on_screen("noise", emoji, "--t", "1,500", "-o", "plain.png", **LARGE) == (0, "plain.png\n", "")


def test_previews_of_training(in_a_terminal, digits, quick_model):
    """They stand above the progress bar."""
    run = ("train", digits, "--from", quick_model, "--batch-size", 4, "--sample-every", 2, "--steps", 4)
    code, seen = in_a_terminal(*run, "--preview", "-o", "run", **LARGE)
    assert code == 0
    found = from_kitty(seen)
    assert [image.tobytes() for image in found] == [
        picture(f"run/samples/step-{step:08d}.png").tobytes() for step in (2, 4)
    ]
    # The bar's line is cleared, and the bar is drawn again below the picture, with its words of the last refresh.
    assert len(re.findall(r"\r\x1b\[2K\x1b_Ga=T[^\n]*\x1b\\\r\n(?:training|drawing samples)", seen)) == 2
    code, seen = in_a_terminal(*run, "--preview", "--scale", 1, "-o", "exact", COLORTERM="truecolor")
    exact = np.concatenate([np.asarray(picture(f"exact/samples/step-{step:08d}.png")) for step in (2, 4)])
    assert np.array_equal(from_blocks(seen)[..., 0], exact)


def test_where_there_is_no_terminal_there_is_a_note(cli, on_screen, small_model):
    sample = ("sample", "-m", small_model, "--n", 2, "--force", "-o", "a.png", "--preview")
    code, out, err = cli(*sample)
    assert (code, out, err.count("--preview: stderr is not a terminal")) == (0, "a.png\n", 1)
    assert "\x1b" not in err
    assert cli(*sample, "-q") == (0, "a.png\n", "")
    assert on_screen(*sample, "-q", **LARGE) == (0, "a.png\n", "")
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        code, _, seen = on_screen(*sample, **env)
        assert (code, "▀" in seen, "this terminal shows no colours" in seen) == (0, False, True)
    assert "▀" in on_screen(*sample)[2]
