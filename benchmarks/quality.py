"""How good are the samples after ten minutes of training on a CPU? ddpm, diffusers and lucidrains' Trainer.

    python benchmarks/quality.py run --out FOLDER [--minutes 10] [--lucidrains PACKAGES]
    python benchmarks/quality.py table --out FOLDER

Every fifth image of a bundled example is held out. Each tool trains on the others for the same time, and 1,000 samples
of its averaged weights are compared with the held out images, as in samplers.py. "real" is the same for training
images. Shorter trainings of ddpm tell how long it takes to be as good as another tool.

- ddpm: `ddpm train` with its defaults.
- diffusers: the recipe of its example `train_unconditional.py` with `--use_ema`, in float32, on the network that ddpm
  trains. The network of the example has 113 million parameters, which hardly make a step in this time, and six levels,
  which do not divide 28 pixels.
- lucidrains: `Trainer`, `GaussianDiffusion` and `Unet` of denoising-diffusion-pytorch with their defaults. `dim` is the
  multiple of 4 that brings the number of parameters nearest to that of ddpm. `dim_mults` is the default, (1, 2, 4, 8),
  or for images that it does not divide (1, 2, 4).

Equal terms, where it was in doubt to the benefit of the others:

- The clock starts with the first step, and stops after the last one. Previews and checkpoints do not count. The others
  make none, and get their images from memory: a DataLoader would start its workers anew for each epoch.
- Images are mirrored only where a mirrored image is as real: emoji, not digits. The others learn gray digits as gray
  images, and not as RGB.
- Where the number of steps must be known before, short runs measure the speed: for the learning rates of ddpm and
  diffusers. The time that was really spent is in the table.
- Trials run one after the other, each in a process of its own, so none has another's threads or memory settings.
- ddpm draws with the defaults of `ddpm sample`. The others draw with that sampler, and with their own DDIM in 50
  steps, and the better distance counts.

`run` goes on where it was killed: FOLDER/quality.jsonl has a line for each trial. Leave the machine alone meanwhile.
Each trial has a folder with its samples, and a picture of the first 64.

lucidrains' package needs torchvision only to read files and to draw previews, so a stand-in takes its place. This
installs the rest without touching PyTorch:

    pip install --no-deps --target PACKAGES denoising-diffusion-pytorch einops ema-pytorch accelerate scipy psutil
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ddpm_cli import __version__
from ddpm_cli.config import ScheduleConfig, UNetConfig
from ddpm_cli.data import images
from ddpm_cli.data.pictures import grid, picture_bytes
from ddpm_cli.errors import LockedError
from ddpm_cli.files import lock, new_directory, write_file
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.nn.unet import UNet
from ddpm_cli.run_folder import METRICS
from ddpm_cli.training.presets import PRESETS
from features import DATA, Example
from samplers import Judge, WholeBatches

DDIM_STEPS = 50
_BATCH = 50  # samples that are drawn together
_FIRST_STEPS = 20  # of the first of the short runs that measure the speed
_SHORT_RUN = 0.05  # the second one, as a part of the time to train


class Trial(NamedTuple):
    """A tool, trained on an example for some minutes and judged by `count` samples."""

    data: str
    tool: str
    minutes: float
    seed: int
    count: int

    @property
    def example(self) -> Example:
        return DATA[self.data]

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    def folder(self, out: Path) -> Path:
        return out / f"{self.data}-{self.tool}-{self.minutes:g}-{self.seed}"

    def is_in(self, row: dict[str, Any]) -> bool:
        return self._asdict().items() <= row.items()


class Trained(NamedTuple):
    """A trained model. seconds: of training. samplers: by name, each draws (N, C, H, W) uint8."""

    steps: int
    batch_size: int
    seconds: float
    parameters: int
    version: str
    samplers: dict[str, Callable[[], Tensor]]


def train_for(seconds: float, train: Callable[[int], float]) -> tuple[int, float]:
    """Train as many steps as take this long, with a function from steps to seconds. Returns both, as they were.

    The first, short trainings only measure the speed.
    """
    steps = _FIRST_STEPS
    taken = train(steps)
    for share in (_SHORT_RUN, 1.0):
        steps = max(_FIRST_STEPS, round(steps * share * seconds / taken))
        taken = train(steps)
    return steps, taken


def train_ddpm(trial: Trial, out: Path) -> Trained:
    """`ddpm train` with its defaults, but for the mirroring and without previews on the way."""
    run = trial.folder(out) / "run"
    command = [sys.executable, "-m", "ddpm_cli", "train", images_folder(trial.example, out), "-o", run]
    command += ["--device", "cpu", "--seed", trial.seed, "--sample-every", "1M"]
    command += ["--flip" if trial.example.mirror else "--no-flip"]

    def train(steps: int) -> float:
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([str(part) for part in (*command, "--steps", steps)], check=True)
        return float(json.loads((run / METRICS).read_text().splitlines()[-1])["seconds"])

    steps, seconds = train_for(trial.seconds, train)
    model = WholeBatches.from_pretrained(run, device="cpu")
    batch_size = json.loads((run / "config.json").read_text())["train"]["batch_size"]
    return Trained(steps, batch_size, seconds, parameters(model.unet), __version__, our_sampler(model, trial))


def train_diffusers(trial: Trial, out: Path) -> Trained:
    """The recipe of diffusers' example `train_unconditional.py`, with its defaults and `--use_ema`."""
    import diffusers
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    config, batch_size = our_network(trial.example), 16
    pixels = images.to_float(trial.example.images(held=False))
    schedule = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    model = diffusers.UNet2DModel()

    def train(steps: int) -> float:
        nonlocal model
        torch.manual_seed(trial.seed)
        model = diffusers.UNet2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=steps)
        ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        model.train()
        started = time.perf_counter()
        for clean in itertools.islice(batches(pixels, batch_size, trial.example.mirror), steps):
            eps = torch.randn_like(clean)
            t = torch.randint(0, 1000, (len(clean),))
            loss = F.mse_loss(model(schedule.add_noise(clean, eps, t), t).sample, eps)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
        seconds = time.perf_counter() - started
        ema.copy_to(model.parameters())
        return seconds

    steps, seconds = train_for(trial.seconds, train)
    unet = UNet(config)
    unet.load_state_dict(model.state_dict())
    ours = WholeBatches(unet.eval(), ScheduleConfig(prediction_type="epsilon", variance_type="fixed_small"))
    pipeline = diffusers.DDIMPipeline(model.eval(), diffusers.DDIMScheduler.from_config(schedule.config))
    pipeline.set_progress_bar_config(disable=True)

    def ddim(count: int) -> Tensor:
        drawn = pipeline(batch_size=count, num_inference_steps=DDIM_STEPS, output_type="np").images
        return 2 * torch.from_numpy(drawn).permute(0, 3, 1, 2) - 1

    samplers = our_sampler(ours, trial) | {f"DDIM {DDIM_STEPS}": lambda: draw(ddim, trial)}
    return Trained(steps, batch_size, seconds, parameters(model), diffusers.__version__, samplers)


