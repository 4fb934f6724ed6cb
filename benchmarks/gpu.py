"""What a person with a GPU wants to know about ddpm, in one command of under ten minutes, as a table in a file.

    python benchmarks/gpu.py [--out FILE] [--minutes 10] [--compile] [--device auto] [--only PART ...] [--small]

It needs a clone of the repository with its extra (`pip install -c constraints.txt '.[dev]'`), and no network.

Is it correct? (gpu_checks.py)

- network: a forward and a backward pass of the paper's CIFAR-10 model, in float32 against the CPU, and in bf16 against
  float32.
- samples: of the bundled model, against the CPU; a seed twice; in other batch sizes; in bf16.
- waits: how often the CPU waits for the GPU between two log lines of training, and between two steps of a sampler.
- resume: a run of `ddpm train` against one that stops and goes on, bit for bit, in PyTorch's deterministic mode.
- processes: two processes against one, if there are two cards.

Is it fast? (gpu_speed.py) ddpm, diffusers tuned by hand, and diffusers as its users run it, in turn, with the peak
memory of each. --compile adds ddpm with --compile and diffusers with torch.compile, which takes minutes to compile.

- training: the paper's CIFAR-10 model, batch 128.
- sampling: 256 samples in 1000 steps; few-steps: in the 20 steps of the default sampler.
- large-training, large-sampling: the paper's model for 256x256.

The parts that are left share the time that is left. If it is short, a part has fewer rounds, and then fewer steps,
which the table says. The exit code is 1 if a check failed. A target that was missed does not count.

--small runs all of it in a minute or two, with tiny networks, few steps, and two processes on the CPU, to test the
script itself. It is the default on a CPU, and writes to stdout, since its speeds mean nothing.

This script has not been run on a GPU yet, only in its small sizes on a CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch

import ddpm_cli
from ddpm_cli import device as machine
from ddpm_cli.training.presets import PRESETS, Preset
from gpu_checks import (
    EMOJI,
    Check,
    Failed,
    NotRun,
    Outcome,
    attempt,
    check_network,
    check_processes,
    check_resume,
    check_samples,
    check_waits,
    last_words,
)
from gpu_speed import (
    OURS,
    OURS_COMPILED,
    TUNED,
    USUAL,
    Measured,
    Model,
    contest,
    largest_that_fits,
    open_trainer,
    our_model,
    sampling,
    training,
)

RESULTS = Path(__file__).parent / "gpu-results.md"
CHECKS = ("network", "samples", "waits", "resume", "processes")
CONTESTS = ("training", "sampling", "few-steps", "large-training", "large-sampling")
PARTS = (*CHECKS, *CONTESTS)


@dataclass(frozen=True)
class Sizes:
    """How much is done. All sizes run the same code."""

    preset: Preset = PRESETS["cifar10"]
    size: int = 32  # of its images
    batch: int = 128
    samples: int = 256
    steps: int = 1000  # of the sampler ddpm
    few: int = 20  # of the default sampler
    large: Preset = PRESETS["256"]
    large_size: int = 256
    large_batch: int = 16  # or less, where memory runs out
    train_steps: int = 100  # in a round
    large_steps: int = 20
    rounds: int = 5
    checked_images: int = 8  # by the network, on the CPU too
    checked_samples: int = 64
    checked_steps: int = 20  # of their sampler
    run: tuple[str, ...] = ("--preset", "cifar10", "--size", "32")  # that stops and goes on
    run_steps: int = 20
    pair_steps: int = 50  # of two processes


SMALL = Sizes(
    preset=replace(PRESETS["cifar10"], base_channels=32),
    size=16,
    batch=2,
    samples=2,
    steps=4,
    few=2,
    large=replace(PRESETS["256"], base_channels=32),
    large_size=32,
    large_batch=2,
    train_steps=1,
    large_steps=1,
    rounds=1,
    checked_images=2,
    checked_samples=8,
    checked_steps=4,
    run=("--preset", "tiny", "--size", "16", "--batch-size", "4"),
    run_steps=4,
    pair_steps=20,
)


class Race(NamedTuple):
    """The outcome of a contest. images: in a step. steps: of a whole sampling; None for training."""

    what: str
    images: int
    steps: int | None
    measured: list[Measured]  # ours first

    def speed(self, side: Measured) -> str:
        """In the unit of the targets."""
        if self.steps is None:
            return f"{1 / side.seconds:.3g} steps/s"
        return f"{self.steps * side.seconds:.3g} s"

    def extent(self, side: Measured) -> str:
        """What the numbers were computed from."""
        scaled = self.steps is not None and side.steps < self.steps
        return f"{side.rounds} x {side.steps} steps{f', scaled to {self.steps}' if scaled else ''}"


@dataclass
class Report:
    """What is known so far. It is written after every part, so that a run that is stopped leaves a table."""

    facts: dict[str, str]
    out: Path | None  # None: stdout, at the end
    full: bool  # whether the sizes are those of the targets
    outcomes: list[Outcome] = field(default_factory=list)
    races: dict[str, Race] = field(default_factory=dict)  # by part

    def add(self, found: Outcome) -> None:
        self.outcomes.append(found)
        _say(" | ".join(_row(found)))
        self._write()

    def add_race(self, part: str, race: Race) -> None:
        self.races[part] = race
        for side in race.measured:
            _say(f"{race.what} | {side.name} | {race.speed(side)} | {race.extent(side)}")
        self._write()

    def _write(self) -> None:
        if self.out:
            self.out.write_text(self.markdown())

    @property
    def failed(self) -> bool:
        return any(
            isinstance(found, Failed) or (isinstance(found, Check) and not found.passed) for found in self.outcomes
        )

    def markdown(self) -> str:
        checks = [_row(found) for found in self.outcomes if not isinstance(found, NotRun)]
        missing = [f"- {found.name}: {found.why}" for found in self.outcomes if isinstance(found, NotRun)]
        speeds = [
            (
                race.what if i == 0 else "",
                side.name,
                race.speed(side),
                f"{race.images / side.seconds / (race.steps or 1):.3g}",
                f"{side.ratio:.2f}",
                "—" if side.memory is None else f"{side.memory / 1e9:.1f} GB",
                race.extent(side),
            )
            for race in self.races.values()
            for i, side in enumerate(race.measured)
        ]
        parts = [
            f"# ddpm on {self.facts['device']}",
            "Written by `benchmarks/gpu.py`."
            + ("" if self.full else "\nTiny networks and few steps, to test the script: its speeds mean nothing."),
            _table(("", ""), list(self.facts.items())),
            "## Targets",
            "For one H100 or H200. In brackets: the paper, on a TPU v3-8.",
            _table(("", "target", "measured", "met"), self.targets()),
            "## Correctness",
            _table(("check", "measured", "allowed", "", "why that much is allowed"), checks),
            "## Speed",
            "Medians of rounds, in which all take turns.\n"
            "Ratio: the time of a step, divided by that of ddpm.\n"
            "Memory: the peak on the device, with weights, averages and moments.",
            _table(("", "", "speed", "images/s", "ratio", "memory", "rounds"), speeds),
            "## Not run",
            "\n".join(missing) or "Everything was run.",
        ]
        return "\n\n".join(parts) + "\n"

    def targets(self) -> list[tuple[str, ...]]:
        """The targets of the project, and what was measured."""
        rows: list[tuple[str, ...]] = []

        def row(part: str, what: str, target: str, measured: Callable[[Race], tuple[str, bool]]) -> None:
            if self.full and part in self.races:
                value, met = measured(self.races[part])
                rows.append((what, target, value, "yes" if met else "no"))
            else:
                rows.append((what, target, "—", "not measured"))

        def ours(race: Race) -> Measured:
            both = [side for side in race.measured if side.name in (OURS, OURS_COMPILED)]
            return min(both, key=lambda side: side.seconds)

        def against(name: str, race: Race) -> tuple[str, bool]:
            theirs = next(side for side in race.measured if side.name == name)
            ratio = theirs.seconds / ours(race).seconds
            return f"{ratio:.2f}", ratio >= 2

        row(
            "training",
            "training of the CIFAR-10 model, batch 128",
            "at least 60 steps/s (21)",
            lambda race: (race.speed(ours(race)), ours(race).seconds <= 1 / 60),
        )
        row(
            "sampling",
            "256 samples, 1000 steps",
            "at most 8 s (17)",
            lambda race: (race.speed(ours(race)), 1000 * ours(race).seconds <= 8),
        )
        for part in ("training", "sampling"):
            for name in (USUAL, TUNED):
                row(part, f"{part} against {name}", "a ratio of at least 2", partial(against, name))
        return rows


def _row(found: Outcome) -> tuple[str, ...]:
    match found:
        case Check():
            return found.name, f"{found.measured:.2g}", f"{found.allowed:g}", _result(found), found.why
        case Failed():
            return found.name, "—", "—", "FAILED", found.error.replace("|", "/")
        case NotRun():
            return found.name, "—", "—", "not run", found.why


def _result(check: Check) -> str:
    return "passed" if check.passed else "FAILED"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return "Nothing was run."
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def facts(device: torch.device) -> dict[str, str]:
    """The machine and the versions, in words."""
    found = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory of the device"] = f"{properties.total_memory / 1e9:.0f} GB"
        found["cards"] = str(torch.cuda.device_count())
        found["driver"] = _driver()
        found["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        found["cudnn.benchmark"] = str(torch.backends.cudnn.benchmark)
    found["PyTorch"] = torch.__version__
    found["diffusers"] = diffusers.__version__
    found["ddpm"] = ddpm_cli.__version__
    found["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch"
    found["--precision auto"] = str(machine.pick_dtype("auto", device)).removeprefix("torch.")
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@dataclass(frozen=True)
class Bench:
    """All parts, on one device."""

    device: torch.device
    sizes: Sizes
    compiled: bool
    folder: Path  # for temporary files
    deadline: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def checks(self) -> dict[str, Callable[[], Iterator[Outcome]]]:
        sizes, device = self.sizes, self.device
        network = replace(sizes.preset, dropout=0.0).unet(sizes.size, 3)
        return {
            "network": lambda: check_network(network, sizes.checked_images, device),
            "samples": lambda: check_samples(sizes.checked_samples, sizes.checked_steps, device),
            "waits": self._waits,
            "resume": lambda: check_resume(sizes.run, sizes.run_steps, device, self.folder),
            "processes": lambda: check_processes(sizes.pair_steps, device, self.folder),
        }

    def _waits(self) -> Iterator[Outcome]:
        sizes = self.sizes
        model = Model("the CIFAR-10 model", sizes.preset, sizes.size, EMOJI, self.device)
        trainer, window = open_trainer(model, sizes.batch, self.folder)
        sampled = our_model(model)
        x_T = torch.randn((sizes.batch, *sampled.shape), device=self.device)

        def train() -> None:
            for _ in range(3):
                window.add(trainer.train_step(), trainer.step)

        def sample() -> None:
            for _ in sampled.sample_loop(x_T, "ddpm", steps=3):
                pass

        for work in (train, sample):
            work()  # the first time, tables are copied to the device
        yield from check_waits({"3 training steps": train, "3 steps of a sampler": sample}, self.device)

    def contests(self) -> dict[str, tuple[float, Callable[[float], Race]]]:
        """Each with its weight in the division of time, and a function of the seconds that it may take."""
        sizes = self.sizes
        cifar = Model("the CIFAR-10 model", sizes.preset, sizes.size, EMOJI, self.device)
        large = Model("the model for 256x256", sizes.large, sizes.large_size, EMOJI, self.device)
        return {
            "training": (3, partial(self._train, cifar, sizes.batch, sizes.train_steps, self.compiled)),
            "sampling": (6, partial(self._sample, cifar, sizes.samples, "ddpm", sizes.steps, self.compiled)),
            "few-steps": (1, partial(self._sample, cifar, sizes.samples, None, sizes.few, False)),
            "large-training": (2, partial(self._train, large, sizes.large_batch, sizes.large_steps, False)),
            "large-sampling": (2, partial(self._sample, large, sizes.large_batch, "ddpm", sizes.steps, False)),
        }

    def _train(self, model: Model, batch: int, steps: int, compiled: bool, seconds: float) -> Race:
        def measure(batch: int) -> list[Measured]:
            sides = training(model, batch, self.folder, compiled)
            return contest(sides, steps, self.sizes.rounds, seconds, self.device)

        batch, found = largest_that_fits(batch, measure, self.device)
        return Race(f"training of {model.name}, batch {batch}", batch, None, found)

    def _sample(
        self, model: Model, images: int, sampler: str | None, steps: int, compiled: bool, seconds: float
    ) -> Race:
        def measure(images: int) -> list[Measured]:
            sides = sampling(model, images, sampler, compiled)
            return contest(sides, steps, self.sizes.rounds, seconds, self.device)

        images, found = largest_that_fits(images, measure, self.device)
        return Race(f"{images} samples of {model.name}, {steps} steps of {sampler or 'dpm++'}", images, steps, found)

    def run(self, report: Report, only: Sequence[str]) -> None:
        """Run the parts with these names, and add what they find to the report."""
        for name, check in self.checks().items():
            if name in only:
                for outcome in attempt(name, check) if self.left > 0 else [NotRun(name, "no time was left")]:
                    report.add(outcome)
        contests = {name: contest for name, contest in self.contests().items() if name in only}
        weights = sum(weight for weight, _ in contests.values())
        for name, (weight, measure) in contests.items():
            if self.left <= 0:
                report.add(NotRun(name, "no time was left"))
                continue
            try:
                report.add_race(name, measure(self.left * weight / weights))
            except Exception as error:  # the other parts can still tell something
                traceback.print_exc()
                report.add(Failed(name, last_words(error)))
            weights -= weight
        for name in (name for name in PARTS if name not in only):
            report.add(NotRun(name, "not asked for"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--out", help=f"the file of the table; - is stdout. Default: {RESULTS.name} beside this script")
    parser.add_argument("--minutes", type=float, default=10.0, help="that it may take, about")
    parser.add_argument("--compile", action="store_true", help="also measure both with torch.compile")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its kernels, for all sides")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test this script; the default on a CPU")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    device = machine.pick_device(options.device)
    small = options.small or device.type == "cpu"
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    to_stdout = options.out == "-" or (options.out is None and small)
    report = Report(facts(device), None if to_stdout else Path(options.out or RESULTS), not small)
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + 60 * options.minutes
        Bench(device, SMALL if small else Sizes(), options.compile, Path(folder), deadline).run(report, options.only)
    if to_stdout:
        print(report.markdown(), end="")
    else:
        _say(f"wrote {report.out}")
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
