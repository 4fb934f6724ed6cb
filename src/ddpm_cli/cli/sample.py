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
from ddpm_cli.cli.output import Target, check_scale, deliver, pick_target
from ddpm_cli.errors import UsageError
from ddpm_cli.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_cli.models.ddpm import DDPM

__all__ = ["EXAMPLES", "sample"]

EXAMPLES = """
Examples:
  ddpm sample --n 64 -o grid.png
  ddpm sample --sampler ddpm -o exact.png
  ddpm sample -m google/ddpm-cifar10-32 --n 1000 -o images/
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".npz")
_SHOWN = 64  # the most images that a preview shows


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
            help="A .png, .jpg or .webp file: a grid, or the image itself if N is 1. DIR/: one PNG per image. A .npz "
            "file: an array (N, H, W, C). -: a grid on stdout. Default: samples.png at a terminal, stdout in a pipe.",
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
    scale: options.Scale = None,
    preview: options.Preview = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    compiled: options.Compile = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Sample new images from a model.

    Image number i of a seed is always the same, whatever --n and --batch-size are.
    """
    from ddpm_cli.cli.drawing import draw_into
    from ddpm_cli.distributed import process_group
    from ddpm_cli.models.sample_folder import RECORD

    with ExitStack() as held, process_group() as world:
        console = Console("sample", as_json, quiet or not world.is_main, preview)

        def place() -> Target:
            found = pick_target(output, "samples.png", _SUFFIXES, console, force, folders=True, goes_on=RECORD)
            if world.size > 1 and not found.folder:
                raise UsageError(f"{world.size} processes can only write into a folder", "Use -o DIR/.")
            check_scale(scale, found)
            return found

        target = world.on_main(place)
        ddpm = open_model(console, model, device, precision, weights, world, compiled)
        own: dict[str, Any] = {"spacing": spacing, "eta": eta, "order": order, "updates": updates}
        sampling = world.on_main(lambda: pick_sampling(ddpm, sampler, steps, **own))
        note_sampling(console, ddpm, sampling)

        started = time.perf_counter()
        data, drawn = None, n
        first: list[Tensor] = []  # the images that a preview shows
        if target.folder:
            assert target.path is not None
            drawn = draw_into(
                console, world, held, ddpm, sampling, target.path, n, seed=seed, batch_size=batch_size, force=force
            )
        else:
            done = 0
            with console.bar("sampling, images x evaluations", n * sampling.evaluations) as update:

                def progress(count: int) -> None:
                    nonlocal done
                    done += count
                    update(done)

                batches = ddpm.sample_batches(range(n), sampling, seed, batch_size, progress)
                data = _file(target, n, scale, _kept(batches, first))
        seconds = round(time.perf_counter() - started, 3)
        fields = {"n": n, "seed": seed, **sampling.facts(), "evaluations": sampling.evaluations, "seconds": seconds}
        console.note(f"sampled {counted(drawn, 'image')} in {seconds:.1f} s")
        if preview and world.is_main:
            _show(console, ddpm, target, n, first)
        if data is not None:
            deliver(target, data, console, **fields)
        elif world.is_main:
            console.result(str(target.path), output=str(target.path), drawn=drawn, **fields)


def _kept(batches: Iterator[Tensor], first: list[Tensor]) -> Iterator[Tensor]:
    """The batches as they come; the first images of them are added to `first`."""
    for batch in batches:
        first.extend(batch[: _SHOWN - len(first)])
        yield batch


def _show(console: Console, ddpm: DDPM, target: Target, n: int, first: list[Tensor]) -> None:
    """Show the first images in the terminal. Those in a folder are read from there, since any process drew them."""
    import torch

    from ddpm_cli.data import pictures
    from ddpm_cli.models.sample_folder import Drawn

    if target.folder:
        assert target.path is not None
        images = Drawn(target.path, n, ddpm.shape)[torch.arange(min(n, _SHOWN))]
    else:
        images = torch.stack(first)
    console.show(lambda scale: pictures.grid(images, scale))


def _file(target: Target, n: int, scale: int | None, batches: Iterator[Tensor]) -> bytes:
    """Sample n images into the bytes of a file."""
    from ddpm_cli.data import pictures

    if target.suffix == ".npz":
        return pictures.npz_bytes(batches, n)
    import torch

    return pictures.picture_bytes(pictures.grid(torch.cat(list(batches)), scale), target.suffix)