def train_lucidrains(trial: Trial, out: Path) -> Trained:
    """`Trainer` of denoising-diffusion-pytorch with its defaults."""
    import accelerate  # noqa: F401  before the stand-in, since it asks how torchvision is installed

    package = ModuleType("torchvision")
    package.transforms, package.utils = MagicMock(), MagicMock()  # type: ignore[attr-defined]
    sys.modules["torchvision"] = package
    import denoising_diffusion_pytorch as theirs

    example = trial.example
    pixels = example.images(held=False).float() / 255
    torch.manual_seed(trial.seed)
    unet = their_network(theirs.Unet, example)
    diffusion = theirs.GaussianDiffusion(unet, image_size=example.size, sampling_timesteps=DDIM_STEPS)
    trainer = theirs.Trainer(
        diffusion,
        images_folder(example, out),  # which is only listed
        augment_horizontal_flip=example.mirror,
        train_num_steps=sys.maxsize,
        save_and_sample_every=sys.maxsize,
        results_folder=trial.folder(out) / "results",
        calculate_fid=False,
    )

    def until_time_is_up() -> Iterator[Tensor]:
        for batch in batches(pixels, trainer.batch_size, example.mirror):
            if time.perf_counter() - started >= trial.seconds:
                trainer.train_num_steps = trainer.step + 1
            yield batch

    trainer.dl = until_time_is_up()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):  # its bar counts to sys.maxsize
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    averaged = trainer.ema.ema_model.eval()
    schedule = ScheduleConfig(prediction_type="v_prediction", trained_betas=tuple(averaged.betas.tolist()))
    ours = WholeBatches(Foreign(averaged.model, our_network(example)), schedule)  # type: ignore[arg-type]

    def ddim(count: int) -> Tensor:
        return 2 * averaged.sample(batch_size=count) - 1  # type: ignore[no-any-return]

    # Their schedule ends in almost pure noise, where the default spacing would spend a third of its steps.
    samplers = our_sampler(ours, trial, "uniform") | {f"DDIM {DDIM_STEPS}": lambda: draw(ddim, trial)}
    version = importlib.metadata.version("denoising-diffusion-pytorch")
    return Trained(trainer.step, trainer.batch_size, seconds, parameters(unet), version, samplers)


