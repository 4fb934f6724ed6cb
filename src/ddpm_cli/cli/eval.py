"""`ddpm eval`: bits per dimension, FID, KID, Inception score, precision and recall."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.errors import UsageError
from ddpm_cli.names import FITS, check_name

__all__ = ["EXAMPLES", "eval"]

EXAMPLES = """
Examples:
  ddpm eval runs/cats
  ddpm eval runs/cats --metrics bpd --terms 50
  ddpm eval google/ddpm-cifar10-32 --data cifar10/ --metrics fid -n 50k
  ddpm eval --samples images/ --data cifar10-stats.npz
"""

_METRICS = ("bpd", "fid", "kid", "is", "pr")
_DATA: dict[str, Any] = {"rich_help_panel": "Images and features"}
_BOUND: dict[str, Any] = {"rich_help_panel": "Bits per dimension"}


def _complete_metrics(incomplete: str) -> list[str]:
    """The last of several names."""
    before, comma, _ = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _METRICS if name not in before.split(",")]


def eval(
    model: options.ModelArgument = None,
    address: options.Model = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="IMAGES",
            help="The real images, in whatever form ddpm train takes, or an .npz file with their statistics (mu, "
            "sigma). May be repeated. Default: those of the run. Neither needed nor used for --metrics is.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="NAMES",
            autocompletion=_complete_metrics,
            help="Some of bpd,fid,kid,is,pr. Default: all that are possible.",
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "-n",
            parser=options.parse_count,
            metavar="N",
            help="Draw N samples, and measure bpd on at most N images. Default: 50k; with --samples all of them.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where samples and results are kept. Default: RUN/eval/CHECKPOINT, or eval/NAME.",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples", metavar="PATH", help="Evaluate these images, not a model: a folder or an .npz file.", **_DATA
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            metavar="FILE",
            help="The network that sees the images: weights of FID's Inception, or TorchScript. Default: that "
            "Inception, which is downloaded once (96 MB).",
            **_DATA,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save-statistics", metavar="FILE", help="Also write the real images' statistics to an .npz file.", **_DATA
        ),
    ] = None,
    fit: Annotated[
        str, options.named("--fit", FITS, help="How to make --data square: crop, pad or stretch.", **_DATA)
    ] = "crop",
    background: options.Background = "white",
    terms: Annotated[
        int | None,
        typer.Option(
            "--terms",
            parser=options.parse_count,
            metavar="K",
            help="Estimate the bound from K of its T terms for each image. Default: all terms.",
            **_BOUND,
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
    """Measure a model: bits/dim, FID, KID, Inception score, precision, recall.

    An evaluation that was stopped continues: samples and results are kept.
    Only numbers that were measured alike can be compared, so each says how.
    """
    chosen = _metrics(metrics, samples is not None)
    if samples is not None and (model or address != os.environ.get("DDPM_MODEL")):
        raise UsageError("--samples is evaluated without a model", "Leave MODEL out, or --samples.")
    if samples is not None and not data and chosen != ("is",):
        raise UsageError(
            "--data is missing: the real images",
            "Give a folder, or an .npz file with their statistics. --metrics is needs none.",
        )
    if [samples, *(data or ())].count("-") > 1:
        raise UsageError("-: stdin can be read only once", "Write one of the lists to a file.")
    if terms is not None and terms < 2:
        raise UsageError("--terms 1: a sample needs two terms or more")
    if save is not None and save.suffix != ".npz":
        raise UsageError(f"--save-statistics {save}: the name must end in .npz")
    if save is not None and chosen is not None and not {*chosen} & {"fid", "kid", "pr"}:
        raise UsageError(
            f"--save-statistics: --metrics {','.join(chosen)} computes no statistics of real images",
            "Add fid to --metrics.",
        )
    named = options.one_model(model, address)
    from ddpm_cli.cli.evaluation import Evaluation, Request
    from ddpm_cli.distributed import process_group

    request = Request(
        data=tuple(data or ()),
        metrics=chosen,
        n=n,
        samples=samples,
        features=features,
        terms=terms,
        save=save,
        fit=fit,
        background=background,
        batch_size=batch_size,
        seed=seed,
    )
    sampling: dict[str, Any] = {"sampler": sampler, "steps": steps, "spacing": spacing}
    sampling |= {"eta": eta, "order": order, "updates": updates}
    with ExitStack() as held, process_group() as world:
        console = Console("eval", as_json, quiet or not world.is_main)
        evaluation = Evaluation(request, console, world, held, force)
        if samples is None:
            evaluation.of_model(named, device, precision, weights, sampling, output)
        else:
            evaluation.of_images(samples, device, output)


def _metrics(text: str | None, only_samples: bool) -> tuple[str, ...] | None:
    """None: all that are possible. Raises UsageError for a name that is none, and for the bound of images."""
    if text is None:
        return None
    asked = [part.strip().lower() for part in text.split(",")]
    for name in asked:
        check_name("--metrics", name, _METRICS)
    if only_samples and "bpd" in asked:
        raise UsageError("--metrics bpd is about a model, and --samples are images", "Leave one of the two out.")
    return tuple(name for name in _METRICS if name in asked)
