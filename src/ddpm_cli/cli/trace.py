"""`ddpm denoise-trace`: the reverse process, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import note_sampling, open_model, pick_sampling
from ddpm_cli.cli.output import Target, deliver, pick_target, read_input
from ddpm_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_cli.diffusion.noised_image import Noised
    from ddpm_cli.models.ddpm import DDPM

__all__ = ["EXAMPLES", "denoise_trace"]

EXAMPLES = """
Examples:
  ddpm denoise-trace -o trace.gif
  ddpm denoise-trace cat.jpg --t 500 --frames 10 -o trace.png
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_ROWS = {"xt": ("x_t",), "x0": ("x_0",), "both": ("x_t", "x_0")}


def denoise_trace(
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMG|-",
            help="An image, which is first noised to --t, or the output of ddpm noise --format safetensors. "
            "- is stdin. Default: start from pure noise.",
        ),
    ] = None,
    model: options.Model = None,
    t: Annotated[
        int | None,
        typer.Option(
            "--t", min=1, metavar="T", help="The timestep to start an image from. Default: half of all steps."
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", min=2, metavar="N", help="Number of states to show. Default: 10, or 50 in an animation."
        ),
    ] = None,
    show: Annotated[
        str,
        typer.Option("--show", metavar="NAME", help="xt: the states. x0: the clean image predicted from each. both."),
    ] = "both",
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png or .jpg file: a labelled strip. A .gif or .webp file: an animation. DIR/: one PNG per frame. "
            "-: a strip on stdout. Default: trace.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    sampler: options.Sampler = None,
    steps: options.SamplerSteps = None,
    spacing: options.Spacing = None,
    eta: options.Eta = None,
    order: options.Order = None,
    updates: options.Updates = None,
    weights: options.Weights = "ema",
    background: options.Background = "white",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Show the reverse process: how the model turns noise into an image.

    The pictures are the states x_t,
    and the clean image x_0 that the model predicts from each.
    """
    console = Console("denoise-trace", as_json, quiet)
    if show not in _ROWS:
        raise UsageError(f"--show {show} is not one of {', '.join(_ROWS)}")
    target = pick_target(output, "trace.png", _SUFFIXES, console, force, folders=True)
    source = None if image is None else read_input(image)

    from ddpm_cli.data import images, pictures
    from ddpm_cli.diffusion.noised_image import from_paper, to_paper
    from ddpm_cli.rng import ImageNoise

    images.check_background(background)
    ddpm = open_model(console, model, device, precision, weights)
    T = ddpm.schedule.T
    if t is not None and t > T:
        raise UsageError(f"--t {t}: the last step of this model is t={T}, pure noise")
    noise = ImageNoise(seed, [0], ddpm.shape)
    if source is None:
        if t not in (None, T):
            raise UsageError(
                f"--t {t}: without an image the start is pure noise, t={T}", "Give an image to start from another t."
            )
        start, x_t = T, noise()
    else:
        noised = _noised(ddpm, *source, t, seed, background, console)
        start, x_t = noised.t, noised.x_t
    own: dict[str, Any] = {"spacing": spacing, "eta": eta, "order": order, "updates": updates}
    sampling = pick_sampling(ddpm, sampler, steps, from_paper(start), **own)
    note_sampling(console, ddpm, sampling)
    taken = sampling.evaluations

    animated = target.suffix in pictures.ANIMATION_SUFFIXES
    count = min(frames or (50 if animated else 10), taken + 1)
    wanted = {round(i * taken / (count - 1)) for i in range(count)}
    kept: list[tuple[int, Tensor, Tensor]] = []
    with console.bar("denoising", taken) as update:
        for i, step in enumerate(ddpm.sample_loop(x_t, sampling, noise=noise)):
            if i in wanted:
                kept.append((to_paper(step.t), images.to_uint8(step.x_t).cpu(), images.to_uint8(step.x_0).cpu()))
            update(i)

    fields = {"t": [at for at, _, _ in kept], "seed": seed, **sampling.facts()}
    if target.folder:
        _write_folder(target, kept, show)
        console.result(str(target.path), output=str(target.path), **fields)
    else:
        deliver(target, _picture(kept, show, target.suffix), console, **fields)


def _noised(ddpm: DDPM, data: bytes, name: str, t: int | None, seed: int, background: str, console: Console) -> Noised:
    """The state to start from: `data` if it is a noised image already, else the image in it noised to step t."""
    from ddpm_cli.data import images
    from ddpm_cli.diffusion.noised_image import Noised
    from ddpm_cli.rng import ImageNoise

    channels, size, _ = ddpm.shape
    if not Noised.looks_like(data):
        fitted = images.fit(images.decode(data, name, channels, background), size)
        x_0 = images.to_float(images.from_pil(fitted))[None]
        noise = ImageNoise(seed, [0], ddpm.shape, "forward")
        return Noised.make(x_0, t or ddpm.schedule.T // 2, seed, ddpm.schedule_config, noise)
    noised = Noised.from_bytes(data, name)
    if t not in (None, noised.t):
        raise UsageError(f"--t {t}: {name} was noised to t={noised.t}", "Leave --t out.")
    if noised.t == 0:
        raise UsageError(f"{name}: was noised to t=0, so there is nothing to denoise")
    from ddpm_cli.diffusion.schedule import make_betas

    if not make_betas(noised.schedule).equal(make_betas(ddpm.schedule_config)):
        raise UsageError(
            f"{name}: was noised with another schedule than this model's",
            "Give the image itself: ddpm denoise-trace IMG --t N",
        )
    small = noised.fitted(channels, size, ImageNoise(noised.seed, [0], ddpm.shape, "fit"))
    if small is not noised:
        _, _, height, width = noised.x_t.shape
        console.note(
            f"{name}: reduced from {width}x{height} to the model's {size}x{size}, "
            f"with noise added to stay at t={noised.t}"
        )
    return small


def _picture(kept: list[tuple[int, Tensor, Tensor]], show: str, suffix: str) -> bytes:
    import torch

    from ddpm_cli.data import pictures

    labels = [f"t={t}" for t, _, _ in kept]
    rows = {"x_t": [x_t for _, x_t, _ in kept], "x_0": [x_0 for _, _, x_0 in kept]}
    chosen = _ROWS[show]
    if suffix in pictures.ANIMATION_SUFFIXES:
        pairs = zip(labels, *(rows[row] for row in chosen), strict=True)
        return pictures.animate(
            [pictures.strip([torch.cat(tiles)], [label, *chosen[1:]]) for label, *tiles in pairs], suffix
        )
    return pictures.picture_bytes(pictures.strip([torch.cat(rows[row]) for row in chosen], labels, chosen), suffix)


def _write_folder(target: Target, kept: list[tuple[int, Tensor, Tensor]], show: str) -> None:
    from ddpm_cli.data import images, pictures
    from ddpm_cli.files import write_file

    assert target.path is not None
    for i, (t, x_t, x_0) in enumerate(kept):
        for row, tile in (("x_t", x_t), ("x_0", x_0)):
            if row in _ROWS[show]:
                data = pictures.picture_bytes(images.to_pil(tile[0]))
                write_file(target.path / f"{i:03d}-t{t:04d}-{row.replace('_', '')}.png", data, sync=False)
