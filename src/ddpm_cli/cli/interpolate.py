"""`ddpm interpolate`: images between two images, or between two seeds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import check_t, fitted_image, note_sampling, open_model, pick_sampling
from ddpm_cli.cli.output import Target, check_scale, deliver, pick_target, read_input
from ddpm_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    from ddpm_cli.diffusion.samplers import Sampling
    from ddpm_cli.models.ddpm import DDPM

__all__ = ["EXAMPLES", "interpolate"]

EXAMPLES = """
Examples:
  ddpm interpolate a.png b.png --t 250,500,750 -n 9 -o between.png
  ddpm interpolate a.png b.png --via latent -o between.gif
  ddpm interpolate seed:1 seed:2 -o between.webp
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_END = typer.Argument(metavar="IMG|-|seed:N", help="An image file, - for stdin, or the noise of a seed, as seed:7.")


def interpolate(
    a: Annotated[str, _END],
    b: Annotated[str, _END],
    model: options.Model = None,
    t: Annotated[
        str | None,
        typer.Option(
            "--t",
            metavar="T[,T…]",
            help="The timesteps to mix images at: a row for each. Default: a quarter, half and three quarters of all.",
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "-n",
            min=2,
            metavar="N",
            help="Pictures in a row, with both ends. Default: 9, or 33 in an animation.",
        ),
    ] = None,
    via: Annotated[
        str | None,
        options.named(
            "--via",
            ("noise", "latent"),
            help="noise: mix images that were noised to --t, as in Fig. 8. latent: mix latents, from ddpm invert or of "
            "seeds, spherically. Default: noise, or latent with a seed.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png or .jpg file: a labelled table. A .gif or .webp file: an animation, forth and back. DIR/: one "
            "PNG per picture. -: a table on stdout. Default: interpolation.png at a terminal, stdout in a pipe.",
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
    scale: options.Scale = None,
    preview: options.Preview = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Make images between two images, or between two seeds.

    The row t=0 or `pixels` is the plain mixture of the pixels.
    """
    console = Console("interpolate", as_json, quiet, preview)
    seeds = [_seed_of(end) for end in (a, b)]
    via = via or ("noise" if seeds == [None, None] else "latent")
    ts = _check(a, b, seeds, via, t)
    target = pick_target(output, "interpolation.png", _SUFFIXES, console, force, folders=True)
    check_scale(scale, target)
    sources = [read_input(end) if number is None else None for end, number in zip((a, b), seeds, strict=True)]

    import torch

    from ddpm_cli.data import images, pictures
    from ddpm_cli.diffusion.interpolation import linear, spherical
    from ddpm_cli.diffusion.noised_image import from_paper
    from ddpm_cli.models.latents import denoise_alike, mixed

    images.check_background(background)
    ddpm = open_model(console, model, device, precision, weights)
    T = ddpm.schedule.T
    check_t(ddpm, max(ts, default=None))
    own: dict[str, Any] = {"spacing": spacing, "eta": eta, "order": order, "updates": updates}
    ends = [None if source is None else fitted_image(ddpm, *source, background) for source in sources]
    count = n or (33 if target.suffix in pictures.ANIMATION_SUFFIXES else 9)
    shares = torch.linspace(0, 1, count, dtype=torch.float64)  # lambda, the share of b

    if via == "noise":
        ts = ts or sorted({max(1, T * quarter // 4) for quarter in (1, 2, 3)})
        samplings = [pick_sampling(ddpm, sampler, steps, from_paper(at), **own) for at in ts]
        image_a, image_b = (end for end in ends if end is not None)
        states = [mixed(ddpm, image_a, image_b, from_paper(at), shares, seed) for at in ts]
        labels = [f"t={at}" for at in (0, *ts)]
    else:
        name = sampler or ("ddim" if any(sources) else "dpm++")
        if name == "dpm++" and eta is None:
            own["eta"] = 0.0  # images must be a function of their latents
        sampling = pick_sampling(ddpm, name, steps, **own)
        _check_latents(sampling, any(sources))
        of_a, of_b = (_latent(console, ddpm, sampling, *end) for end in zip(ends, seeds, strict=True))
        samplings, states, labels = [sampling], [spherical(of_a, of_b, shares)], ["pixels", "latent"]
    note_sampling(console, ddpm, samplings[-1])

    rows, done = [], 0
    with console.bar("denoising, images x evaluations", len(shares) * sum(s.evaluations for s in samplings)) as update:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            update(done)

        for state, sampling in zip(states, samplings, strict=True):
            rows.append(torch.cat(list(denoise_alike(ddpm, state, sampling, seed, progress))))
    # A seed's end is the image that was made from it.
    made = rows[0][:1], rows[0][-1:]
    first, last = (images.to_float(drawn) if end is None else end for end, drawn in zip(ends, made, strict=True))
    rows = [images.to_uint8(linear(first, last, shares)), *rows]

    fields = {"via": via, "t": [0, *ts] if via == "noise" else [T], "n": len(shares), "seed": seed}
    fields |= {**samplings[-1].facts(), "steps": [len(s.timesteps) for s in samplings]}
    some = pictures.evenly(len(shares), 9)  # an animation has more than fit into a terminal
    console.show(lambda scale: _table([row[some] for row in rows], labels, shares[some].tolist(), scale))
    if target.folder:
        _write_folder(target, rows, labels)
        console.result(str(target.path), output=str(target.path), **fields)
    else:
        deliver(target, _picture(rows, labels, shares.tolist(), target.suffix, scale), console, **fields)


def _seed_of(end: str) -> int | None:
    """The number in `seed:7`; None for an image. Raises UsageError if it is not a whole number."""
    if not end.startswith("seed:"):
        return None
    if not re.fullmatch(r"[0-9]{1,18}", end[5:]):
        raise UsageError(f"{end}: not a seed", "Write seed:7, or ./seed:… for a file of this name.")
    return int(end[5:])


def _check(a: str, b: str, seeds: Sequence[int | None], via: str, t: str | None) -> list[int]:
    """Refuse what cannot be mixed, before any work is done. Returns the timesteps in --t above 0, ascending."""
    if a == b == "-":
        raise UsageError("-: stdin holds one image, not two", "Give the other one as a file.")
    if via == "noise" and seeds != [None, None]:
        seed = b if seeds[0] is None else a
        raise UsageError(f"--via noise: {seed} is noise already, so there is no image to add noise to", "Leave it out.")
    if t is None:
        return []
    if via == "latent":
        raise UsageError(f"--t {t}: latents are noise, at the last timestep", "--t belongs to two images, --via noise.")
    ts = sorted(set(options.parse_ts(t)) - {0})
    if not ts:
        raise UsageError(f"--t {t}: the mixture of the pixels, which is always shown", "Give timesteps above 0.")
    return ts


def _check_latents(sampling: Sampling, inverts: bool) -> None:
    """Raises UsageError unless the images at the ends are a function of their latents, and back if `inverts`."""
    name = "--eta" if sampling.settings.get("eta") else f"--sampler {sampling.sampler}"
    if inverts and (sampling.sampler != "ddim" or sampling.is_random):
        raise UsageError(f"{name}: only ddim without noise can be run upwards, from an image to its latent")
    if sampling.is_random:
        raise UsageError(
            f"{name}: draws noise, so the ends would not be the images of their seeds",
            "Use --sampler dpm++ or ddim, without --eta.",
        )


def _latent(console: Console, ddpm: DDPM, sampling: Sampling, image: Tensor | None, seed: int | None) -> Tensor:
    """x_T of an image, or of image 0 of a seed: (1, C, H, W) on the CPU."""
    from ddpm_cli.rng import ImageNoise

    if image is None:
        assert seed is not None
        return ImageNoise(seed, [0], ddpm.shape)()
    with console.bar("inverting", len(sampling.timesteps)) as update:
        for i, step in enumerate(ddpm.invert(image, sampling)):
            latent = step.x_t
            update(i)
    return latent.cpu()


def _table(rows: list[Tensor], labels: list[str], shares: list[float], scale: int | None) -> Image.Image:
    from ddpm_cli.data import pictures

    return pictures.strip(rows, [f"{share:.3g}" for share in shares], labels, scale=scale)


def _picture(rows: list[Tensor], labels: list[str], shares: list[float], suffix: str, scale: int | None) -> bytes:
    from ddpm_cli.data import pictures

    if suffix in pictures.ANIMATION_SUFFIXES:
        frames = [pictures.strip([row[i : i + 1] for row in rows], [], labels, scale=scale) for i in range(len(shares))]
        return pictures.animate(frames, suffix, back=True)
    return pictures.picture_bytes(_table(rows, labels, shares, scale), suffix)


def _write_folder(target: Target, rows: list[Tensor], labels: list[str]) -> None:
    """One PNG per picture, such as 003-t0500.png and 003-pixels.png."""
    from ddpm_cli.data import images, pictures
    from ddpm_cli.files import write_file

    assert target.path is not None
    for label, row in zip(labels, rows, strict=True):
        name = f"t{int(label[2:]):04d}" if label.startswith("t=") else label
        for i, tile in enumerate(row):
            data = pictures.picture_bytes(images.to_pil(tile))
            write_file(target.path / f"{i:03d}-{name}.png", data, sync=False)
