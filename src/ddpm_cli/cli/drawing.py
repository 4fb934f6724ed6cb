"""Fills a folder with samples, in one process or several."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ddpm_cli.cli.console import Console
from ddpm_cli.diffusion.samplers import Sampling
from ddpm_cli.distributed import World
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.models.sample_folder import fill, made_with, opened

__all__ = ["draw_into"]


def draw_into(
    console: Console,
    world: World,
    held: ExitStack,
    model: DDPM,
    sampling: Sampling,
    folder: Path,
    n: int,
    seed: int,
    batch_size: int,
    force: bool,
) -> int:
    """Draw those of images 0..n-1 of a seed that are missing in a folder. Returns how many that were.

    Every rank must call it. held: holds the folder's lock. force: draw all of them again.
    """

    def missing() -> list[int]:
        found: list[int] = held.enter_context(opened(folder, n, made_with(model, sampling, seed), force, console.warn))
        if len(found) < n:
            console.note(f"{n - len(found)} of {n} images exist already")
        return found

    left = world.on_main(missing)
    rows = world.rows(len(left))
    mine = left[rows.start : rows.stop]
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count * world.size  # the other processes have done about as much
        update(done)

    try:
        with console.bar("sampling, images x evaluations", len(left) * sampling.evaluations) as update:
            fill(folder, mine, model.sample_batches(mine, sampling, seed, batch_size, progress))
    except KeyboardInterrupt:
        again = "the same command without --force" if force else "the same command"
        console.note(f"{folder} keeps the images that are finished; {again} continues")
        raise
    world.barrier()
    return len(left)
