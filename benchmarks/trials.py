"""Paired trials of settings of the preset `tiny`, on the bundled examples.

    python benchmarks/trials.py run --out FOLDER [--data digits emoji] [--seeds 2] [--steps 1500] [--only base tiny]
    python benchmarks/trials.py table --out FOLDER [--against "debiased, decay"]

Every fifth image of an example is held out. `tiny` is trained on the others, once for each variant and seed.

- Weightings, averages and learning rates that are said to help, against "base": `tiny` with L_simple and a constant
  learning rate. The variants of a seed have the same weights at the start, the same images, the same t and the same
  noise. Averages are read off one run, which keeps all of them.
- Other networks, rates and batches, against "debiased, decay": `tiny` as it is, but for the mean of the weights.

All variants train for the same time. Where a step of a variant does more work, or less, a short race with the steps of
"base" tells how many it may do; it counts the time of the processor. Samples of the default sampler are compared with
the held out images, as in samplers.py.

`run` writes each result as soon as it has it, and goes on where it was killed. Several may run at the same time, with
one thread each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_cli import __version__
from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.data.pack import Pack
from ddpm_cli.device import autocast, pick_dtype
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import GAMMA
from ddpm_cli.errors import LockedError
from ddpm_cli.files import lock
from ddpm_cli.nn.ema import EMA
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.presets import PRESETS
from ddpm_cli.training.trainer import Trainer
from features import DATA, Example
from samplers import Judge, WholeBatches

WIDTHS = {"average 0.16": 5, "average 0.09": 9, "average 0.05": 16, "average 0.03": 30}  # relative width: gamma + 1
ROUNDS, STEPS = 5, 8  # of a race


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


def weighted(weights: Callable[[Tensor], Tensor]) -> type[Trial]:
    """weights: of the error of v, by lambda_t = log(SNR) / 2.

    Divided by their mean, since the norm of a gradient is limited: then only the weighting differs from "base".
    """

    class Weighted(Trial):
        def weight(self, t: Tensor) -> Tensor:
            found = weights(self.schedule.lambdas)
            return (found / found.mean())[t].float()

    return Weighted


def min_snr(gamma: float, more: float = 0.0) -> type[Trial]:
    """min(SNR, gamma) as the weight of the error of x_0 (Hang et al. 2023); of v: min(SNR, gamma) / (SNR + 1).

    more: is added to the weight of v.
    """
    return weighted(lambda lambdas: (2 * lambdas).exp().clamp(max=gamma) / ((2 * lambdas).exp() + 1) + more)


def log_normal(lambdas: Tensor) -> Tensor:
    """The steps count as often as Karras et al. 2022 draw their noise: log sigma = -lambda is normal (Table 1)."""
    density = (-(((lambdas - 1.2) / 1.2) ** 2) / 2).exp()
    return density * torch.gradient(lambdas)[0].abs()


class Perturbed(Trial):
    """The network sees noise of a deviation 0.1 more than its target has (Ning et al. 2023)."""

    def noised(self, x_t: Tensor, t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(10**6 * (self.config.train.seed + 1) + self.step)
        _, sigma = self.schedule.marginal(t, x_t)
        return x_t + 0.1 * sigma * torch.randn(x_t.shape, generator=generator)


class Root(Trial):
    """The learning rate falls to 0 as 1 - sqrt(x) over the last fifth."""

    def _lr(self) -> float:
        left = max(0.0, self.step / self.config.train.steps - 0.8) / 0.2
        return super()._lr() * (1 - left**0.5)


class Variant(NamedTuple):
    """changes: of the preset `tiny`. other_work: whether a step takes another time than one of `tiny`."""

    trainer: type[Trial] = Trial
    changes: Mapping[str, Any] = MappingProxyType({})
    other_work: bool = False


CONSTANT = {"lr_decay": 0.0}
DEBIASED = weighted(lambda lambdas: 1 / (2 * lambdas.cosh()))  # sqrt(SNR) / (SNR + 1) (Yu et al. 2023)
VARIANTS = {
    "base": Variant(changes=CONSTANT),
    "min-SNR 1": Variant(min_snr(1.0), CONSTANT),
    "min-SNR 5": Variant(min_snr(GAMMA), CONSTANT),
    "decay, second half": Variant(),
    "decay, last fifth": Variant(Root, CONSTANT),
    "input perturbation": Variant(Perturbed, CONSTANT),
    "min-SNR 1, decay": Variant(min_snr(1.0)),
    "min-SNR 5, decay": Variant(min_snr(GAMMA)),
    "min-SNR 5 and 0.1, decay": Variant(min_snr(GAMMA, 0.1)),
    "debiased, decay": Variant(DEBIASED),
    "square root of debiased, decay": Variant(weighted(lambda lambdas: lambdas.cosh() ** -0.5)),
    "log-normal, decay": Variant(weighted(log_normal)),
    "rate 1e-3": Variant(DEBIASED, {"lr": 1e-3}),
    "rate 4e-3": Variant(DEBIASED, {"lr": 4e-3}),
    "warm-up 400": Variant(DEBIASED, {"lr_warmup": 400}),
    "batch 16": Variant(DEBIASED, {"batch_size": 16}, other_work=True),
    "batch 64": Variant(DEBIASED, {"batch_size": 64}, other_work=True),
    "width 12": Variant(DEBIASED, {"base_channels": 12, "norm_num_groups": 4}, other_work=True),
    "width 24": Variant(DEBIASED, {"base_channels": 24}, other_work=True),
    "two blocks": Variant(DEBIASED, {"layers_per_block": 2}, other_work=True),
    "attention at half the size": Variant(DEBIASED, {"attention_size": 16}, other_work=True),
}


def settings(variant: Variant, example: Example, steps: int, seed: int) -> RunConfig:
    preset = replace(PRESETS["tiny"], **variant.changes)
    rate = {key: getattr(preset, key) for key in ("lr", "lr_warmup", "lr_decay")}
    return RunConfig(
        version=__version__,
        preset="tiny",
        data=DataConfig("", example.size, example.channels, flip=example.mirror),
        train=TrainConfig(steps, preset.batch_size, **rate, seed=seed),
        unet=preset.unet(example.size, example.channels),
        schedule=preset.schedule(),
    )


@contextmanager
def trainer(kind: type[Trial], config: RunConfig, pack: Pack) -> Iterator[Trial]:
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        yield kind(Path(folder), config, pack, device, pick_dtype("auto", device))


def steps_in_equal_time(variant: Variant, example: Example, pack: Pack, steps: int) -> int:
    """The steps of a variant that take as long as `steps` of base: the median of a race's rounds."""
    if not variant.other_work:
        return steps
    kinds = VARIANTS["base"], variant
    with ExitStack() as stack:
        runners = [
            stack.enter_context(trainer(kind.trainer, settings(kind, example, steps, 0), pack)) for kind in kinds
        ]
        ratios = []
        for _ in range(1 + ROUNDS):
            seconds = []
            for runner in runners:
                started = time.process_time()
                for _ in range(STEPS):
                    runner.train_step()
                seconds.append(time.process_time() - started)
            ratios.append(seconds[0] / seconds[1])
        return round(steps * statistics.median(ratios[1:]))  # the first round warms up


