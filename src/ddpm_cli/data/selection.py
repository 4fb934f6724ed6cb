"""Reads a limited number of images of a source into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_cli.data import images
from ddpm_cli.data.sources.source import Source
from ddpm_cli.data.survey import without_warnings
from ddpm_cli.data.work import OnProgress, in_threads, silent
from ddpm_cli.errors import DataError

__all__ = ["read_some"]


def read_some(
    source: Source, n: int, channels: int, size: int, background: str = "white", progress: OnProgress = silent
) -> tuple[Tensor, list[tuple[str, str]]]:
    """At most n images, spread evenly over the source and cropped to squares: (N, channels, size, size) uint8.

    Also returns (name, reason) of those that cannot be used. Raises DataError if none can.
    """

    def read(name: str) -> Tensor | str:
        try:
            with source.open(name) as file, images.open_image(file) as image:
                return images.from_pil(images.fit(images.load(image, channels, background), size))
        except Exception as error:  # Pillow's plugins, zipfile and decompressors may raise any exception
            return images.reason(error)

    source.scan(progress)
    count = min(n, len(source.names))
    names = [source.names[i * len(source.names) // count] for i in range(count)]
    read_in: list[Tensor] = []
    left_out: list[tuple[str, str]] = []
    with without_warnings():
        for done, (name, result) in enumerate(zip(names, in_threads(read, names), strict=True), start=1):
            if isinstance(result, str):
                left_out.append((name, result))
            else:
                read_in.append(result)
            progress("decoding images", done, count)
    if not read_in:
        raise DataError(
            f"{source.path}: none of {count} image files can be decoded, for example {': '.join(left_out[0])}"
        )
    return torch.stack(read_in), left_out
