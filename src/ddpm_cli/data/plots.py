"""Charts: curves with axes, as a picture, as SVG for a page, and as text for a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ddpm_cli.data.html import escaped

__all__ = ["Chart", "draw", "svg", "text"]

_COLOURS = ("#1f5fa8", "#c4541a", "#2f8f4e", "#8a4fb0", "#6b6b6b")
_PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = (640, 360), 74, 18, 40, 34
_SMALL_PANEL = (480, 280)  # in a page, where it also has to fit a phone
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column


@dataclass(frozen=True)
class Chart:
    """Named curves over a quantity from 0 up, such as the steps of a run. A value may be missing (None)."""

    title: str
    steps: Sequence[float]
    curves: dict[str, list[float | None]]
    log: bool = False  # whether the vertical axis is logarithmic
    over: str = ""  # the name of the quantity, unless the title has it

    def points(self, name: str) -> list[tuple[float, float]]:
        """The values of a curve that can be shown on this chart's axis."""
        pairs = zip(self.steps, self.curves[name], strict=True)
        return [(x, y) for x, y in pairs if y is not None and math.isfinite(y) and (y > 0 or not self.log)]


def _range(chart: Chart, names: Sequence[str]) -> tuple[float, float]:
    """The values at the lower and the upper edge of a chart, never equal."""
    values = [y for name in names for _, y in chart.points(name)] or [1.0]
    low, high = min(values), max(values)
    if chart.log:
        return low / 1.1, high * 1.1
    low = min(low, 0.0)
    return low, high + (0.05 * (high - low) or 1.0)


def _scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    """A function from [low, high] to [0, 1]."""
    if log:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Three to eight round numbers in [low, high]."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [f * 10.0**e for e in decades for f in factors if low <= f * 10.0**e <= high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / 8)]
        log = False
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3 or factor == 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    """A number for an axis: 800k, 0.02, 5e-05."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


class _Axes:
    """Places the values of a chart in a box of pixels, and has its round numbers. rows, columns: those of its axes."""

    def __init__(self, chart: Chart, left: float, top: float, right: float, bottom: float) -> None:
        low, high = _range(chart, [*chart.curves])
        last = max(chart.steps)
        self._corner, self._size = (left, bottom), (right - left, bottom - top)
        self._across, self._up = _scale(0, last, False), _scale(low, high, chart.log)
        self.rows = [(value, self.at(0, value)[1]) for value in _ticks(low, high, chart.log)]
        self.columns = [(value, self.at(value, high)[0]) for value in _ticks(0, last, False)]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value is."""
        (left, bottom), (width, height) = self._corner, self._size
        return left + self._across(x) * width, bottom - self._up(y) * height


