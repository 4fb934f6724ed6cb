"""`ddpm denoise-trace`: the reverse process, step by step, and what samples share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import check_t, note_sampling, open_model, pick_sampling
from ddpm_cli.cli.output import Target, check_scale, deliver, pick_target, read_input
from ddpm_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_cli.cli.trace_input import Start
    from ddpm_cli.diffusion.samplers import Noise, Sampling
    from ddpm_cli.models.ddpm import DDPM

__all__ = ["EXAMPLES", "denoise_trace"]

EXAMPLES = """
Examples:
  ddpm denoise-trace -o trace.gif
  ddpm denoise-trace cat.jpg --t 500 --frames 10 -o trace.png
  ddpm denoise-trace --n 4 --share-from 1000,750,500,250 -o shared.png
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_MOST = 64  # traces at once
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
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "-n",
            min=1,
            max=_MOST,
            metavar="N",
            help="Number of traces, or of samples from each shared state. Default: 1, or 4 with --share-from.",
        ),
    ] = None,
    share_from: Annotated[
        str | None,
        typer.Option(
            "--share-from",
            metavar="T[,T…]",
            help="Show samples that share the state x_t, in a row for each t, instead of traces. They are drawn with "
            "--sampler ddpm, unless you choose another.",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames",
            min=2,
            metavar="N",
            help="Number of states to show, at most one more than there are steps. Default: 10, or 50 in an animation.",
        ),
    ] = None,
    show: Annotated[
        str,
        options.named("--show", _ROWS, help="xt: the states. x0: the clean image predicted from each. both."),
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
    scale: options.Scale = None,
    preview: options.Preview = False,
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
    --share-from shows how much of an image is decided at t.
    """
    console = Console("denoise-trace", as_json, quiet, preview)
    ts = _shared_ts(share_from, output, t, frames, show) if share_from is not None else None
    target = pick_target(output, "trace.png", _SUFFIXES, console, force, folders=True)
    check_scale(scale, target)
    source = None if image is None else read_input(image)

    from ddpm_cli.cli.trace_input import Start
    from ddpm_cli.data.images import check_background
    from ddpm_cli.diffusion.noised_image import from_paper
    from ddpm_cli.rng import ImageNoise

    check_background(background)
    ddpm = open_model(console, model, device, precision, weights)
    T = ddpm.schedule.T
    for flag, value in [("--t", t), *(("--share-from", t) for t in ts or ())]:
        check_t(ddpm, value, flag)
    begun = Start(ddpm, *source, seed, background, console.note) if source else None
    own: dict[str, Any] = {"spacing": spacing, "eta": eta, "order": order, "updates": updates}
    if ts is not None:
        sampling = pick_sampling(ddpm, sampler or "ddpm", steps, **own)
        _require_noise(sampling, "samples from one state")
        note_sampling(console, ddpm, sampling)
        _share(ddpm, begun, ts, n or 4, sampling, target, scale, console, seed)
        return
    noise = ImageNoise(seed, range(n or 1), ddpm.shape)
    if begun:
        first, x_t = begun.at("--t", t, n or 1)
    elif t in (None, T):
        first, x_t = T, noise()
    else:
        raise UsageError(
            f"--t {t}: without an image the start is pure noise, t={T}", "Give an image to start from another t."
        )
    sampling = pick_sampling(ddpm, sampler, steps, from_paper(first), **own)
    if len(x_t) > 1 and x_t.eq(x_t[:1]).all():
        _require_noise(sampling, "traces")
    note_sampling(console, ddpm, sampling)
    _trace(ddpm, x_t, noise, sampling, frames, _ROWS[show], target, scale, console, seed)


def _shared_ts(text: str, output: str | None, t: int | None, frames: int | None, show: str) -> list[int]:
    """The values of --share-from. Raises UsageError, also for options that it does not go with."""
    ts = options.parse_ts(text, "--share-from")
    if min(ts) < 1:
        raise UsageError("--share-from 0: t=0 is the image itself, so there is nothing to sample")
    for flag, given in (("--t", t), ("--frames", frames), ("--show", show != "both")):
        if given:
            raise UsageError(f"{flag}: does not go with --share-from, which shows no traces")
    if output and output.lower().endswith((".gif", ".webp")):
        raise UsageError(f"-o {output}: --share-from gives no animation", "Use .png, .jpg or a folder.")
    return ts


def _require_noise(sampling: Sampling, what: str) -> None:
    if not sampling.is_random:
        raise UsageError(
            f"--sampler {sampling.sampler}: draws no noise here, so all {what} would be the same",
            "Use --sampler ddpm, or --eta 1.",
        )


def _trace(
    ddpm: DDPM,
    x_t: Tensor,
    noise: Noise,
    sampling: Sampling,
    frames: int | None,
    rows: tuple[str, ...],
    target: Target,
    scale: int | None,
    console: Console,
    seed: int,
) -> None:
    """Run the traces and write some of their states."""
    from ddpm_cli.cli.trace_output import FRAMES, Frame, animation, trace_sheet, write_trace
    from ddpm_cli.data.images import to_uint8
    from ddpm_cli.data.pictures import ANIMATION_SUFFIXES, evenly, picture_bytes
    from ddpm_cli.diffusion.noised_image import to_paper

    taken = sampling.evaluations
    animated = target.suffix in ANIMATION_SUFFIXES
    wanted = set(evenly(taken + 1, frames or (50 if animated else FRAMES)))
    if frames and frames > taken + 1:
        console.warn(f"--frames {frames}: {taken} steps have {taken + 1} states; more --steps have more")
    kept: list[Frame] = []
    with console.bar("denoising", taken) as update:
        for i, step in enumerate(ddpm.sample_loop(x_t, sampling, noise=noise)):
            if i in wanted:
                kept.append(Frame(to_paper(step.t), to_uint8(step.x_t).cpu(), to_uint8(step.x_0).cpu()))
            update(i)

    fields = {"t": [frame.t for frame in kept], "n": len(x_t), "seed": seed, **sampling.facts()}
    some = [kept[i] for i in evenly(len(kept), FRAMES)]  # an animation has more than fit into a terminal
    console.show(lambda scale: trace_sheet(some, rows, scale))
    if target.folder and target.path:
        write_trace(target.path, kept, rows)
        console.result(str(target.path), output=str(target.path), **fields)
    elif animated:
        deliver(target, animation(kept, rows, target.suffix, scale), console, **fields)
    else:
        deliver(target, picture_bytes(trace_sheet(kept, rows, scale), target.suffix), console, **fields)


def _share(
    ddpm: DDPM,
    begun: Start | None,
    ts: list[int],
    n: int,
    sampling: Sampling,
    target: Target,
    scale: int | None,
    console: Console,
    seed: int,
) -> None:
    """Draw and write samples from a state at each of the paper's `ts`, of the image in `begun` if there is one."""
    from ddpm_cli.cli.trace_output import Shared, shared_sheet, write_shared
    from ddpm_cli.data.images import to_uint8
    from ddpm_cli.data.pictures import picture_bytes
    from ddpm_cli.diffusion.noised_image import from_paper
    from ddpm_cli.models.sharing import below, evaluations_to, sample_from, state_at

    places = [from_paper(t) for t in ts]
    total = sum(n * below(sampling, place).evaluations for place in places)
    if begun is None:
        total += sum(evaluations_to(sampling, place) for place in places)
    done = 0
    parts: list[Shared] = []
    with console.bar("denoising, images x evaluations", total) as update:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            update(done)

        for t, place in zip(ts, places, strict=True):
            if begun:
                _, x_t = begun.at("--share-from", t, 1)
            else:
                x_t = state_at(ddpm, place, sampling, seed, progress)
            samples = sample_from(ddpm, x_t, place, n, sampling, seed, progress)
            parts.append(Shared(t, to_uint8(x_t).cpu(), samples))

    fields = {"t": ts, "n": n, "seed": seed, **sampling.facts()}
    console.show(lambda scale: shared_sheet(parts, scale))
    if target.folder and target.path:
        write_shared(target.path, parts)
        console.result(str(target.path), output=str(target.path), **fields)
    else:
        deliver(target, picture_bytes(shared_sheet(parts, scale), target.suffix), console, **fields)