TOOLS = {"ddpm": train_ddpm, "diffusers": train_diffusers, "lucidrains": train_lucidrains}


def our_network(example: Example) -> UNetConfig:
    """The network that `ddpm train` chooses on a CPU."""
    return PRESETS["tiny"].unet(example.size, example.channels)


def their_network(kind: Callable[..., nn.Module], example: Example) -> nn.Module:
    """lucidrains' Unet with about as many parameters as the network of ddpm."""
    wanted = parameters(UNet(our_network(example)))
    mults = (1, 2, 4) if example.size % 8 else (1, 2, 4, 8)
    sizes = (kind(dim, dim_mults=mults, channels=example.channels) for dim in range(8, 65, 4))
    return min(sizes, key=lambda unet: abs(parameters(unet) - wanted))


class Foreign(nn.Module):
    """lucidrains' Unet in the place of ours, for `DDPM`. config: of a network for the same images."""

    def __init__(self, unet: nn.Module, config: UNetConfig) -> None:
        super().__init__()
        self.theirs, self.config = unet, config
        self.conv_in = unet.init_conv

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.theirs(x_t, t.expand(len(x_t)))  # type: ignore[no-any-return]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def batches(pixels: Tensor, size: int, mirror: bool) -> Iterator[Tensor]:
    """Shuffled epochs without end. mirror: half of the images, at random."""
    while True:
        for rows in torch.randperm(len(pixels)).split(size):
            batch = pixels[rows]
            if mirror:
                batch = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, batch.flip(3), batch)
            yield batch


def our_sampler(model: DDPM, trial: Trial, spacing: str | None = None) -> dict[str, Callable[[], Tensor]]:
    """The default of `ddpm sample`. spacing: another one."""
    sampling = model.sampling(spacing=spacing)
    name = f"{sampling.sampler} {sampling.evaluations}"
    return {name: lambda: model.sample(trial.count, seed=trial.seed, batch_size=_BATCH, spacing=spacing)}


@torch.no_grad()
def draw(sampler: Callable[[int], Tensor], trial: Trial) -> Tensor:
    """All samples of a function from a number of images to images in [-1, 1]."""
    torch.manual_seed(trial.seed)
    counts = [min(_BATCH, trial.count - first) for first in range(0, trial.count, _BATCH)]
    return torch.cat([images.to_uint8(sampler(count)) for count in counts])