def draw(charts: Sequence[Chart], title: str) -> Image.Image:
    """Charts as one picture, two per row, with axes, round numbers and the names of the curves."""
    width, height = _PANEL
    rows = math.ceil(len(charts) / 2)
    picture = Image.new("RGB", (2 * width, 36 + rows * height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((width, 20), title, fill="black", font=ImageFont.load_default(18), anchor="mm")
    for i, chart in enumerate(charts):
        picture.paste(_panel(chart), (i % 2 * width, 36 + i // 2 * height))
    return picture


def _panel(chart: Chart) -> Image.Image:
    (width, height), scale = _PANEL, 2  # drawn at twice the size and reduced, for smooth lines
    names = list(chart.curves)
    panel = Image.new("RGB", (scale * width, scale * height), "white")
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(12 * scale)
    left, right = scale * _LEFT, scale * (width - _RIGHT)
    top, bottom = scale * _TOP, scale * (height - _BOTTOM)
    axes = _Axes(chart, left, top, right, bottom)
    for value, y in axes.rows:
        pen.line([(left, y), (right, y)], fill="#e4e4e4", width=scale)
        pen.text((left - 6 * scale, y), _short(value), fill="#444444", font=font, anchor="rm")
    for value, x in axes.columns:
        pen.line([(x, top), (x, bottom)], fill="#f0f0f0", width=scale)
        pen.text((x, bottom + 12 * scale), _short(value), fill="#444444", font=font, anchor="mm")
    pen.text((right, bottom + 26 * scale), chart.over, fill="#444444", font=font, anchor="rm")
    for name, colour in reversed(list(zip(names, _COLOURS, strict=False))):
        points = [axes.at(x, y) for x, y in chart.points(name)]
        if len(points) == 1:
            x, y = points[0]
            pen.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill=colour)
        pen.line(points, fill=colour, width=(3 if name == names[0] else 2) * scale // 2, joint="curve")
    pen.rectangle([left, top, right, bottom], outline="#888888", width=scale)
    pen.text((left, top - 16 * scale), chart.title, fill="black", font=ImageFont.load_default(15 * scale), anchor="lm")
    x = right
    for name, colour in reversed(list(zip(names, _COLOURS, strict=False)) if len(names) > 1 else []):
        pen.text((x, top - 14 * scale), name, fill=colour, font=font, anchor="rm")
        x -= pen.textlength(name, font=font) + 14 * scale
    return panel.resize((width, height), Image.Resampling.LANCZOS)


def svg(chart: Chart) -> str:
    """A chart as SVG, for a page of HTML: text has the page's font and colour, --curve-1, … may set those of curves."""
    width, height = _SMALL_PANEL
    left, right, top, bottom = _LEFT - 20, width - _RIGHT, _TOP, height - _BOTTOM
    axes = _Axes(chart, left, top, right, bottom)
    title = escaped(chart.title)
    parts = [f'<text x="{left}" y="{top - 12}" font-size="15">{title}</text>']
    for value, y in axes.rows:
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value, x in axes.columns:
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="currentColor" opacity=".1"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<text x="{right}" y="{height - 4}" text-anchor="end">{escaped(chart.over)}</text>')
    parts.append(f'<path d="M{left} {top}V{bottom}H{right}" stroke="currentColor" opacity=".5" fill="none"/>')
    colours = [f"var(--curve-{i}, {colour})" for i, colour in enumerate(_COLOURS, 1)]
    curves = list(zip(chart.curves, colours, strict=False))
    for name, colour in reversed(curves):
        points = [f"{x:.1f} {y:.1f}" for x, y in _thinned([axes.at(x, y) for x, y in chart.points(name)])]
        line = f"M{'L'.join([*points, points[-1]])}" if points else ""  # one point is a line to itself: a dot
        thick = 2 if name == next(iter(chart.curves)) else 1.2
        style = f"stroke:{colour};stroke-width:{thick if len(points) > 1 else 6}"
        parts.append(f'<path d="{line}" style="{style}" fill="none" stroke-linecap="round" stroke-linejoin="round"/>')
    if len(curves) > 1:
        names = "".join(f'<tspan dx="12" style="fill:{colour}">{escaped(name)}</tspan>' for name, colour in curves)
        parts.append(f'<text x="{right}" y="{top - 12}" text-anchor="end">{names}</text>')
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{title}"'
    return f'<svg {box} font-size="12" fill="currentColor">{"".join(parts)}</svg>\n'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most two points in each column of pixels, the highest and the lowest, in their order: it looks the same."""
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(round(point[0]), []).append(point)
    found = []
    for column in columns.values():
        kept = {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
        found += sorted(kept, key=column.index)
    return found


def text(chart: Chart, columns: int = 60, rows: int = 6) -> str:
    """The first curve of a chart in braille dots, with its title, its range and its last value."""
    name = next(iter(chart.curves))
    points = chart.points(name)
    if not points:
        return f"{chart.title}: no values yet"
    low, high = _range(chart, [name])
    up = _scale(low, high, chart.log)
    last = max(chart.steps)
    cells = [[0] * columns for _ in range(rows)]
    values: dict[int, list[float]] = {}  # by column of dots
    for x, y in points:
        values.setdefault(min(2 * columns - 1, int(x / last * (2 * columns - 1))), []).append(y)
    marks = [(column, up(sum(found) / len(found)) * (4 * rows - 1)) for column, found in sorted(values.items())]
    before = round(marks[0][1])
    for column, height in _joined(marks):
        for dot in range(min(height, before), max(height, before) + 1):
            row = 4 * rows - 1 - dot
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        before = height
    edges = {0: _short(high), rows - 1: _short(low)}
    lines = [f"{edges.get(i, ''):>8} │{''.join(chr(0x2800 + dots) for dots in cell)}" for i, cell in enumerate(cells)]
    axis = f"{'':>8} └{'─' * columns}\n{'':>10}0{_short(last):>{columns - 1}}"
    return "\n".join([f"{chart.title}: {_short(points[-1][1])} at step {points[-1][0]}", *lines, axis])


def _joined(marks: Sequence[tuple[int, float]]) -> Iterator[tuple[int, int]]:
    """A height for each column from the first mark to the last: straight lines between them."""
    for (left, low), (right, high) in itertools.pairwise(marks):
        for column in range(left, right):
            yield column, round(low + (high - low) * (column - left) / (right - left))
    column, height = marks[-1]
    yield column, round(height)
