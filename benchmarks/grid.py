"""Seconds to a grid of 64 images: `ddpm sample` by default, and diffusers' `DDPMPipeline` as its model cards show it.

    python benchmarks/grid.py --runs FOLDER [--data digits] [--rounds 3] [--out FOLDER]

FOLDER is what `samplers.py train` filled. Both use the same weights, in turn (ours, theirs, ours, theirs, …), and are
timed in two ways:

- in a process that has loaded the model, and
- as whole processes, from the start of Python to the grid on the disk.

Seconds are those of the clock, and those of the processors, which a busy machine disturbs less.

The images of the first way are judged as in samplers.py, those of all rounds together. Threads are those of the
environment.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ddpm_cli  # noqa: F401  before torch, as the command line does: it limits how long threads spin

# isort: split
import torch
from diffusers import DDPMPipeline
from torch import Tensor

from ddpm_cli.data.images import from_pil
from ddpm_cli.models import hub
from ddpm_cli.models.ddpm import DDPM
from features import DATA
from samplers import Judge

N = 64
THEIRS = """
import sys
from diffusers import DDPMPipeline
from diffusers.utils import make_image_grid

pipeline = DDPMPipeline.from_pretrained(sys.argv[1])
images = pipeline(batch_size=64).images
make_image_grid(images, rows=8, cols=8).save(sys.argv[2])
"""


class Seconds(NamedTuple):
    clock: float
    processors: float

    def __str__(self) -> str:
        return f"{self.clock:.2f} s ({self.processors:.2f} s of processors)"


def seconds(work: Callable[[], object]) -> Seconds:
    """The time that some work takes, with the processes that it starts and waits for."""
    started, used = time.perf_counter(), used_processors()
    work()
    return Seconds(time.perf_counter() - started, used_processors() - used)


def used_processors() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


class Side:
    """Ours or theirs: its ways to make a grid, with the times and the images."""

    def __init__(self, name: str, draw: Callable[[int], Tensor], command: list[str]) -> None:
        self.name, self.draw, self.command = name, draw, command
        self.inside: list[Seconds] = []
        self.whole: list[Seconds] = []
        self.images: list[Tensor] = []

    def round(self, seed: int) -> None:
        self.inside.append(seconds(lambda: self.images.append(self.draw(seed))))
        self.whole.append(seconds(lambda: subprocess.run(self.command, check=True, capture_output=True)))
        print(f"{self.name}: {self.inside[-1]} loaded; {self.whole[-1]} from the start", flush=True)


def our_side(run: Path, folder: Path) -> Side:
    model = DDPM.from_pretrained(run)
    command = [sys.executable, "-m", "ddpm_cli", "sample", "-m", str(run), "-o", str(folder / "ours.png"), "--force"]
    return Side("ddpm", lambda seed: model.sample(N, seed), command)


def their_side(run: Path, folder: Path) -> Side:
    checkpoint = hub.resolve(str(run)).folder
    pipeline = DDPMPipeline.from_pretrained(checkpoint)  # type: ignore[no-untyped-call]
    pipeline.set_progress_bar_config(disable=True)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([from_pil(image) for image in pipeline(batch_size=N, generator=generator).images])

    command = [sys.executable, "-c", THEIRS, str(checkpoint), str(folder / "theirs.png")]
    return Side("diffusers", draw, command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("samplers"), help="where the networks that judge are kept")
    options = parser.parse_args()
    run = options.runs / options.data
    print(f"{options.data}, {torch.get_num_threads()} threads, ours: {DDPM.from_pretrained(run).sampling().describe()}")
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = our_side(run, Path(name)), their_side(run, Path(name))
        for seed in range(options.rounds):
            ours.round(seed)
            theirs.round(seed)
    report("in a process that has loaded the model", ours.inside, theirs.inside)
    report("whole processes", ours.whole, theirs.whole)
    judge = Judge(DATA[options.data], options.out)
    for side in (ours, theirs):
        found = judge(torch.cat(side.images))
        print(f"{side.name}, {N * options.rounds} images: " + ", ".join(f"{key} {found[key]:.4g}" for key in found))


def report(what: str, ours: list[Seconds], theirs: list[Seconds]) -> None:
    for kind in Seconds._fields:
        mine, others = ([getattr(one, kind) for one in side] for side in (ours, theirs))
        ratios = [b / a for a, b in zip(mine, others, strict=True)]
        print(
            f"{what}, {kind}: ddpm {statistics.median(mine):.2f} s, diffusers {statistics.median(others):.2f} s; "
            f"ratio median {statistics.median(ratios):.1f} (min {min(ratios):.1f}, max {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()