def images_folder(example: Example, out: Path) -> Path:
    """A folder with the images that are not held out, which is made if it is missing."""
    folder = out / "images" / example.name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(folder) as partial:
            for i, image in enumerate(example.images(held=False)):
                images.to_pil(image).save(partial / f"{i:04}.png")
    return folder


def trials(options: argparse.Namespace) -> Iterator[Trial]:
    """All trials of the plan: those of the full time first."""
    for minutes in (options.minutes, *sorted(options.shorter, reverse=True)):
        for data in options.data:
            for tool in options.tools:
                if minutes == options.minutes or tool == "ddpm":
                    yield Trial(data, tool, minutes, options.seed, options.count)


def results(out: Path) -> list[dict[str, Any]]:
    path = out / "quality.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace) -> None:
    """Make the trials that are missing, one after the other."""
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with lock(options.out / "quality.lock", wait=False):
            for name in options.data:
                images_folder(DATA[name], options.out)
                Judge(DATA[name], options.out)
            failed = [one for one in trials(options) if not make(one, options)]
    except LockedError as error:
        raise SystemExit(str(error)) from None
    if failed:
        raise SystemExit("".join(f"failed: {one}\n" for one in failed))


def make(one: Trial, options: argparse.Namespace) -> bool:
    """Make a trial in a process of its own, unless its result is there. Returns whether it is."""
    if any(one.is_in(row) for row in results(options.out)):
        return True
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}  # ddpm_cli has set it
    environment |= {"ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"}
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    if one.tool == "lucidrains" and options.lucidrains:
        paths = [str(options.lucidrains.absolute()), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, str(Path(__file__)), "trial", "--out", str(options.out)]
    command += [f"--{name}={value}" for name, value in one._asdict().items()]
    print(one, flush=True)
    return subprocess.run(command, env=environment).returncode == 0


