"""`ddpm invert`: from an image to its latent and back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import check_t, fitted_image, open_model, pick_sampling
from ddpm_cli.cli.output import check_scale, deliver, pick_target, read_input
from ddpm_cli.errors import UsageError
from ddpm_cli.names import FORMATS

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["EXAMPLES", "invert"]

EXAMPLES = """
Examples:
  ddpm invert cat.jpg -o there-and-back.png
  ddpm invert cat.jpg --format safetensors -o cat.safetensors
"""

_COLUMNS = 6  # of the strip


def invert(
    image: Annotated[str, typer.Argument(metavar="IMG|-", help="An image file, or - for stdin.")],
    model: options.Model = None,
    t: Annotated[
        int | None,
        typer.Option("--t", min=1, metavar="T", help="The timestep to go up to. Default: the last one, noise."),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            min=0,
            metavar="N",
            help="Solve each step with at most N iterations. 0: plain DDIM inversion, which drifts. Default: 30.",
        ),
    ] = None,
    form: Annotated[
        str,
        options.named("--format", FORMATS, help="png: a labelled strip, there and back. safetensors: the latent."),
    ] = "png",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png, .jpg, .webp or .safetensors file, or - for stdout. "
            "Default: <name>-latent.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    steps: options.SamplerSteps = None,
    spacing: options.Spacing = None,
    weights: options.Weights = "ema",
    background: options.Background = "white",
    scale: options.Scale = None,
    preview: options.Preview = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Turn an image into its latent: the noise from which the sampler ddim returns to it.

    Then go back, and say how far that is from the image.
    """
    console = Console("invert", as_json, quiet, preview)
    if form == "png" and output and output.endswith(".safetensors"):
        raise UsageError(f"-o {output}: --format png cannot write .safetensors", "Add --format safetensors.")
    suffixes = (".safetensors",) if form == "safetensors" else (".png", ".jpg", ".jpeg", ".webp")
    stem = "stdin" if image == "-" else Path(image).stem
    target = pick_target(output, f"{stem}-latent.{form}", suffixes, console, force)
    check_scale(scale, target, form)
    data, called = read_input(image)

    import torch

    from ddpm_cli.data import images, pictures
    from ddpm_cli.diffusion.inversion import ITERATIONS
    from ddpm_cli.diffusion.noised_image import Noised, from_paper, to_paper
    from ddpm_cli.models.latents import difference

    images.check_background(background)
    ddpm = open_model(console, model, device, precision, weights)
    check_t(ddpm, t)
    sampling = pick_sampling(ddpm, "ddim", steps, from_paper(t or ddpm.schedule.T), spacing=spacing)
    most = ITERATIONS if iterations is None else iterations
    x_0 = fitted_image(ddpm, data, called, background)
    taken = len(sampling.timesteps)
    wanted = {round(i * taken / (_COLUMNS - 1)) for i in range(_COLUMNS)}
    up, back = [], []
    with console.bar("inverting", taken) as update:
        for i, step in enumerate(ddpm.invert(x_0, sampling, most)):
            if i in wanted:
                up.append(step)
            update(i)
    latent = step.x_t
    with console.bar("denoising", taken) as update:
        for i, step in enumerate(ddpm.sample_loop(latent, sampling)):
            if taken - i in wanted:
                back.append(step)
            update(i)
    error = difference(step.x_t, x_0)
    how = f"with at most {most} iterations a step" if most else "without iterations"
    console.note(
        f"sampler {sampling.describe()}, run upwards {how}: "
        f"a latent of mean {latent.mean():.2f} and deviation {latent.std(correction=0):.2f}"
    )
    console.note(
        f"the way back: RMSE {error.rmse:.2g} and at most {error.largest:.2g} of 255, PSNR {error.psnr:.1f} dB"
        f"{'; every pixel is the same' if error.largest < 0.5 else ''}"
    )
    if error.largest >= 0.5:
        exact = ddpm.unet.conv_in.weight.dtype == torch.float32
        advice = "more --steps" if exact else "--precision fp32, then more --steps"
        console.note(f"to come closer: {'more --iterations' if most < ITERATIONS else advice}")

    rows = [torch.cat([images.to_uint8(step.x_t).cpu() for step in row]) for row in (up, back[::-1])]
    labels = [f"t={to_paper(step.t)}" for step in up]

    def draw(scale: int | None) -> Image.Image:
        return pictures.strip(rows, labels, ("up", "back"), scale=scale)

    console.show(draw)
    if form == "safetensors":
        noised = Noised(latent.cpu(), to_paper(sampling.timesteps[-1]), 0, ddpm.schedule_config)
        result = noised.to_bytes()
        name = "-" if target.path is None else str(target.path)
        settings = {"-m": model, "--weights": weights, "--device": device, "--precision": precision}
        given = [f"{key} {shlex.quote(value)}" for key, value in settings.items() if value not in (None, "ema", "auto")]
        plan = f"--sampler ddim --steps {taken} --spacing {sampling.spacing}"
        console.note(f"to go back: ddpm denoise-trace {shlex.quote(name)} {' '.join([*given, plan])} -o back.png")
    else:
        result = pictures.picture_bytes(draw(scale), target.suffix)
    fields = {"t": to_paper(sampling.timesteps[-1]), **sampling.facts(), "iterations": most, "format": form}
    psnr = None if error.rmse == 0 else round(error.psnr, 2)
    deliver(target, result, console, **fields, rmse=error.rmse, largest=error.largest, psnr=psnr)
