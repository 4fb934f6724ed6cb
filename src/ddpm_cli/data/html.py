"""Pages of HTML for a browser: without a server, a network or a library, and readable without their script.

All text that these functions take is escaped here. What they return is HTML, to be joined and given to `page`.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ddpm_cli.data.images import decode
from ddpm_cli.data.pictures import picture_bytes
from ddpm_cli.text import printable

__all__ = [
    "Picture",
    "code",
    "embedded",
    "escaped",
    "fold",
    "image",
    "page",
    "paragraph",
    "section",
    "sheet",
    "slider",
    "table",
]

_LARGE = 100_000  # bytes; larger pictures are embedded as WebP with some loss, in less than a tenth of the bytes


class Picture(NamedTuple):
    """A picture of a page. source: a data URI, or a path relative to the page. width, height: its pixels."""

    source: str
    width: int
    height: int


def escaped(text: str) -> str:
    """Text for HTML, also between quotes, on one line. Control characters are written as `\\x1b` and the like."""
    return html.escape(printable(text))


def embedded(data: bytes, name: str) -> Picture:
    """A picture from the bytes of an image file, as part of the page. name: in errors. Raises DataError.

    It is decoded and encoded again, so the page has nothing of the file but its pixels.
    """
    pixels = decode(data, name)
    if len(data) <= _LARGE:
        kind, coded = "png", picture_bytes(pixels)
    else:
        buffer = io.BytesIO()
        pixels.save(buffer, "WEBP", quality=85, method=2)  # 1.6 times as fast as by default, and 3 % larger
        kind, coded = "webp", buffer.getvalue()
    return Picture(f"data:image/{kind};base64,{base64.b64encode(coded).decode()}", *pixels.size)


def image(picture: Picture, about: str, width: int = 0) -> str:
    """A picture, enlarged by a whole factor to at most `width` pixels if it is smaller. about: what it shows."""
    factor = max(1, width // picture.width)
    size = f'width="{factor * picture.width}" height="{factor * picture.height}"'
    sharp = ' class="sharp"' if factor > 1 else ""
    return f'<img{sharp} src="{escaped(picture.source)}" alt="{escaped(about)}" {size}>'


def sheet(picture: Picture, about: str) -> str:
    """A picture with small text in it. Where it would be too small to read, it can be scrolled instead."""
    return f'<div class="wide sheet" tabindex="0">{image(picture, about)}</div>\n'


def slider(
    rows: Mapping[str, Sequence[Picture]],
    captions: Sequence[str],
    first: int,
    width: int,
    ends: tuple[str, str],
    label: str = "time",
) -> str:
    """Named rows of pictures, one of each shown at a time, and a slider that chooses which, if there is a choice.

    captions: a line for each position. first: the position at the start, and the only one without the script. width:
    of a picture, see `image`. ends: the names of the first and the last position. label: what the slider moves
    through, for screen readers.
    """
    figures, whole = "", 0
    for name, pictures in rows.items():
        largest = max(1, width // pictures[first].width) * pictures[first].width
        shown = f"{image(pictures[first], name, width)}<figcaption>{escaped(name)}</figcaption>"
        figures += f'<figure style="max-width: {largest}px">{shown}</figure>'
        whole += largest
    row, caption = f'<div class="row">{figures}</div>', escaped(captions[first])
    if len(captions) == 1:
        return f"{row}<p>{caption}</p>\n"
    data = {
        "captions": [printable(caption) for caption in captions],
        "rows": [[picture.source for picture in pictures] for pictures in rows.values()],
    }
    before, after = (f"<span>{escaped(end)}</span>" for end in ends)
    moved = f'<input type="range" min="0" max="{len(captions) - 1}" value="{first}" aria-label="{escaped(label)}">'
    return (
        f'<div class="slider" style="max-width: calc({whole}px + {len(rows) - 1}rem)">{row}'
        f'<div class="move" hidden>{before}{moved}{after}</div><output>{caption}</output>'
        f'<script type="application/json">{_json(data)}</script></div>\n'
    )


def _json(data: object) -> str:
    """JSON inside of a script element, which `</script>` or `<!--` in a text would end or confuse."""
    return json.dumps(data).replace("<", r"\u003c")


def section(title: str, *parts: str) -> str:
    """A part of a page under a heading; empty if its parts are."""
    return f"<section><h2>{escaped(title)}</h2>\n{''.join(parts)}</section>\n" if any(parts) else ""


def fold(title: str, content: str) -> str:
    """A part that is closed at first."""
    return f"<details><summary>{escaped(title)}</summary>{content}</details>\n"


def paragraph(text: str) -> str:
    """A paragraph. Words between backticks are code."""
    pieces = escaped(text).split("`")
    return f"<p>{''.join(f'<code>{piece}</code>' if i % 2 else piece for i, piece in enumerate(pieces))}</p>\n"


def code(text: str) -> str:
    """A command, or another text of lines. A line is broken between words, not after the hyphens of an option."""
    lines = (re.sub(r"(\S+)", r"<span>\1</span>", escaped(line)) for line in text.split("\n"))
    return "<pre>{}</pre>\n".format("\n".join(lines))


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), notes: Sequence[str] = ()) -> str:
    """A table; the first cell of each row is its heading. Empty without rows. notes: one below each row, as wide."""
    if not rows:
        return ""
    top = f"<tr>{''.join(f'<th>{escaped(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = [
        f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    if notes:
        below = (f'<tr class="note"><td colspan="{len(rows[0])}">{escaped(note)}</td></tr>' for note in notes)
        lines = [line + note for line, note in zip(lines, below, strict=True)]
    return f'<div class="wide" tabindex="0"><table>{top}{"".join(lines)}</table></div>\n'


def page(title: str, command: str, body: str) -> bytes:
    """A whole page. command: what made it, for the title of the window.

    The policy in its head forbids the browser to load anything but its own pictures.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(f'{title} - {command}')}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<main><h1>{escaped(title)}</h1>\n{body}</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    ).encode()


