"""Paired trials of weightings, averages and learning rates that are said to help, on the bundled examples.

    python benchmarks/trials.py run --out FOLDER [--data digits emoji] [--seeds 2] [--steps 1500] [--only base decay]
    python benchmarks/trials.py table --out FOLDER

Every fifth image of an example is held out. The preset `tiny` is trained on the others, once for each variant and seed;
the variants of a seed have the same weights at the start, the same images, the same t and the same noise. "base" has a
constant learning rate (`--lr-decay 0`). Each step of a variant does the same work, so equal steps are equal time.
Samples of the default sampler are compared with the held out images, as in samplers.py. Averages are read off one run,
which keeps all of them.

`run` writes each result as soon as it has it, and goes on where it was killed. Several may run at the same time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_cli import __version__
from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.data.pack import Pack
from ddpm_cli.device import autocast, pick_dtype
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.errors import LockedError
from ddpm_cli.files import lock
from ddpm_cli.nn.ema import EMA
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.presets import PRESETS
from ddpm_cli.training.trainer import Trainer
from features import DATA, Example
from samplers import Judge, WholeBatches

WIDTHS = {"average 0.16": 5, "average 0.09": 9, "average 0.05": 16, "average 0.03": 30}  # relative width: gamma + 1


class Memory(Pack):
    """Images in memory, as a pack."""

    def __init__(self, pixels: Tensor) -> None:
        self.folder, self.fingerprint = Path(), ""
        self.pixels, self.count, self.shape = pixels, len(pixels), tuple(pixels.shape[1:])
        self.mean = pixels.double().mean((0, 2, 3)).tolist()
        self.left_out, self.unread = [], []

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.pixels[indices]

    def prefetch(self, indices: Tensor) -> None:
        pass


class PowerLaw(EMA):
    """beta_t = (1 - 1/t)^(gamma + 1): an average whose width grows with the run (Karras et al. 2024, Eq. 121)."""

    def __init__(self, average: list[Tensor], exponent: float) -> None:
        super().__init__(average)
        self.exponent = exponent

    def decay_at(self, updates: int) -> float:
        return float((1 - 1 / (updates + 1)) ** self.exponent)


class Trial(Trainer):
    """The trainer of `ddpm train`. Each variant changes one thing."""

    def weight(self, t: Tensor) -> Tensor:
        """The weight of the loss at t, on average 1."""
        return torch.ones_like(t, dtype=torch.float32)

    def noised(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network sees of x_t."""
        return x_t

    def backward(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            denoiser = Denoiser(self.network, self.schedule, self.config.schedule)
            x_t = self.noised(self.schedule.q_sample(x_0, t, eps), t)
            error = denoiser(x_t, t, clip=False).output - denoiser.target(x_0, t, eps)
            loss = self.weight(t) * error.square().flatten(1).mean(1)
        (loss.sum() / self.config.train.batch_size).backward()
        return loss.detach()


def min_snr(gamma: float) -> type[Trial]:
    """min(SNR, gamma) as the weight of the error of x_0 (Hang et al. 2023); of v: min(SNR, gamma) / (SNR + 1)."""

    class MinSNR(Trial):
        def weight(self, t: Tensor) -> Tensor:
            snr = (2 * self.schedule.lambdas).exp()
            weights = snr.clamp(max=gamma) / (snr + 1)
            return (weights / weights.mean())[t].float()

    return MinSNR


class Perturbed(Trial):
    """The network sees noise of a deviation 0.1 more than its target has (Ning et al. 2023)."""

    def noised(self, x_t: Tensor, t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(10**6 * (self.config.train.seed + 1) + self.step)
        _, sigma = self.schedule.marginal(t, x_t)
        return x_t + 0.1 * sigma * torch.randn(x_t.shape, generator=generator)


class Linear(Trial):
    """The learning rate falls to 0 over the second half of the run, as with `--lr-decay 0.5`."""

    def _lr(self) -> float:
        return super()._lr() * min(1.0, 2 * (1 - self.step / self.config.train.steps))


class Root(Trial):
    """The learning rate falls to 0 as 1 - sqrt(x) over the last fifth."""

    def _lr(self) -> float:
        left = max(0.0, self.step / self.config.train.steps - 0.8) / 0.2
        return super()._lr() * (1 - left**0.5)


VARIANTS: dict[str, type[Trial]] = {
    "base": Trial,
    "min-SNR 1": min_snr(1.0),
    "min-SNR 5": min_snr(5.0),
    "decay, second half": Linear,
    "decay, last fifth": Root,
    "input perturbation": Perturbed,
}


def settings(example: Example, steps: int, seed: int) -> RunConfig:
    preset = PRESETS["tiny"]
    return RunConfig(
        version=__version__,
        preset="tiny",
        data=DataConfig("", example.size, example.channels, flip=example.mirror),
        train=TrainConfig(steps, preset.batch_size, preset.lr, lr_warmup=preset.lr_warmup, seed=seed),
        unet=preset.unet(example.size, example.channels),
        schedule=preset.schedule(),
    )


def train(kind: type[Trial], config: RunConfig, pack: Pack) -> Iterator[tuple[str, UNet]]:
    """Train, and yield the averaged networks by name: "" is that of `ddpm train`."""
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(Path(folder), config, pack, device, pick_dtype("auto", device))
        copies = {name: UNet(config.unet).requires_grad_(False) for name in (WIDTHS if kind is Trial else {})}
        averages = [PowerLaw(list(copy.parameters()), WIDTHS[name]) for name, copy in copies.items()]
        for _ in range(config.train.steps):
            trainer.train_step()
            for average in averages:
                average.update(trainer.parameters, torch.tensor(True))
        yield "", trainer.averaged
        yield from copies.items()


def measure(unet: UNet, config: RunConfig, judge: Judge, count: int) -> dict[str, float]:
    """Draw samples with seed 0 and judge them."""
    unet = unet.eval().to(pick_dtype("auto", torch.device("cpu")))
    model = WholeBatches(unet, config.schedule)
    return judge(model.sample(count, batch_size=50))


def results(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = options.out / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace) -> None:
    """Train and judge every variant that is missing, unless another process is at it."""
    options.out.mkdir(parents=True, exist_ok=True)
    with lock(options.out / "features.lock"):
        judges = {name: Judge(DATA[name], options.out) for name in options.data}
    packs = {name: Memory(DATA[name].images(held=False)) for name in options.data}
    for seed in range(options.seeds):
        for variant in options.only or VARIANTS:
            for name in options.data:
                key = {"data": name, "variant": variant, "seed": seed, "steps": options.steps}
                place = "-".join(map(str, key.values())).replace(" ", "-").replace(",", "")
                try:
                    with lock(options.out / f"{place}.lock", wait=False):
                        if any(key.items() <= row.items() for row in results(options)):
                            continue
                        config = settings(DATA[name], options.steps, seed)
                        for average, unet in train(VARIANTS[variant], config, packs[name]):
                            row = key | {"variant": average or variant}
                            row |= measure(unet, config, judges[name], options.count)
                            with lock(options.out / "results.lock"), (options.out / "trials.jsonl").open("a") as file:
                                file.write(json.dumps(row) + "\n")
                            print(json.dumps(row), flush=True)
                except LockedError:
                    continue


def table(options: argparse.Namespace) -> None:
    """Print a row per variant: the mean over the seeds, and the mean of the paired differences from base."""
    found = [row for row in results(options) if row["steps"] == options.steps]
    print(f"| {options.steps} steps | {' | '.join(f'{name} | difference' for name in options.data)} |")
    print(f"|---|{'---|---|' * len(options.data)}")
    for variant in [*VARIANTS, *WIDTHS]:
        cells = []
        for name in options.data:
            key, factor = ("frechet", 1) if name == "digits" else ("kid", 1000)
            by_seed = {
                kind: {r["seed"]: factor * r[key] for r in found if (r["data"], r["variant"]) == (name, kind)}
                for kind in ("base", variant)
            }
            paired = [
                by_seed[variant][s] - by_seed["base"][s] for s in by_seed[variant].keys() & by_seed["base"].keys()
            ]
            cells += [spread(list(by_seed[variant].values())), spread(paired)]
        print(f"| {variant} | {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (run, table):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--out", type=Path, default=Path("trials"))
        sub.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
        sub.add_argument("--steps", type=int, default=1500)
        sub.add_argument("--seeds", type=int, default=2)
        sub.add_argument("--count", type=int, default=500, metavar="N", help="samples")
        sub.add_argument("--only", nargs="+", choices=VARIANTS, default=[])
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
