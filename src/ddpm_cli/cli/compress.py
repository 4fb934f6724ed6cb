"""`ddpm compress`: an image as the bits of Algorithm 3."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import check_t, open_model
from ddpm_cli.cli.output import deliver, pick_target, read_input

__all__ = ["EXAMPLES", "compress"]

EXAMPLES = """
Examples:
  ddpm compress cat.png -o cat.ddpm
  ddpm compress cat.png --bytes 300 -o small.ddpm
"""


def compress(
    image: Annotated[str, typer.Argument(metavar="IMG|-", help="An image file, or - for stdin.")],
    model: options.Model = None,
    t: Annotated[
        int | None,
        typer.Option(
            "--t",
            min=1,
            metavar="T",
            help="Code the image down to x_t: a smaller T is closer to the image and takes more bits. "
            "Default: 1 % of all steps.",
        ),
    ] = None,
    most_bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes", parser=options.parse_count, metavar="N", help="Stop before the file is larger than N bytes."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .ddpm file, or - for stdout. Default: <name>.ddpm at a terminal, stdout in a pipe.",
        ),
    ] = None,
    background: options.Background = "white",
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Compress an image with a model: progressive lossy coding (Section 4.3).

    The image is fitted to the model's size. ddpm decompress needs the same
    model, and can also decode the beginning of a file.
    """
    console = Console("compress", as_json, quiet)
    stem = "image" if image == "-" else Path(image).stem
    target = pick_target(output, f"{stem}.ddpm", (".ddpm",), console, force)
    data, called = read_input(image)

    from ddpm_cli.compression import compress as codec
    from ddpm_cli.data import images

    images.check_background(background)
    ddpm = open_model(console, model, device, "fp32", "ema")
    channels, size, _ = ddpm.shape
    check_t(ddpm, t)
    decoded = images.decode(data, called, channels, background)
    pixels = images.from_pil(images.fit(decoded, size))
    if decoded.size != (size, size):
        console.note(f"{called}: fitted from {decoded.width}x{decoded.height} to the model's {size}x{size}")

    started = time.perf_counter()
    with console.bar("compressing", None) as update:
        result = codec.compress(ddpm, pixels, t, most_bytes, progress=lambda done, total: update(done, total=total))
    seconds = time.perf_counter() - started
    mse = float((result.image.double() - pixels.double()).square().mean())
    overhead = result.bits / result.ideal - 1 if result.ideal else 0.0
    fields = {
        "bytes": len(result.data),
        "header_bytes": len(result.data) - -(-result.bits // 8),
        "bits": result.bits,
        "bits_per_dim": round(result.bits / pixels.numel(), 4),
        "ideal_bits": round(result.ideal, 1),
        "t": result.t,
        "rmse": round(math.sqrt(mse), 3),
        "psnr": round(10 * math.log10(255**2 / mse), 2) if mse else None,
        "seconds": round(seconds, 3),
    }
    console.table(
        {
            "file": f"{fields['bytes']} bytes, {fields['header_bytes']} of them the header",
            "code": f"{result.bits} bits, {fields['bits_per_dim']} bits/dim, down to t={result.t}",
            "ideal code": f"{result.ideal:.0f} bits for this chain; ours takes {overhead:+.0%}",
            "distortion": f"RMSE {fields['rmse']} of 255, PSNR {fields['psnr'] or 'inf'} dB",
            "time": f"{seconds:.1f} s",
        }
    )
    deliver(target, result.data, console, **fields)
