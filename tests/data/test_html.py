"""Pages of HTML: escaped, self-contained, and with a script that knows the pictures."""

import base64
import io

import pytest
from PIL import Image

from ddpm_cli.data import html
from ddpm_cli.errors import DataError
from pages import Page, check_alone

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e\ud800"


def png(size: int = 3, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((size, size), 90).convert(mode).save(file, "PNG")
    return file.getvalue()


def test_text_is_escaped_everywhere():
    picture = html.embedded(png(), "a")
    parts = [
        html.paragraph(HOSTILE),
        html.section(HOSTILE, html.code(HOSTILE), html.fold(HOSTILE, "")),
        html.table([(HOSTILE, HOSTILE)], (HOSTILE, HOSTILE)),
        html.image(picture, HOSTILE),
        html.slider({HOSTILE: [picture]}, [HOSTILE], 0, 9, HOSTILE),
    ]
    data = html.page(HOSTILE, "".join(parts))
    page = Page(data)
    check_alone(page)
    shown = HOSTILE.encode("unicode_escape").decode()
    assert page.texts["title"] == page.texts["h1"] == page.texts["h2"] == page.texts["summary"] == [shown]
    assert page.texts["td"] == page.texts["output"] == page.sliders[0]["captions"] == [shown]
    assert [picture["alt"] for picture in page.images] == [shown, shown]
    assert page.commands == [shown]
    assert data.count(b"<script") == 2
    assert b"\x1b" not in data


def test_a_picture_is_enlarged_by_a_whole_factor():
    assert 'class="sharp"' in (small := html.image(html.Picture("a.png", 28, 14), "a", 100))
    assert 'width="84" height="42"' in small
    large = html.image(html.Picture("a.png", 300, 200), "a", 100)
    assert 'width="300" height="200"' in large
    assert "sharp" not in large


def test_large_pictures_lose_a_little_and_small_ones_nothing():
    original = png(20, "RGB")
    small, large = html.embedded(original, "a"), html.embedded(png(500, "RGB"), "a")
    kind, _, data = small.source.partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == Image.open(io.BytesIO(original)).tobytes()
    assert large.source.startswith("data:image/webp;")
    assert (large.width, large.height) == (500, 500)


def test_what_is_no_picture_is_named():
    with pytest.raises(DataError, match=r"a\.png: not an image"):
        html.embedded(b"<svg onload=alert(1)>", "a.png")


def test_code_between_backticks_and_empty_parts():
    assert html.paragraph("take `-o` <a>") == "<p>take <code>-o</code> &lt;a&gt;</p>\n"
    assert html.section("Nothing", "", "") == html.table([]) == ""
