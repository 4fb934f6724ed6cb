"""`ddpm sample`: new images from a model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import check_steps, load_model
from ddpm_cli.cli.output import deliver, pick_target

__all__ = ["sample"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".npz")


def sample(
    model: options.Model = None,
    n: Annotated[int, typer.Option("--n", "-n", parser=options.parse_count, metavar="N", help="How many images.")] = 64,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="grid.png (.jpg, .webp): a grid. DIR/: one PNG each. x.npz: an array (N, H, W, C). "
            "-: a grid to stdout. Default: samples.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    steps: options.SamplerSteps = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", parser=options.parse_count, metavar="N", help="How many at a time.")
    ] = 64,
    weights: options.Weights = "ema",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Draw new images from a model (Algorithm 2).

    Image number i of a seed is always the same image, however many are drawn and in whatever batches.
    """
    console = Console("sample", as_json, quiet)
    target = pick_target(output, "samples.png", _SUFFIXES, console, force, folders=True)
    ddpm = load_model(console, model, device, precision, weights)
    taken = len(check_steps(ddpm, steps, ddpm.schedule.T - 1))
    if taken < ddpm.schedule.T and ddpm.schedule_config.variance_type == "fixed_large":
        console.note("fewer steps than the model was trained with: using the small variance, beta~_t")

    from ddpm_cli import images
    from ddpm_cli.files import write_file

    started = time.perf_counter()
    done = 0
    with console.bar("sampling, images x steps", n * taken) as update:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            update(done)

        batches = ddpm.sample_batches(n, seed, steps, batch_size, progress)
        if target.folder:
            assert target.path is not None
            i = 0
            for batch in batches:
                for image in batch:
                    write_file(target.path / f"{i:06d}.png", images.picture_bytes(images.to_pil(image)))
                    i += 1
        elif target.suffix == ".npz":
            data = images.npz_bytes(batches, n)
        else:
            import torch

            data = images.picture_bytes(images.grid(torch.cat(list(batches))), target.suffix)
    seconds = round(time.perf_counter() - started, 3)
    fields = {"n": n, "seed": seed, "steps": taken, "seconds": seconds}
    console.note(f"{n} images in {seconds:.1f} s")
    if target.folder:
        console.result(str(target.path), output=str(target.path), **fields)
    else:
        deliver(target, data, console, **fields)
