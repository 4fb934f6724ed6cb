"""The share of a training step that is not the model: reading the batch, flips, noise, EMA, metrics, the loop.

    python benchmarks/overhead.py [--preset tiny] [--batch-size N] [--steps 200] [--precision auto] [--device auto]

Runs the loop of `ddpm train` between two checkpoints, and measures the time in the network (forward and backward), the
gradient norm and Adam. Prints the rest as a share of the whole, in total and by its largest parts.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddpm_cli import device as machine
from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.training import trainer as module
from ddpm_cli.training.metrics import Window
from ddpm_cli.training.presets import PRESETS
from ddpm_cli.training.trainer import Trainer

EMOJI = Path(__file__).parent.parent / "examples" / "emoji.zip"
MODEL = ("network", "norm of the gradient", "Adam")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    device = machine.pick_device(options.device)
    dtype = machine.pick_dtype(options.precision, device)
    preset = PRESETS[options.preset]
    size, batch = preset.size or 32, options.batch_size or preset.batch_size
    spent: dict[str, float] = defaultdict(float)

    def timed(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **keywords: Any) -> Any:
            machine.synchronize(device)
            started = time.perf_counter()
            result = work(*args, **keywords)
            machine.synchronize(device)
            spent[what] += time.perf_counter() - started
            return result

        return run

    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(images=str(EMOJI), size=size, channels=3)
        pack = open_pack(open_source(EMOJI, Path(folder)), data, Path(folder))
        never = 10**9
        settings = TrainConfig(
            steps=never, batch_size=batch, lr=preset.lr, save_every=never, sample_every=never, log_every=100
        )
        config = RunConfig("benchmark", options.preset, data, settings, preset.unet(size, 3), preset.schedule())
        trainer = Trainer(Path(folder), config, pack, device, dtype)
        trainer.backward = timed("network", trainer.backward)  # type: ignore[method-assign]
        trainer.optimizer.step = timed("Adam", trainer.optimizer.step)  # type: ignore[method-assign]
        torch.nn.utils.clip_grad_norm_ = timed("norm of the gradient", torch.nn.utils.clip_grad_norm_)
        trainer._batch = timed("batch: reading, flips, noise", trainer._batch)  # type: ignore[method-assign]
        trainer.ema.update = timed("average of the weights", trainer.ema.update)  # type: ignore[method-assign]
        Window.add = timed("metrics", Window.add)  # type: ignore[method-assign]
        module.seed_everything = timed("seeds", module.seed_everything)
        first, last = 5, 5 + options.steps
        started = 0.0

        def enough() -> bool:
            nonlocal started
            if trainer.step == first:
                machine.synchronize(device)
                spent.clear()
                started = time.perf_counter()
            return trainer.step >= last

        for _ in trainer._steps(Window(config, Path(folder), device, trainer.world, 0, 0.0), enough):
            pass
        machine.synchronize(device)
        whole = time.perf_counter() - started

    rest = whole - sum(spent[part] for part in MODEL)
    where = machine.describe(device, dtype)
    print(f"{options.preset}, batch {batch}, {where}: {1e3 * whole / options.steps:.1f} ms a step")
    for part, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {part:30}{seconds / whole:7.2%}")
    print(f"not the model: {rest / whole:.2%}")


if __name__ == "__main__":
    main()
