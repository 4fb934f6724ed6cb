"""`ddpm rate-distortion`: what the ideal progressive code would need, and how good its images are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console, columns
from ddpm_cli.cli.model import open_model, pick_sampling
from ddpm_cli.cli.output import deliver, pick_target
from ddpm_cli.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_cli.data.plots import Chart
    from ddpm_cli.evaluation.bound import Depth
    from ddpm_cli.models.ddpm import DDPM

__all__ = ["EXAMPLES", "rate_distortion"]

EXAMPLES = """
Examples:
  ddpm rate-distortion ./images -o curve.png
  ddpm rate-distortion held-out.zip -m runs/cats -n 256 --steps 100
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ROWS = 10


def rate_distortion(
    sources: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Images, in any form that ddpm train takes.")
    ],
    model: options.Model = None,
    n: Annotated[
        int, typer.Option("--n", "-n", parser=options.parse_count, metavar="N", help="Use at most N of the images.")
    ] = 16,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png, .jpg or .webp file, or - for stdout. "
            "Default: rate-distortion.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", parser=options.parse_count, metavar="N", help="Take N steps, even in the log-SNR. Default: all."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", parser=options.parse_count, metavar="N", help="Images per batch.")
    ] = 64,
    background: options.Background = "white",
    weights: options.Weights = "ema",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Show rate against distortion of a model (Fig. 5 and Table 4).

    The rate is that of an ideal code for x_t, from the terms of the bound.
    The distortion is that of the clean image predicted from x_t.
    """
    console = Console("rate-distortion", as_json, quiet)
    target = pick_target(output, "rate-distortion.png", _SUFFIXES, console, force)

    from ddpm_cli.data import images, pictures, plots
    from ddpm_cli.evaluation.bound import measure, merge

    images.check_background(background)
    ddpm = open_model(console, model, device, "fp32", weights)
    # Even steps in t would be far too long at the end, where most bits are. Step 0 has the decoder's term.
    taken = [0, *pick_sampling(ddpm, "ddpm", steps, spacing="logsnr").timesteps[1:]]
    x_0 = _read(sources, n, ddpm, background, console)
    with console.bar("measuring, images x steps", len(x_0) * len(taken)) as update:
        parts = measure(
            ddpm.denoiser.subsequence(taken), x_0, range(len(x_0)), ddpm.device, seed, batch_size, progress=update
        )
        rows = _rows(merge(parts).depths())

    count = min(_ROWS, len(rows))
    shown = [rows[round((i + 1) * len(rows) / count) - 1] for i in reversed(range(count))]
    table = [("reverse steps", "t", "rate (bits/dim)", "distortion (RMSE of 255)")]
    table += [(str(r["reverse_steps"]), str(r["t"]), f"{r['rate']:.5f}", f"{r['rmse']:.3f}") for r in shown]
    for line in columns(table):
        console.note(f"  {line}")
    charts = _charts(rows)
    title = f"rate and distortion of {counted(len(x_0), 'image')} in {counted(len(rows), 'step')}"
    data = pictures.picture_bytes(plots.draw(charts, title), target.suffix)
    deliver(target, data, console, n=len(x_0), seed=seed, steps=len(rows), rows=rows)


def _rows(depths: Sequence[Depth]) -> list[dict[str, float]]:
    """A row for each depth, with the paper's t."""
    from ddpm_cli.diffusion.noised_image import to_paper

    return [
        {"t": to_paper(depth.t), "reverse_steps": done, "rate": round(depth.rate, 6), "rmse": round(depth.rmse, 4)}
        for done, depth in enumerate(depths, start=1)
    ]


def _charts(rows: list[dict[str, float]]) -> list[Chart]:
    """The three panels of Fig. 5."""
    from ddpm_cli.data.plots import Chart

    done, rates, errors = ([row[key] for row in rows] for key in ("reverse_steps", "rate", "rmse"))
    return [
        Chart("distortion (RMSE) against reverse steps", done, {"rmse": [*errors]}),
        Chart("rate (bits/dim) against reverse steps", done, {"rate": [*rates]}),
        Chart("distortion (RMSE) against rate (bits/dim)", rates, {"rmse": [*errors]}),
    ]


def _read(sources: list[str], n: int, ddpm: DDPM, background: str, console: Console) -> Tensor:
    """Up to n images of the sources, spread evenly over them, fitted to the model: (N, C, H, W) uint8."""
    from ddpm_cli.data.cache import cache_folder
    from ddpm_cli.data.selection import read_some
    from ddpm_cli.data.sources import open_sources, read_streams

    channels, size, _ = ddpm.shape
    named = read_streams(sources)
    with console.progress("looking for images") as progress:
        source = open_sources(named, cache_folder(), progress)
        found, left_out = read_some(source, n, channels, size, background, progress)
    if left_out:
        console.warn(
            f"left out {counted(len(left_out), 'image')} that cannot be used, for example {': '.join(left_out[0])}"
        )
    return found