def train(variant: Variant, config: RunConfig, pack: Pack) -> Iterator[tuple[str, UNet]]:
    """Train, and yield the averaged networks by name: "" is that of `ddpm train`."""
    with trainer(variant.trainer, config, pack) as run:
        names = WIDTHS if variant == VARIANTS["base"] else {}
        copies = {name: UNet(config.unet).requires_grad_(False) for name in names}
        averages = [PowerLaw(list(copy.parameters()), WIDTHS[name]) for name, copy in copies.items()]
        for _ in range(config.train.steps):
            run.train_step()
            for average in averages:
                average.update(run.parameters, torch.tensor(True))
        yield "", run.averaged
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
                        kind, example = VARIANTS[variant], DATA[name]
                        steps = steps_in_equal_time(kind, example, packs[name], options.steps)
                        config = settings(kind, example, steps, seed)
                        for average, unet in train(kind, config, packs[name]):
                            row = key | {"variant": average or variant, "steps of its own": steps}
                            row |= measure(unet, config, judges[name], options.count)
                            with lock(options.out / "results.lock"), (options.out / "trials.jsonl").open("a") as file:
                                file.write(json.dumps(row) + "\n")
                            print(json.dumps(row), flush=True)
                except LockedError:
                    continue


def table(options: argparse.Namespace) -> None:
    """Print a row per variant: the mean over the seeds, and the mean of the paired differences from another."""
    found = [row for row in results(options) if row["steps"] == options.steps]
    print(f"| {options.steps} steps | {' | '.join(f'{name} | difference' for name in options.data)} |")
    print(f"|---|{'---|---|' * len(options.data)}")
    for variant in [*VARIANTS, *WIDTHS]:
        cells = []
        for name in options.data:
            key, factor = ("frechet", 1) if name == "digits" else ("kid", 1000)
            by_seed = {
                kind: {r["seed"]: factor * r[key] for r in found if (r["data"], r["variant"]) == (name, kind)}
                for kind in (options.against, variant)
            }
            theirs = by_seed[options.against]
            paired = [value - theirs[seed] for seed, value in by_seed[variant].items() if seed in theirs]
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
        sub.add_argument(
            "--against", choices=VARIANTS, default="base", help="the variant to compare with, in the table"
        )
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
