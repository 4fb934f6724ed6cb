"""`ddpm sample`: new images from a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.model import note_sampling, open_model, pick_sampling
from ddpm_cli.cli.output import Target, deliver, pick_target
from ddpm_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EXAMPLES", "sample"]

EXAMPLES = """
Examples:
  ddpm sample --n 64 -o grid.png
  ddpm sample --sampler ddpm -o exact.png
  ddpm sample -m google/ddpm-cifar10-32 --n 1000 -o images/
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".npz")


def sample(
    model: options.Model = None,
    n: Annotated[
        int, typer.Option("--n", "-n", parser=options.parse_count, metavar="N", help="Number of images.")
    ] = 64,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png, .jpg or .webp file: a grid. DIR/: one PNG per image. A .npz file: an array (N, H, W, C). "
            "-: a grid on stdout. Default: samples.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    sampler: options.Sampler = None,
    steps: options.SamplerSteps = None,
    spacing: options.Spacing = None,
    eta: options.Eta = None,
    order: options.Order = None,
    updates: options.Updates = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", parser=options.parse_count, metavar="N", help="Images per batch.")
    ] = 64,
    weights: options.Weights = "ema",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Sample new images from a model.

    Image number i of a seed is always the same, whatever --n and --batch-size are.
    """
    from ddpm_cli.distributed import process_group
    from ddpm_cli.models.sample_folder import RECORD, made_with, opened

    with ExitStack() as held, process_group() as world:
        console = Console("sample", as_json, quiet or not world.is_main)

        def place() -> Target:
            found = pick_target(output, "samples.png", _SUFFIXES, console, force, folders=True, goes_on=RECORD)
            if world.size > 1 and not found.folder:
                raise UsageError(f"{world.size} processes can only write into a folder", "Use -o DIR/.")
            return found

        target = world.on_main(place)
        ddpm = open_model(console, model, device, precision, weights, world)
        own: dict[str, Any] = {"spacing": spacing, "eta": eta, "order": order, "updates": updates}
        sampling = world.on_main(lambda: pick_sampling(ddpm, sampler, steps, **own))
        note_sampling(console, ddpm, sampling)

        def todo() -> list[int]:
            if not target.path or not target.folder:
                return list(range(n))
            record = made_with(ddpm, sampling, seed)
            missing = held.enter_context(opened(target.path, n, record, force, console.warn))
            if len(missing) < n:
                console.note(f"{n - len(missing)} of {n} images exist already")
            return missing

        left = world.on_main(todo)
        rows = world.rows(len(left))
        mine = left[rows.start : rows.stop]
        started = time.perf_counter()
        done = 0
        with console.bar("sampling, images x evaluations", len(left) * sampling.evaluations) as update:

            def progress(count: int) -> None:
                nonlocal done
                done += count * world.size  # the other processes have done about as much
                update(done)

            batches = ddpm.sample_batches(mine, sampling, seed, batch_size, progress)
            data = _draw(target, mine, batches)
        world.barrier()
        seconds = round(time.perf_counter() - started, 3)
        fields = {"n": n, "seed": seed, **sampling.facts(), "evaluations": sampling.evaluations, "seconds": seconds}
        console.note(f"sampled {len(left)} images in {seconds:.1f} s")
        if data is not None:
            deliver(target, data, console, **fields)
        elif world.is_main:
            console.result(str(target.path), output=str(target.path), drawn=len(left), **fields)


def _draw(target: Target, numbers: list[int], batches: Iterator[Tensor]) -> bytes | None:
    """Sample the images into a folder, or into the bytes of a file."""
    from ddpm_cli.data import pictures
    from ddpm_cli.models.sample_folder import fill

    if target.folder:
        assert target.path is not None
        fill(target.path, numbers, batches)
        return None
    if target.suffix == ".npz":
        return pictures.npz_bytes(batches, len(numbers))
    import torch

    return pictures.picture_bytes(pictures.grid(torch.cat(list(batches))), target.suffix)
