"""How fast ddpm samples and trains the paper's CIFAR-10 model, compared with diffusers as its users run it.

    python benchmarks/vs_diffusers.py [--device cpu] [--batch-size 16] [--rounds 5] [--preset cifar10]

Both run in one process, in turn (ours, theirs, ours, theirs, …), so that a machine with changing speed slows both. The
result is the ratio of each pair. A round is a few steps of the reverse process, then one training step.

- ours: what `ddpm sample` and `ddpm train` run, with --precision auto.
- theirs: `DDPMPipeline`'s loop (`UNet2DModel`, `DDPMScheduler.step`), and the loop of diffusers' example
  `train_unconditional.py` (float32 by default, AdamW, gradient clipping, `EMAModel`).
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from ddpm_cli import device as machine
from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.presets import PRESETS
from ddpm_cli.training.trainer import Trainer

EMOJI = Path(__file__).parent.parent / "examples" / "emoji.zip"


def timed(work: Callable[[], object], device: torch.device) -> float:
    machine.synchronize(device)
    start = time.perf_counter()
    work()
    machine.synchronize(device)
    return time.perf_counter() - start


def report(what: str, ours: list[float], theirs: list[float], images: int) -> None:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    speeds = [images / statistics.median(times) for times in (ours, theirs)]
    print(
        f"{what}: ours {speeds[0]:.2f} images/s, diffusers {speeds[1]:.2f}; "
        f"ratio median {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", choices=PRESETS, default="cifar10")
    parser.add_argument("--steps", type=int, default=3, help="of the reverse process in a round")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    device = machine.pick_device(options.device)
    dtype = machine.pick_dtype("auto", device)
    preset = PRESETS[options.preset]
    config = preset.unet(preset.size or 32, 3)
    size, batch = config.sample_size, options.batch_size
    print(f"{options.preset}, batch {batch}, {machine.describe(device, dtype)}; diffusers in fp32")

    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(images=str(EMOJI), size=size, channels=3)
        pack = open_pack(open_source(EMOJI, Path(folder)), data, Path(folder))
        run = RunConfig(
            version="benchmark",
            preset=options.preset,
            data=data,
            train=TrainConfig(steps=1, batch_size=batch, lr=preset.lr),
            unet=config,
            schedule=preset.schedule(),
        )
        trainer = Trainer(Path(folder), run, pack, device, dtype)
        unet = UNet(config)
        unet.reset_parameters()
        model = DDPM(machine.place(unet.eval().requires_grad_(False), device, dtype), run.schedule)

        keywords = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
        theirs = UNet2DModel(**keywords).to(device)
        scheduler = DDPMScheduler(variance_type=run.schedule.variance_type)
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=preset.lr, betas=(0.95, 0.999), weight_decay=1e-6)
        ema = EMAModel(theirs.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        still = UNet2DModel(**keywords).to(device).eval()
        images = torch.rand(batch, 3, size, size) * 2 - 1
        noise = torch.randn(batch, 3, size, size)

        def our_sampling() -> None:
            for _ in model.sample_loop(noise, "ddpm", steps=options.steps):
                pass

        @torch.no_grad()
        def their_sampling() -> None:
            scheduler.set_timesteps(options.steps)
            x = noise.to(device)
            for t in scheduler.timesteps:
                x = scheduler.step(still(x, t).sample, t, x).prev_sample

        def their_training() -> None:
            clean = images.to(device)
            eps = torch.randn(clean.shape, device=device)
            t = torch.randint(0, 1000, (batch,), device=device)
            loss = F.mse_loss(theirs(scheduler.add_noise(clean, eps, t), t).sample, eps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(theirs.parameters())

        pairs = [
            ("sampling", our_sampling, their_sampling, batch * options.steps),
            ("training", trainer.train_step, their_training, batch),
        ]
        times: dict[str, tuple[list[float], list[float]]] = {}
        for what, ours, other, _ in pairs:
            ours()
            other()  # warm up
            times[what] = ([], [])
        for _ in range(options.rounds):
            for what, ours, other, _ in pairs:
                times[what][0].append(timed(ours, device))
                times[what][1].append(timed(other, device))
        for what, _, _, images_done in pairs:
            report(what, *times[what], images_done)


if __name__ == "__main__":
    main()
