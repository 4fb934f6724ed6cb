"""How fast ddpm samples and trains, compared with diffusers as its users run it, and how much memory both take.

    python benchmarks/vs_diffusers.py [--preset cifar10] [--batch-size 16] [--rounds 5] [--precision auto]

Each has a process of its own, as in real use: ddpm changes how its process waits and keeps memory. They work in turn
(ours, theirs, ours, theirs, …), so that a machine with changing speed slows both. The result is the ratio of each pair.
A round is a few steps of the reverse process, then a few training steps.

- ours: what `ddpm sample` and `ddpm train` run.
- theirs: `DDPMPipeline`'s loop, and that of diffusers' example `train_unconditional.py`, both in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

UNTOUCHED = dict(os.environ)  # before ddpm_cli limits how long threads spin

EMOJI = Path(__file__).parent.parent / "examples" / "emoji.zip"
WORKS = ("sampling", "training")


def ours(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], object]]:
    """The work of a round, by its name."""
    import torch

    from ddpm_cli import device as machine
    from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
    from ddpm_cli.data.pack import open_pack
    from ddpm_cli.data.sources import open_source
    from ddpm_cli.models.ddpm import DDPM
    from ddpm_cli.nn.unet import UNet
    from ddpm_cli.training.presets import PRESETS
    from ddpm_cli.training.trainer import Trainer

    device = machine.pick_device(options.device)
    dtype = machine.pick_dtype(options.precision, device)
    preset, config = PRESETS[options.preset], unet_config(options)
    data = DataConfig(images=str(EMOJI), size=config.sample_size, channels=3)
    run = RunConfig(
        version="benchmark",
        preset=options.preset,
        data=data,
        train=TrainConfig(steps=10**6, batch_size=options.batch_size, lr=preset.lr),
        unet=config,
        schedule=preset.schedule(),
    )
    trainer = Trainer(folder, run, open_pack(open_source(EMOJI, folder), data, folder), device, dtype)
    unet = UNet(config)
    unet.reset_parameters()
    model = DDPM(machine.place(unet.eval().requires_grad_(False), device, dtype), run.schedule)
    noise = torch.randn(options.batch_size, *model.shape)

    def sample() -> None:
        for _ in model.sample_loop(noise, "ddpm", steps=options.steps):
            pass

    def train() -> None:
        for _ in range(options.training_steps):
            trainer.train_step()

    return {"sampling": sample, "training": train, "about": lambda: machine.describe(device, dtype)}


def theirs(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], object]]:
    """The same with diffusers, and without ddpm_cli."""
    import torch

    import diffusers_loops

    warnings.filterwarnings("ignore")
    network, device = json.loads(options.network), torch.device(options.device)
    training = diffusers_loops.training(network, options.batch_size, device)
    sampling = diffusers_loops.sampling(network, options.batch_size, device)
    return {
        "sampling": lambda: sampling(options.steps),
        "training": lambda: training(options.training_steps),
        "about": lambda: f"{options.device}, fp32",
    }


def unet_config(options: argparse.Namespace) -> Any:
    from ddpm_cli.training.presets import PRESETS

    preset = PRESETS[options.preset]
    return preset.unet(options.size or preset.size or 32, 3)


def work(options: argparse.Namespace) -> None:
    """In a process of its own: for every line of stdin, do what it names, and print its seconds."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        works = {"ours": ours, "diffusers": theirs}[options.worker](options, Path(folder))
        print(works.pop("about")(), flush=True)
        for line in sys.stdin:
            if line.strip() == "memory":
                print(peak_memory(), flush=True)
                continue
            start = time.perf_counter()
            works[line.strip()]()
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            print(time.perf_counter() - start, flush=True)


def peak_memory() -> float:
    """Of this process, in MB: on the GPU if it uses one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


@contextmanager
def worker(options: argparse.Namespace, name: str, network: str) -> Iterator[Callable[[str], str]]:
    """Start a process. Yields a function that sends it a line and returns its answer."""
    command = [sys.executable, __file__, *sys.argv[1:], "--device", options.device, "--worker", name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([*command, "--network", network], env=UNTOUCHED, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(line: str) -> str:
            process.stdin.write(line + "\n")
            return answer()

        def answer() -> str:
            if not (found := process.stdout.readline()):
                raise SystemExit(f"{name} failed")
            return found.strip()

        about = answer()
        if not options.json:
            print(f"{name}: {about}")
        yield ask
        process.stdin.close()


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each work: images/s of each program, and the ratios of the pairs; last the peaks of memory."""
    config = unet_config(options)
    network = json.dumps({key: value for key, value in config.to_dict().items() if not key.startswith("_")})
    what = {"preset": options.preset, "size": config.sample_size, "batch": options.batch_size}
    with ExitStack() as stack:
        names = ["ours"] if options.alone else ["ours", "diffusers"]
        asks = {name: stack.enter_context(worker(options, name, network)) for name in names}
        times: dict[tuple[str, str], list[float]] = {(name, w): [] for name in asks for w in options.only}
        for round_ in range(options.rounds + 1):
            for name, work in sorted(times, key=lambda key: WORKS.index(key[1])):
                seconds = float(asks[name](work))
                if round_:  # the first one warms up
                    times[name, work].append(seconds)
        for work in options.only:
            images = options.batch_size * (options.steps if work == "sampling" else options.training_steps)
            row = what | {"work": work} | {name: images / statistics.median(times[name, work]) for name in asks}
            if not options.alone:
                pairs = zip(times["ours", work], times["diffusers", work], strict=True)
                ratios = [theirs / ours for ours, theirs in pairs]
                row |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            yield row
        yield what | {"work": "memory"} | {name: float(ask("memory")) for name, ask in asks.items()}


def report(row: dict[str, Any]) -> None:
    unit = "MB at the peak" if row["work"] == "memory" else "images/s"
    found = ", ".join(f"{name} {row[name]:.4g}" for name in ("ours", "diffusers") if name in row)
    ratio = f"; ratio median {row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})" if "ratio" in row else ""
    print(f"{row['work']}: {found} {unit}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--size", type=int, help="of the images; default: the preset's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of the reverse process in a round")
    parser.add_argument("--training-steps", type=int, default=1, help="in a round")
    parser.add_argument("--only", choices=WORKS, nargs="+", default=WORKS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="ours; diffusers runs in float32")
    parser.add_argument("--alone", action="store_true", help="only ours")
    parser.add_argument("--json", action="store_true", help="print rows of JSON")
    parser.add_argument("--worker", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return

    from ddpm_cli.device import pick_device

    options.device = str(pick_device(options.device))
    for row in measure(options):
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            report(row)


if __name__ == "__main__":
    main()
