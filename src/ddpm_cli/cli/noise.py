"""`ddpm noise`: the forward process on one image. Needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.output import check_scale, deliver, pick_target, read_input
from ddpm_cli.errors import UsageError
from ddpm_cli.names import FORMATS

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["EXAMPLES", "noise"]

EXAMPLES = """
Examples:
  ddpm noise cat.jpg --t 0,250,500,1000 -o strip.png
  ddpm noise cat.jpg --t 300 --format safetensors -o cat.safetensors
"""


def noise(
    image: Annotated[str, typer.Argument(metavar="IMG|-", help="An image file, or - for stdin.")],
    t: Annotated[
        str,
        typer.Option(
            "--t",
            metavar="T[,T…]",
            help="The timestep: 0 is the image, 1000 is pure noise. Several, separated by commas, give a labelled "
            "strip.",
        ),
    ] = "500",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png, .jpg, .webp or .safetensors file, or - for stdout. "
            "Default: <name>-t<t>.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    form: Annotated[
        str,
        options.named("--format", FORMATS, help="png to look at, or safetensors: exact, for ddpm denoise-trace."),
    ] = "png",
    background: options.Background = "white",
    scale: options.Scale = None,
    preview: options.Preview = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Add noise to an image: jump to step t of the forward process (Eq. 4).

    The image keeps its size. The schedule is the paper's.
    """
    console = Console("noise", as_json, quiet, preview)
    from ddpm_cli.config import ScheduleConfig

    ts = options.parse_ts(t)
    schedule = ScheduleConfig()
    T = schedule.num_train_timesteps
    if max(ts) > T:
        raise UsageError(f"--t {max(ts)}: the last step of the schedule is t={T}, pure noise")
    if form == "safetensors" and len(ts) > 1:
        raise UsageError("--format safetensors holds one image", "Give a single timestep to --t.")
    if form == "png" and output and output.endswith(".safetensors"):
        raise UsageError(f"-o {output}: --format png cannot write .safetensors", "Add --format safetensors.")
    stem = "noise" if image == "-" else Path(image).stem
    name = f"{stem}-t{'-'.join(map(str, ts))}.{form}"
    suffixes = (".safetensors",) if form == "safetensors" else (".png", ".jpg", ".jpeg", ".webp")
    target = pick_target(output, name, suffixes, console, force)
    check_scale(scale, target, form)

    import torch

    from ddpm_cli.data import images, pictures
    from ddpm_cli.diffusion.noised_image import Noised
    from ddpm_cli.rng import ImageNoise

    images.check_background(background)
    data, called = read_input(image)
    clean = images.from_pil(images.decode(data, called, background=background))
    channels, height, width = clean.shape
    # Every t gets the same noise, so a strip shows that noise grow.
    made = [
        Noised.make(
            images.to_float(clean)[None],
            step,
            seed,
            schedule,
            ImageNoise(seed, [0], (channels, height, width), "forward"),
        )
        for step in ts
    ]
    tiles = torch.cat([images.to_uint8(noised.x_t) for noised in made])

    def draw(scale: int | None) -> Image.Image:
        if len(ts) == 1:
            return pictures.grid(tiles, scale)
        return pictures.strip([tiles], [f"t={step}" for step in ts], scale=scale)

    console.show(draw)
    result = made[0].to_bytes() if form == "safetensors" else pictures.picture_bytes(draw(scale), target.suffix)
    deliver(target, result, console, t=ts, seed=seed, size=[width, height], format=form)
