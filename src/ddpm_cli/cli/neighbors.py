"""`ddpm neighbors`: samples beside their nearest training images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console, columns
from ddpm_cli.cli.output import deliver, pick_target
from ddpm_cli.errors import UsageError
from ddpm_cli.names import FITS

if TYPE_CHECKING:
    from ddpm_cli.cli.terminal_pictures import Draw
    from ddpm_cli.evaluation.collection import Collection
    from ddpm_cli.evaluation.neighbors import Neighbors

__all__ = ["EXAMPLES", "neighbors"]

EXAMPLES = """
Examples:
  ddpm neighbors samples/ --data ./images
  ddpm neighbors samples.npz --data cats --data dogs.zip --k 3 -o nearest.png
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LARGE = 256  # pixels; a single sample that is larger may be a grid
_NAMED = 10  # the most memorised samples that a note names


def neighbors(
    samples: Annotated[
        list[str],
        typer.Argument(
            metavar="SAMPLES",
            help="A folder such as ddpm sample writes, an .npz file, or images in whatever form ddpm train takes.",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="IMAGES", help="The training images, in whatever form ddpm train takes. May be repeated."
        ),
    ],
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=100, metavar="K", help="Nearest images of a sample.")] = 5,
    show: Annotated[
        int,
        typer.Option(
            "--show", min=1, max=500, metavar="N", help="Show the N samples that are most likely to be memorised."
        ),
    ] = 8,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png, .jpg or .webp file, or - for stdout. Default: neighbors.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    fit: Annotated[
        str,
        options.named("--fit", FITS, help="How training made an image square: crop, pad or stretch."),
    ] = "crop",
    background: options.Background = "white",
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Also compare with mirrored images, as training mirrors them.")
    ] = True,
    scale: options.Scale = None,
    preview: options.Preview = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Show samples beside the training images that are nearest to them in pixels.

    A sample counts as memorised if its nearest image is less than
    a third as far away as its second nearest.
    """
    console = Console("neighbors", as_json, quiet, preview)
    if (*samples, *data).count("-") > 1:
        raise UsageError("-: stdin can be read only once", "Write one of the lists to a file.")
    target = pick_target(output, "neighbors.png", _SUFFIXES, console, force)

    from ddpm_cli.data import pictures
    from ddpm_cli.data.cache import cache_folder
    from ddpm_cli.data.images import check_background
    from ddpm_cli.evaluation.collection import open_images, open_samples
    from ddpm_cli.evaluation.neighbors import nearest

    check_background(background)
    cache = cache_folder()
    with console.progress("looking for images") as progress:
        drawn = open_samples(samples, cache, background, progress)
    _, height, width = drawn.pixels.shape
    if len(drawn.pixels) == 1 and max(height, width) > _LARGE:
        console.warn(f"one sample of {width}x{height} pixels: is it a grid? ddpm sample -o samples/ draws its images")
    with console.progress("looking for images") as progress:
        known = open_images(data, drawn.pixels.shape, cache, fit, background, progress)
    for collection in (drawn, known):
        if collection.left_out:
            name, reason = collection.left_out[0]
            console.warn(f"{len(collection.left_out)} files cannot be used, for example {name}: {reason}")
    with console.progress("comparing") as progress:
        found = nearest(drawn.pixels, known.pixels, k, flip, progress)

    names = drawn.names(range(len(drawn.pixels))), known.names(found.indices.flatten().tolist())
    rows = _facts(found, *names)
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["ratio"] if rows[i]["ratio"] is not None else 1.0, i))
    _summary(console, [rows[i] for i in order], len(known.pixels))
    draw = _drawing(drawn, known, found, rows, order[:show])
    console.show(draw)
    deliver(
        target,
        pictures.picture_bytes(draw(scale), target.suffix),
        console,
        samples=len(rows),
        images=len(known.pixels),
        memorised=int(found.memorised.sum()),
        flip=flip,
        neighbors=rows,
    )


def _facts(found: Neighbors, sample_names: dict[int, str], image_names: dict[int, str]) -> list[dict[str, Any]]:
    """The facts about each sample, as --json shows them."""
    rows = []
    for i, (numbers, distances, mirrored, ratio, memorised) in enumerate(
        zip(*(part.tolist() for part in found), strict=True)
    ):
        each = zip(numbers, distances, mirrored, strict=True)
        rows.append(
            {
                "name": sample_names[i],
                "memorised": memorised,
                "ratio": None if ratio != ratio else round(ratio, 4),
                "nearest": [
                    {"name": image_names[number], "distance": round(distance, 3), "mirrored": flipped}
                    for number, distance, flipped in each
                ],
            }
        )
    return rows


def _summary(console: Console, rows: list[dict[str, Any]], images: int) -> None:
    """rows: of all samples, the most suspicious first."""
    copies = [row for row in rows if row["memorised"]]
    if images == 1:
        console.warn("there is only one image in --data, so only exact copies of it can be called memorised")
    console.note(
        f"{len(copies)} of {len(rows)} samples are memorised "
        f"(the nearest of {images} images is less than a third as far away as the second nearest)"
    )
    if copies:
        table = [
            (row["name"], row["nearest"][0]["name"], f"distance {row['nearest'][0]['distance']:.1f}")
            for row in copies[:_NAMED]
        ]
        for line in columns(table):
            console.note(f"  {line}")
    if len(copies) > _NAMED:
        console.note(f"  and {len(copies) - _NAMED} more; --json names all")


def _drawing(
    drawn: Collection, known: Collection, found: Neighbors, rows: list[dict[str, Any]], order: list[int]
) -> Draw:
    """Draws a row for each of these samples: the sample, and its nearest images as they were compared."""
    import torch

    from ddpm_cli.data import pictures

    tiles, captions = [], []
    for i in order:
        sample = drawn.pixels[torch.tensor([i])]
        near = known.pixels[found.indices[i]]
        near = torch.where(found.mirrored[i].view(-1, 1, 1, 1), near.flip(3), near)
        tiles.append(torch.cat([sample, near]))
        row = rows[i]
        ratio = "" if row["ratio"] is None else f"ratio {row['ratio']:.2f}"
        captions.append([(row["name"], "memorised" if row["memorised"] else ratio)])
        for image in row["nearest"]:
            captions[-1].append((image["name"], f"{image['distance']:.1f}{' mirrored' if image['mirrored'] else ''}"))
    count = found.indices.shape[1]
    labels = ["sample", "nearest", *map(str, range(2, count + 1))]
    return lambda scale: pictures.captioned(tiles, captions, labels, scale)
