"""A picture as text that a terminal shows as a picture."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions
from rich.segment import ControlType, Segment
from rich.style import Style

from ddpm_cli.cli.terminal import Way
from ddpm_cli.data.pictures import enlarged

__all__ = ["Draw", "Shown", "half_blocks", "iterm2", "kitty", "sixel"]

Draw = Callable[[int | None], Image.Image]  # draws a picture at a scale, None for the default

_CHUNK = 4096  # characters; the most that kitty takes at once
_COLOURS = 256  # registers of a sixel terminal


class Shown:
    """A picture for Rich's console, reduced to the size of the terminal."""

    def __init__(self, draw: Draw, way: Way, cell: tuple[int, int]) -> None:
        """cell: width and height of a character, in pixels."""
        self._draw = draw
        self._way = way
        self._cell = cell

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        columns, lines = console.size
        if self._way == "blocks":
            # A character is one pixel wide, so there are few: only the width counts, since a terminal scrolls.
            exact = self._draw(1)
            yield from half_blocks(exact if exact.width <= columns else _fitted(self._draw(None), columns))
            return
        width, height = self._cell
        image = _fitted(enlarged(self._draw(None)), columns * width, max(1, lines - 2) * height)
        encode = {"kitty": kitty, "iterm2": iterm2, "sixel": sixel}[self._way]
        yield Segment(encode(image), None, [(ControlType.BELL,)])  # "control": written as it is
        yield Segment.line()


def _fitted(image: Image.Image, width: int, height: int | None = None) -> Image.Image:
    """Reduce a picture until it is no larger than this, in its proportions."""
    share = min(1, width / image.width, 1 if height is None else height / image.height)
    size = (max(1, int(image.width * share)), max(1, int(image.height * share)))
    return image if share == 1 else image.resize(size, Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def kitty(image: Image.Image) -> str:
    """The graphics protocol of kitty: a PNG in chunks of base64. q=2: the terminal must not answer."""
    text = b64encode(_png(image)).decode()
    parts = [text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)]
    keys = ["a=T,f=100,q=2,", *["q=2,"] * (len(parts) - 1)]
    more = [*[1] * (len(parts) - 1), 0]
    return "".join(f"\x1b_G{key}m={m};{part}\x1b\\" for key, m, part in zip(keys, more, parts, strict=True))


def iterm2(image: Image.Image) -> str:
    """The inline images of iTerm2: a PNG in base64."""
    data = _png(image)
    size = f"size={len(data)};width={image.width}px;height={image.height}px"
    return f"\x1b]1337;File=inline=1;{size}:{b64encode(data).decode()}\x07"


def sixel(image: Image.Image) -> str:
    """DEC's sixels: bands of six rows, in each of them one line for each colour, its pixels as bits of characters."""
    indexed = image.convert("RGB").quantize(_COLOURS, kmeans=2)
    palette = indexed.getpalette() or []
    numbers = np.asarray(indexed)
    height, width = numbers.shape
    text = [f'\x1bPq"1;1;{width};{height}']  # square pixels
    for number in np.unique(numbers).tolist():
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * number : 3 * number + 3])
        text.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        band = numbers[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        lines = (f"#{n}{_run_lengths(((band == n) * bits).sum(0))}" for n in np.unique(band).tolist())
        text.append("$".join(lines) + "-")  # $: back to the left, -: to the next band
    return "".join(text) + "\x1b\\"


def _run_lengths(values: np.ndarray) -> str:
    """Sixel characters, with `!12?` for twelve question marks; empty pixels at the end are left out."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    counts = np.diff(starts, append=len(values))
    runs = list(zip(values[starts].tolist(), counts.tolist(), strict=True))
    if runs[-1][0] == 0:
        runs.pop()
    return "".join(f"!{count}{chr(63 + value)}" if count > 3 else chr(63 + value) * count for value, count in runs)


def half_blocks(image: Image.Image) -> Iterable[Segment]:
    """Two pixels in a character: the upper one is its colour, the lower one the colour behind it."""
    pixels = np.asarray(image.convert("RGB")).tolist()
    for upper, lower in zip(pixels[::2], [*pixels[1::2], *[None] * (len(pixels) % 2)], strict=True):
        for i, colour in enumerate(upper):
            behind = Color.from_rgb(*lower[i]) if lower else None
            yield Segment("▀", Style(color=Color.from_rgb(*colour), bgcolor=behind))
        yield Segment.line()
