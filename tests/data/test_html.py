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
        html.table([(HOSTILE, HOSTILE)], (HOSTILE, HOSTILE), [HOSTILE]),
        html.image(picture, HOSTILE),
        html.sheet(picture, HOSTILE),
        html.slider({HOSTILE: [picture] * 2}, [HOSTILE] * 2, 0, 9, (HOSTILE, HOSTILE), HOSTILE),
        html.slider({HOSTILE: [picture]}, [HOSTILE], 0, 9, (HOSTILE, HOSTILE), HOSTILE),
    ]
    data = html.page(HOSTILE, HOSTILE, "".join(parts))
    page = Page(data)
    check_alone(page)
    shown = HOSTILE.encode("unicode_escape").decode()
    assert page.texts["title"] == [f"{shown} - {shown}"]
    assert page.texts["h1"] == page.texts["h2"] == page.texts["summary"] == page.texts["output"] == [shown]
    assert page.texts["td"] == page.sliders[0]["captions"] == [shown] * 2
    assert page.texts["p"] == [shown] * 2
    assert [picture["alt"] for picture in page.images] == [shown] * 4
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


def test_a_slider_with_one_position_is_a_row_of_pictures():
    pictures = [html.Picture("a.png", 30, 30), html.Picture("b.png", 30, 30)]
    one = Page(html.slider({"a": pictures[:1]}, ["t = 0"], 0, 100, ("0", "0")).encode())
    assert [name for name, _ in one.elements if name in ("input", "script", "output")] == []
    assert (one.texts["p"], len(one.images)) == (["t = 0"], 1)
    two = Page(html.slider({"a": pictures, "b": pictures}, ["t = 1", "t = 0"], 1, 100, ("1", "0")).encode())
    assert two.texts["span"] == ["1", "0"]
    assert two.elements[0] == ("div", {"class": "slider", "style": "max-width: calc(180px + 1rem)"})


def test_what_is_no_picture_is_named():
    with pytest.raises(DataError, match=r"a\.png: not an image"):
        html.embedded(b"<svg onload=alert(1)>", "a.png")


def test_code_between_backticks_and_empty_parts():
    assert html.paragraph("take `-o` <a>") == "<p>take <code>-o</code> &lt;a&gt;</p>\n"
    assert html.section("Nothing", "", "") == html.table([]) == ""


def test_a_note_is_below_its_row_and_as_wide():
    page = Page(html.table([("a", "1"), ("b", "2")], notes=["one", "two"]).encode())
    assert page.texts["tr"] == ["a1", "one", "b2", "two"]
    assert [about.get("colspan") for name, about in page.elements if name == "td"] == [None, "2"] * 2
