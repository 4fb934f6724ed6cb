"""Table 2 of the paper on the bundled examples: each objective trained and measured by `ddpm train` and `ddpm eval`.

    python benchmarks/ablation.py commands                    # the commands, to run by hand
    python benchmarks/ablation.py run --out FOLDER [--data digits] [--only mean] [--seeds 3]
    python benchmarks/ablation.py table --out FOLDER

Each row of the table is the preset `tiny` with other objectives, for each seed from scratch. A fifth of the images is
held out. Measured are bits/dim on images of both kinds, and for digits the Fréchet distance of samples from the
training images, in the features of examples/digits-features.pt.

`run` goes on where it was killed. Several of them may run at the same time, best with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ddpm_cli.errors import LockedError
from ddpm_cli.files import lock

EXAMPLES = Path(os.path.relpath(Path(__file__).parent.parent / "examples"))
ROWS = {
    "mean, L, learned": "--prediction mean --loss vlb --variance learned",
    "mean, L, fixed": "--prediction mean --loss vlb --variance fixed-large",
    "mean, unweighted": "--prediction mean --loss simple --variance fixed-large",
    "eps, L, learned": "--prediction epsilon --loss vlb --variance learned",
    "eps, L, fixed": "--prediction epsilon --loss vlb --variance fixed-large",
    "eps, L_simple": "--prediction epsilon --loss simple --variance fixed-large",
    "Sohl-Dickstein 2015": "--prediction mean --loss vlb --variance learned --schedule jsd",
    "Nichol 2021": "--prediction epsilon --loss hybrid --variance learned-range --schedule cosine",
    "v, simple": "--prediction v --loss simple --variance fixed-large",
}


class Example(NamedTuple):
    """options: of `ddpm train`. metrics: of `ddpm eval`."""

    options: str
    metrics: str


DATA = {
    "digits": Example("--size 28 --no-flip --steps 1200", f"bpd,fid --features {EXAMPLES / 'digits-features.pt'}"),
    "emoji": Example("--size 16 --steps 1500", "bpd"),
}
RESULTS = (("bits_per_dim", "held-out"), ("bits_per_dim", "train"), ("frechet", "train"))


class Trial(NamedTuple):
    data: str
    row: str
    seed: int

    def run(self, out: Path) -> Path:
        return out / self.data / f"{self.row.replace(', ', '-').replace(' ', '-')}-{self.seed}"

    def commands(self, out: Path) -> Iterator[list[str]]:
        """The two commands of a trial."""
        example, run = DATA[self.data], self.run(out)
        train = f"{EXAMPLES / self.data}.zip -o {run} --preset tiny --lr-decay 0 {example.options} {ROWS[self.row]}"
        yield shlex.split(f"train {train} --holdout 0.2 --seed {self.seed} --sample-every 1M --resume")
        yield shlex.split(f"eval {run} --metrics {example.metrics} -n 400 --terms 30")

    def results(self, out: Path) -> dict[tuple[str, str], float]:
        """The numbers of a finished trial; empty if it is not finished."""
        found = list(self.run(out).glob("eval/*/eval.json"))
        rows: list[dict[str, Any]] = json.loads(found[-1].read_text())["results"] if found else []
        values = {(row["metric"], row["set"]): float(row["value"]) for row in rows}
        return values if "fid" not in DATA[self.data].metrics or ("frechet", "train") in values else {}


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    for seed in range(options.seeds):
        for row in ROWS:
            for data in options.data:
                if options.only in row:
                    yield Trial(data, row, seed)


def commands(options: argparse.Namespace) -> None:
    """Print the commands of all trials."""
    for trial in trials(options):
        for command in trial.commands(options.out):
            print(shlex.join(["ddpm", *command]))


def run(options: argparse.Namespace) -> None:
    """Run every trial that is missing, unless another process is at it."""
    for trial in trials(options):
        try:
            with lock(trial.run(options.out).with_suffix(".lock"), wait=False):
                if trial.results(options.out):
                    continue
                for command in trial.commands(options.out):
                    done = subprocess.run([sys.executable, "-m", "ddpm_cli", *command, "-q"], stdout=subprocess.DEVNULL)
                    if done.returncode:  # such as a loss that is not finite
                        print(f"{shlex.join(['ddpm', *command])}: exit code {done.returncode}", flush=True)
                        break
                print(trial, trial.results(options.out), flush=True)
        except LockedError:
            continue


def table(options: argparse.Namespace) -> None:
    """Print a Markdown table for each example: mean and deviation over the seeds."""
    for data in options.data:
        kinds = RESULTS if "fid" in DATA[data].metrics else RESULTS[:2]
        print(f"\n{data}\n\n| | {' | '.join(f'{metric} ({images})' for metric, images in kinds)} | seeds |")
        print(f"|---|{'---|' * (len(kinds) + 1)}")
        for row in ROWS:
            found = [Trial(data, row, seed).results(options.out) for seed in range(options.seeds)]
            found = [one for one in found if one]
            cells = [spread([one[kind] for one in found]) for kind in kinds]
            print(f"| {row} | {' | '.join(cells)} | {len(found)} |")


def spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands_ = parser.add_subparsers(required=True)
    for command in (commands, run, table):
        sub = commands_.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--out", type=Path, default=Path("ablation"))
        sub.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
        sub.add_argument("--seeds", type=int, default=3)
        sub.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