def trial(options: argparse.Namespace) -> None:
    """Make one trial in this process. `run` calls it."""
    one = Trial(options.data, options.tool, options.minutes, options.seed, options.count)
    folder = one.folder(options.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained = TOOLS[one.tool](one, options.out)
    judge = Judge(one.example, options.out)
    distances = {}
    for name, sample in trained.samplers.items():
        samples = sample()
        path = folder / name.replace(" ", "-")
        write_file(path.with_suffix(".safetensors"), save({"images": samples}))
        write_file(path.with_suffix(".png"), picture_bytes(grid(samples[:64])))
        distances[name] = judge(samples)
    seen = trained.steps * trained.batch_size
    result = one._asdict() | {
        "steps": trained.steps,
        "images": seen,
        "seconds": round(trained.seconds, 1),
        "images_per_second": round(seen / trained.seconds, 1),
        "parameters": trained.parameters,
        "version": trained.version,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "features": judge.fingerprint,
        "distances": distances,
    }
    with (options.out / "quality.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


TITLES = {"frechet": ("Fréchet distance", 1), "kid": ("KID x 1000", 1000)}


def table(options: argparse.Namespace) -> None:
    """Print a Markdown table for each example: a row for each tool, time and sampler, the mean of the seeds."""
    for name in options.data:
        cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in results(options.out):
            if (row["data"], row["count"]) == (name, options.count) and row["minutes"] <= options.minutes:
                cells.setdefault((row["tool"], row["minutes"]), []).append(row)
        if cells:
            judge = Judge(DATA[name], options.out)
            real = judge.real(min(options.count, len(judge.trained)))
            print_table(name, options, cells, real)


def print_table(
    name: str,
    options: argparse.Namespace,
    cells: dict[tuple[str, float], list[dict[str, Any]]],
    real: list[dict[str, float]],
) -> None:
    """cells: the results of the seeds by tool and minutes. real: the distances of blocks of training images."""
    kinds = [kind for kind in TITLES if kind in real[0]]
    base = {kind: best(cells.get(("ddpm", options.minutes), []), kind) for kind in kinds}
    threads = {row["threads"] for rows in cells.values() for row in rows}
    print(f"\n{name}, {options.count} samples, threads: {', '.join(map(str, sorted(threads)))}\n")
    print("| | sampler | parameters | minutes | steps | images | images/s |", end="")
    print("".join(f" {TITLES[kind][0]} | times that of ddpm |" for kind in kinds))
    print(f"|---|{'---|' * (6 + 2 * len(kinds))}")
    for (tool, _), rows in sorted(cells.items(), key=lambda cell: (list(TOOLS).index(cell[0][0]), -cell[0][1])):
        for sampler in rows[0]["distances"]:
            values = [f"{tool} {rows[0]['version']}", sampler, f"{rows[0]['parameters']:,}"]
            values += [f"{mean(row['seconds'] for row in rows) / 60:.2f}"]
            values += [f"{mean(row[key] for row in rows):,.0f}" for key in ("steps", "images", "images_per_second")]
            for kind in kinds:
                found = [row["distances"][sampler][kind] for row in rows]
                values += [spread(found, kind), ratio(mean(found), base[kind])]
            print(f"| {' | '.join(values)} |")
    blank = " |" * 6
    print(f"| real |{blank}" + "".join(f" {spread([one[kind] for one in real], kind)} | |" for kind in kinds))
    print()
    for tool in TOOLS:
        if tool != "ddpm" and (rows := cells.get((tool, options.minutes))):
            for kind in kinds:
                print(f"- {tool}, {TITLES[kind][0]}: {comparison(rows, cells, kind, options.minutes)}.")


def comparison(
    rows: list[dict[str, Any]], cells: dict[tuple[str, float], list[dict[str, Any]]], kind: str, minutes: float
) -> str:
    """A tool against ddpm, in words: by the distance after the same time, and by the time to the same distance."""
    theirs, seconds = best(rows, kind), mean(row["seconds"] for row in rows)
    times = ratio(theirs, best(cells.get(("ddpm", minutes), []), kind))
    near = [key for key in sorted(cells) if key[0] == "ddpm" and best(cells[key], kind) <= theirs]
    if not near:
        return f"{times} times that of ddpm, which is not as near in any time tried"
    ours = mean(row["seconds"] for row in cells[near[0]])
    return (
        f"{times} times that of ddpm, which is as near after {ours / 60:.2f} minutes, {seconds / ours:.1f} times sooner"
    )


def best(rows: list[dict[str, Any]], kind: str) -> float:
    """The distance with the best of the samplers, the mean of the seeds."""
    if not rows:
        return float("nan")
    return min(mean(row["distances"][sampler][kind] for row in rows) for sampler in rows[0]["distances"])


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def ratio(value: float, base: float) -> str:
    """KID may be negative, for then a ratio has no meaning."""
    return f"{value / base:.2f}" if value > 0 and base > 0 else "–"


def spread(values: list[float], kind: str) -> str:
    scaled = [TITLES[kind][1] * value for value in values]
    deviation = f" ± {statistics.stdev(scaled):.2f}" if len(scaled) > 1 else ""
    return f"{mean(scaled):.2f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (run, trial, table):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--out", type=Path, default=Path("quality"))
        sub.add_argument("--minutes", type=float, default=10, help="of training")
        sub.add_argument("--count", type=int, default=1000, metavar="N", help="samples")
        if command is trial:
            sub.add_argument("--data", choices=DATA, required=True)
            sub.add_argument("--tool", choices=TOOLS, required=True)
            sub.add_argument("--seed", type=int, default=0)
            continue
        sub.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
        if command is run:
            sub.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
            sub.add_argument("--seed", type=int, default=0)
            sub.add_argument("--shorter", nargs="*", type=float, default=[1, 2, 4], help="minutes of ddpm, too")
            sub.add_argument("--threads", type=int, metavar="N", help="default: as many as each tool takes")
            sub.add_argument("--lucidrains", type=Path, metavar="PACKAGES", help="where its package is installed")
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
