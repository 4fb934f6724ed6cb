"""`ddpm decompress`: the image from the bits of `ddpm compress`, or from the first of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import check_t, open_model
from ddpm_cli.cli.output import deliver, pick_target, read_input
from ddpm_cli.text import counted

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["EXAMPLES", "decompress"]

EXAMPLES = """
Examples:
  ddpm decompress cat.ddpm -o cat.png
  ddpm decompress cat.ddpm --frames 10 -o strip.png
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def decompress(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A file of ddpm compress, or - for stdin.")],
    model: options.Model = None,
    t: Annotated[
        int | None, typer.Option("--t", min=1, metavar="T", help="Stop at x_t. Default: decode the whole file.")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=2, metavar="N", help="A labelled strip of N images from the first bits to all."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png, .jpg or .webp file, or - for stdout. Default: <name>.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    scale: options.Scale = None,
    preview: options.Preview = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Decode an image that ddpm compress made, with the same model.

    The beginning of a file decodes too, to a coarser image.
    """
    console = Console("decompress", as_json, quiet, preview)
    stem = "image" if file == "-" else Path(file).stem
    target = pick_target(output, f"{stem}.png", _SUFFIXES, console, force)
    data, called = read_input(file)

    import torch

    from ddpm_cli.compression import compress as codec
    from ddpm_cli.compression.container import Container
    from ddpm_cli.data import pictures
    from ddpm_cli.diffusion.noised_image import to_paper

    held = Container.from_bytes(data, called)
    if held.missing:
        total = len(data) + held.missing
        console.warn(f"{called}: is cut, {len(data)} of {total} bytes; it is decoded as far as it goes, unchecked")
    ddpm = open_model(console, model, device, "fp32", "ema")
    check_t(ddpm, t)
    states: list[tuple[int, int, torch.Tensor]] = []
    with console.bar("decompressing", None) as update:
        done = codec.decompress(ddpm, held, called, lambda done, total: update(done, total=total))
        for state, pixels in done:
            if states and t is not None and to_paper(state.t) < t:
                break
            states.append((to_paper(state.t), state.bits, pixels))
    last_t, bits, pixels = states[-1]

    def draw(scale: int | None) -> Image.Image:
        if frames is None:
            return pictures.grid(pixels[None], scale)
        shown = [states[i] for i in pictures.evenly(len(states), frames)]
        labels = [f"t={at}\n{counted(so_far, 'bit')}" for at, so_far, _ in shown]
        return pictures.strip([torch.stack([tile for _, _, tile in shown])], labels, scale=scale)

    console.show(draw)
    fields = {"t": last_t, "bits": bits, "missing_bytes": held.missing}
    deliver(target, pictures.picture_bytes(draw(scale), target.suffix), console, **fields)