_POLICY = "default-src 'none'; img-src data: file: 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { --text: #1c1c1c; --back: #ffffff; --soft: #666; --line: #ddd; --field: #f4f4f4; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --back: #161618; --soft: #a0a0a0; --line: #3a3a3e; --field: #232327;
    --curve-1: #6aa9ee; --curve-2: #f0905a; --curve-3: #6fce8c; --curve-4: #c694e8; --curve-5: #b0b0b0; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p { max-width: 44rem; }
img { max-width: 100%; height: auto; vertical-align: top; }
.sharp { image-rendering: pixelated; }
figure { margin: 0; }
figcaption, summary, .move, .note { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
.row figure { flex: 1 1 4.5rem; }
.slider output { display: block; font-variant-numeric: tabular-nums; }
.move { display: flex; align-items: center; gap: .7rem; margin-top: 1rem; white-space: nowrap; }
.move[hidden] { display: none; }
.move input { flex: 1; min-width: 0; min-height: 1.5rem; accent-color: var(--curve-1, #1f5fa8); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
.sheet img { max-width: max(100%, 40rem); }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; min-width: 5rem; }
td:last-child { min-width: 13rem; }
th { font-weight: 600; white-space: nowrap; }
tr:has(+ .note) > * { border: 0; padding-bottom: 0; }
pre { background: var(--field); padding: .7rem; border-radius: .3rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { display: inline-block; max-width: 100%; }
code, pre { font: .9em/1.4 ui-monospace, monospace; }
p code { white-space: nowrap; }
details { margin: 1rem 0; }
@media screen and (max-width: 40rem) {
  th { white-space: normal; }
  th, td { min-width: 0; padding-right: .7rem; }
  th, td:not(:last-child) { overflow-wrap: normal; }
  td:last-child { min-width: 8rem; }
  .slider output { min-height: 3em; }
}
@media print {
  h2, p, tr:has(+ .note) { break-after: avoid; }
  figure, svg, tr, p, pre, .slider { break-inside: avoid; }
  .charts { grid-template-columns: 1fr 1fr; }
  .sheet img { max-width: 100%; }
  .move { display: none; }
}
"""

_SCRIPT = """
for (const box of document.querySelectorAll(".slider")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const images = box.querySelectorAll("img"), input = box.querySelector("input");
  const show = () => {
    const caption = data.captions[input.value];
    data.rows.forEach((row, i) => { images[i].src = row[input.value]; });
    box.querySelector("output").textContent = caption;
    input.setAttribute("aria-valuetext", caption);
  };
  input.addEventListener("input", show);
  addEventListener("pageshow", show);  // after Back, the browser moves the slider to where it was
  box.querySelector(".move").hidden = false;
  show();
}
"""
