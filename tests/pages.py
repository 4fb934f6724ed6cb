"""Reads the pages that ddpm writes, and checks that they load nothing from elsewhere."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

__all__ = ["Page", "check_alone"]

# Elements that have no end tag.
VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """A page that was read: it must be well formed. texts: by element; sliders: the data of the scripts."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(data.decode())
        self.close()
        assert self.open == []
        self.images = [about for name, about in self.elements if name == "img"]
        self.sliders = [json.loads(text) for text in self.texts.get("script", []) if text.startswith("{")]
        self.commands = [line for text in self.texts.get("pre", []) for line in text.splitlines()]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


def check_alone(page: Page, folder: Path | None = None) -> None:
    """Every picture is in the page, or a file in its folder; nothing else is loaded, and no script is foreign."""
    assert all(picture["alt"] and picture["width"] for picture in page.images)
    sources = [picture["src"] for picture in page.images]
    for slider in page.sliders:
        assert all(len(row) == len(slider["captions"]) for row in slider["rows"])
        sources += [source for row in slider["rows"] for source in row]
    for source in sources:
        if folder is None:
            kind, data = re.fullmatch(r"data:image/(png|webp);base64,(.*)", source).groups()
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
                picture.load()
                assert picture.format == kind.upper()
        else:
            assert (folder / source).is_file()
            assert (folder / source).resolve().is_relative_to(folder.resolve())
    for name, about in page.elements:
        assert name not in ("link", "iframe", "object", "base", "form", "a")
        assert not [key for key in about if key.startswith("on") or key in ("href", "srcset")]
        assert name == "img" or "src" not in about
    assert not re.search("https?://|url\\(|@import", "".join(page.texts["style"] + page.texts["script"]))
    assert [about for name, about in page.elements if name == "script" and not about] == [{}]  # only that of the page
