"""Make emoji.zip: the animals, plants and food of Google's Noto Emoji as RGBA 32x32 PNGs.

The pictures are those of the npm package emoji-datasource-google, 64x64 there; unpack it and name its folder:

    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    pip install pillow && python make_emoji.py package
"""

import io
import json
import sys
import zipfile
from pathlib import Path

from PIL import Image

source = Path(sys.argv[1])
wanted = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
entries = [
    e for e in json.loads((source / "emoji.json").read_text()) if e["category"] in wanted and e["has_img_google"]
]
with zipfile.ZipFile(Path(__file__).with_name("emoji.zip"), "w", zipfile.ZIP_STORED) as archive:
    for entry in sorted(entries, key=lambda e: e["image"]):
        image = Image.open(source / "img" / "google" / "64" / entry["image"]).convert("RGBA")
        buffer = io.BytesIO()
        image.resize((32, 32), Image.Resampling.BOX).save(buffer, "PNG", optimize=True)
        name = zipfile.ZipInfo(f"{entry['short_name']}.png", date_time=(2026, 1, 1, 0, 0, 0))  # same bytes every time
        archive.writestr(name, buffer.getvalue())
