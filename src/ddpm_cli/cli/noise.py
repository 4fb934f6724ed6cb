"""`ddpm noise`: an image on its way to noise. Needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.output import deliver, pick_target, read_input
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.errors import UsageError

__all__ = ["noise"]


def noise(
    image: Annotated[str, typer.Argument(metavar="IMG|-", help="An image file, or - for stdin.")],
    t: Annotated[
        str,
        typer.Option(
            "--t",
            metavar="T[,T…]",
            help="How far: 0 is the image, 1000 is noise. Several with commas between make a labelled strip.",
        ),
    ] = "500",
    output: options.Output = None,
    form: Annotated[
        str,
        typer.Option("--format", help="png: to look at. safetensors: exact, for ddpm denoise-trace.", metavar="FORMAT"),
    ] = "png",
    background: Annotated[str, typer.Option("--background", help="What shows through transparency.")] = "white",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Noise an image to step t of the forward process, at its own size (Eq. 4), with the paper's schedule."""
    console = Console("noise", as_json, quiet)
    ts = options.parse_ts(t)
    schedule = ScheduleConfig()
    T = schedule.num_train_timesteps
    if form not in ("png", "safetensors"):
        raise UsageError(f"--format {form} is neither png nor safetensors")
    if max(ts) > T:
        raise UsageError(f"--t {max(ts)}: the schedule ends at t={T}, which is noise")
    if form == "safetensors" and len(ts) > 1:
        raise UsageError("--format safetensors carries one image", "Give a single --t.")
    if form == "png" and output and output.endswith(".safetensors"):
        raise UsageError(f"-o {output}: pictures are not safetensors", "Add --format safetensors.")
    stem = "noise" if image == "-" else Path(image).stem
    name = f"{stem}-t{'-'.join(map(str, ts))}.{form}"
    suffixes = (".safetensors",) if form == "safetensors" else (".png", ".jpg", ".jpeg", ".webp")
    target = pick_target(output, name, suffixes, console, force)

    import torch

    from ddpm_cli.data import images, pictures
    from ddpm_cli.diffusion.noised_image import Noised
    from ddpm_cli.rng import ImageNoise

    images.check_background(background)
    data, called = read_input(image)
    clean = images.from_pil(images.decode(data, called, background=background))
    channels, height, width = clean.shape
    # One draw of noise for all t: a strip shows one and the same noise take over.
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
    if form == "safetensors":
        result = made[0].to_bytes()
    else:
        tiles = [images.to_uint8(noised.x_t) for noised in made]
        sheet = (
            images.to_pil(tiles[0][0])
            if len(ts) == 1
            else pictures.strip([torch.cat(tiles)], [f"t={step}" for step in ts])
        )
        result = pictures.picture_bytes(sheet, target.suffix)
    deliver(target, result, console, t=ts, seed=seed, size=[width, height], format=form)
