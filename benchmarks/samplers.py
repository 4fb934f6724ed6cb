"""The quality of each sampler by the number of network evaluations, on the bundled examples.

    python benchmarks/samplers.py train --out FOLDER            # two models, half an hour or more
    python benchmarks/samplers.py plan --runs FOLDER --out OUT  # what there is to do, and how long it takes
    python benchmarks/samplers.py measure --runs FOLDER --out OUT
    python benchmarks/samplers.py table --out OUT
    python benchmarks/samplers.py pictures --out OUT

Every fifth image of an example is held out. A model is trained on the others, and its samples are compared with the
held out ones: KID for both examples, and the Fréchet distance for digits, in the features of a small network
(features.py). The 91 held out emoji are too few for a Fréchet distance.

Samples come in blocks, each of another seed; in a block, image i starts from the same noise with every sampler. The
mean and the deviation of the blocks are reported. "real" is the same for blocks of training images.

`measure` writes each block as soon as it is drawn, and goes on where it was killed. Several of them may run at the same
time, best with one thread each (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save
from torch import Tensor

from ddpm_cli.data.images import to_pil
from ddpm_cli.errors import LockedError
from ddpm_cli.evaluation.distances import frechet, squared_mmd
from ddpm_cli.evaluation.moments import moments
from ddpm_cli.files import lock, write_file
from ddpm_cli.models.ddpm import DDPM
from features import DATA, Example, Network, open_network

COLUMNS = (5, 10, 15, 20, 50, 100, 200, 1000)
FEW, MANY = COLUMNS[:4], COLUMNS[:5]


class Row(NamedTuple):
    """A sampler and its settings. columns: the numbers of evaluations to measure."""

    sampler: str
    spacing: str
    columns: tuple[int, ...] = MANY
    settings: dict[str, Any] = {}  # noqa: RUF012  never changed

    @property
    def name(self) -> str:
        own = "".join(f", {name} {value}" for name, value in self.settings.items())
        return f"{self.sampler} {self.spacing}{own}"

    def steps(self, column: int) -> int:
        """Langevin dynamics make some updates at each step, and one evaluation more at the end."""
        updates: int = self.settings.get("updates", 1)
        return max(1, column // updates)


ROWS = [
    Row("ddpm", "uniform", (*MANY, 100, 1000)),
    Row("ddim", "uniform", MANY),
    Row("ddim", "quadratic", (*MANY, 100)),
    Row("dpm++", "logsnr", (*MANY, 100), {"order": 2, "eta": 1.0}),
    Row("dpm++", "uniform", MANY, {"order": 2, "eta": 1.0}),
    Row("dpm++", "quadratic", FEW, {"order": 2, "eta": 1.0}),
    Row("dpm++", "logsnr", MANY, {"order": 2, "eta": 0.0}),
    Row("dpm++", "uniform", FEW, {"order": 2, "eta": 0.0}),
    Row("dpm++", "logsnr", FEW, {"order": 3}),
    Row("langevin", "logsnr", (50, 100, 200), {"updates": 5}),
]
BASE = (ROWS[0].name, 1000)  # with which the others are compared: Algorithm 2


class Block(NamedTuple):
    """Samples that are drawn and judged together."""

    data: str
    row: Row
    column: int
    seed: int

    def file(self, out: Path) -> Path:
        """Without its suffix, so its name has no point."""
        name = self.row.name.replace(", ", "-").replace(" ", "-").replace(".", "p")
        return out / self.data / f"{name}-{self.column}-{self.seed}"


class WholeBatches(DDPM):
    """A model that always evaluates whole batches.

    With one thread, `DDPM` evaluates pairs of images, so that an image is the same bytes in every batch. That takes
    more than twice the time, and does not matter here.
    """

    def _network(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.unet(x_t, t)  # type: ignore[no-any-return]


def train(options: argparse.Namespace) -> None:
    """Run `ddpm train` on the images that are not held out."""
    for name in options.data:
        example = DATA[name]
        with zipfile.ZipFile(example.archive) as archive:
            archive.extractall(options.out / "images" / name)
        images = options.out / f"{name}-train.txt"
        images.write_text("".join(f"images/{name}/{image}\n" for image in example.names(held=False)))
        command = [sys.executable, "-m", "ddpm_cli", "train", images, "-o", options.out / name, "--resume"]
        command += ["--preset", "tiny", "--loss", "simple", "--lr-decay", "0", "--steps", options.steps]
        command += ["--flip" if example.mirror else "--no-flip"]
        subprocess.run([str(part) for part in command], check=True)


def blocks(options: argparse.Namespace) -> Iterator[Block]:
    """All blocks of the plan: one seed after the other, and the long ones last."""
    for seed in range(options.seeds):
        for column in COLUMNS:
            for name in options.data:
                for row in ROWS:
                    if column in row.columns and options.only in row.name and column <= options.most:
                        yield Block(name, row, column, seed)


class Judge:
    """Compares samples with the real images of an example."""

    def __init__(self, example: Example, folder: Path) -> None:
        self.example = example
        self.network: Network = open_network(example, folder)
        self.fingerprint = self.network.fingerprint()
        self.held, self.trained = (self.network.embed(example.images(held)) for held in (True, False))

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """samples: (N, C, H, W) uint8."""
        return self._distances(self.network.embed(samples))

    def _distances(self, features: Tensor) -> dict[str, float]:
        found = {"kid": squared_mmd(features, self.held), "kid to training": squared_mmd(features, self.trained)}
        if self.example.labels:
            found["frechet"] = frechet(moments(features).statistics, moments(self.held).statistics)
        return found

    def real(self, count: int) -> list[dict[str, float]]:
        """The distances of blocks of training images: no model can be expected to do better."""
        order = torch.randperm(len(self.trained), generator=torch.Generator().manual_seed(0))
        found = [self._distances(self.trained[part]) for part in torch.split(order, count) if len(part) == count]
        return [{**one, "kid to training": float("nan")} for one in found]  # they are among the training images


def plan(options: argparse.Namespace) -> None:
    """Print what is left to do and how long it takes."""
    total = 0.0
    for name in options.data:
        model = open_model(options, name)
        model.sample(64, steps=1)
        started = time.process_time()
        model.sample(64, steps=4, sampler="ddpm")
        cost = (time.process_time() - started) / 256
        left = [block for block in blocks(options) if block.data == name and not done(block, options)]
        images = sum(block.column for block in left) * count_of(options, name)
        total += cost * images
        print(
            f"{name}: {len(left)} blocks of {count_of(options, name)} images, {images:,} evaluations of one image at "
            f"{1e3 * cost:.1f} ms: {cost * images / 60:.0f} minutes of a processor"
        )
    print(f"in all: {total / 60:.0f} minutes of a processor")


def measure(options: argparse.Namespace) -> None:
    """Draw and judge every block that is missing, unless another process is at it."""
    models = {name: open_model(options, name) for name in options.data}
    with lock(options.out / "features.lock"):  # one process trains the networks
        judges = {name: Judge(DATA[name], options.out) for name in options.data}
    for block in blocks(options):
        try:
            with lock(block.file(options.out).with_suffix(".lock"), wait=False):
                if not done(block, options):
                    draw(block, models[block.data], judges[block.data], options)
        except LockedError:
            continue


def draw(block: Block, model: DDPM, judge: Judge, options: argparse.Namespace) -> None:
    """Draw and judge a block. The samples are kept, so that another network can judge them later."""
    samples = samples_file(block, options.out)
    count = count_of(options, block.data)
    own = {"sampler": block.row.sampler, "spacing": block.row.spacing, **block.row.settings}
    sampling = model.sampling(steps=block.row.steps(block.column), **own)
    started = time.process_time()
    if not samples.exists() or len(load_file(samples)["images"]) != count:
        images = torch.cat(list(model.sample_batches(range(count), sampling, block.seed, options.batch_size)))
        write_file(samples, save({"images": images}))
    result = {
        "data": block.data,
        "row": block.row.name,
        "column": block.column,
        "seed": block.seed,
        "images": count,
        "evaluations": sampling.evaluations,
        "model": model.fingerprint(),
        "precision": str(model.unet.conv_in.weight.dtype).removeprefix("torch."),
        "features": judge.fingerprint,
        "seconds": round(time.process_time() - started, 1),
        **judge(load_file(samples)["images"]),
    }
    with lock(options.out / "results.lock"), results_file(options).open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def open_model(options: argparse.Namespace, name: str) -> DDPM:
    model = WholeBatches.from_pretrained(options.runs / name, precision=options.precision)
    known = {row["model"] for row in results(options) if row["data"] == name}
    if known - {model.fingerprint()}:
        raise SystemExit(f"{options.out} has results of another model of {name}: name another folder")
    return model


def count_of(options: argparse.Namespace, name: str) -> int:
    """How many images a block has."""
    count: int = options.emoji if name == "emoji" else options.digits
    return count


def samples_file(block: Block, out: Path) -> Path:
    return block.file(out).with_suffix(".safetensors")


def results_file(options: argparse.Namespace) -> Path:
    path: Path = options.out / "results.jsonl"
    return path


def results(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = results_file(options)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def done(block: Block, options: argparse.Namespace) -> bool:
    wanted = (block.data, block.row.name, block.column, block.seed, count_of(options, block.data))
    return any((r["data"], r["row"], r["column"], r["seed"], r["images"]) == wanted for r in results(options))


def table(options: argparse.Namespace) -> None:
    """Print a Markdown table for each example and distance."""
    everything = results(options)
    for name in options.data:
        found = [row for row in everything if row["data"] == name and row["images"] == count_of(options, name)]
        if not found:
            continue
        real = Judge(DATA[name], options.out).real(count_of(options, name))
        for distance in [key for key in ("frechet", "kid", "kid to training") if key in found[0]]:
            print_table(name, distance, found, [one[distance] for one in real], count_of(options, name))


def print_table(name: str, distance: str, found: list[dict[str, Any]], real: list[float], count: int) -> None:
    """A row per sampler, a column per number of evaluations. Bold: no worse than Algorithm 2 within the noise."""
    factor = 1 if distance == "frechet" else 1000
    cells: dict[tuple[str, int], list[float]] = {}
    for result in found:
        cells.setdefault((result["row"], result["column"]), []).append(factor * result[distance])
    means = {place: statistics.mean(values) for place, values in cells.items()}
    noise = pooled_deviation(cells, means)
    columns = [column for column in COLUMNS if any(place[1] == column for place in cells)]
    title = {"frechet": "Fréchet distance", "kid": "KID x 1000", "kid to training": "KID x 1000 to the training images"}
    print(f"\n{name}, {title[distance]}, blocks of {count} images, model {found[0]['model']}\n")
    print(f"| | {' | '.join(map(str, columns))} |\n|---|{'---|' * len(columns)}")
    for row in ROWS:
        texts = [cell_text(cells.get((row.name, column), []), means, noise, cells) for column in columns]
        if any(texts):
            print(f"| {row.name} | {' | '.join(texts)} |")
    floor = [factor * value for value in real if value == value]
    if floor:
        print(f"\nreal images: {spread(floor)}")
    if noise:
        print(f"deviation of one block, from cells at most 1.5 times {BASE[0]}, {BASE[1]}: {noise:.2f}")


def cell_text(
    values: list[float], means: dict[tuple[str, int], float], noise: float, cells: dict[tuple[str, int], list[float]]
) -> str:
    """The mean of the blocks. Bold if it is above that of Algorithm 2 by at most two standard errors."""
    if not values:
        return ""
    text = spread(values)
    if BASE not in means or not noise:
        return text
    error = noise * (1 / len(values) + 1 / len(cells[BASE])) ** 0.5
    return f"**{text}**" if statistics.mean(values) <= means[BASE] + 2 * error else text


def pooled_deviation(cells: dict[tuple[str, int], list[float]], means: dict[tuple[str, int], float]) -> float:
    """The deviation of one block, from all cells that have several and are not much worse than Algorithm 2."""
    limit = 1.5 * means.get(BASE, float("inf"))
    squares = [
        (len(values) - 1, statistics.variance(values))
        for place, values in cells.items()
        if len(values) > 1 and (means[place] <= limit or place == BASE)
    ]
    freedom = sum(n for n, _ in squares)
    return (sum(n * square for n, square in squares) / freedom) ** 0.5 if freedom else 0.0


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def pictures(options: argparse.Namespace) -> None:
    """Draw the first four images of seed 0 for every sampler and number of evaluations: OUT/<example>.png."""
    for name in options.data:
        rows = [row for row in ROWS if options.only in row.name]
        sheet = {(row.name, c): samples_file(Block(name, row, c, 0), options.out) for row in rows for c in COLUMNS}
        tiles = {place: four(load_file(file)["images"]) for place, file in sheet.items() if file.exists()}
        if tiles:
            draw_sheet(tiles, [row.name for row in rows]).save(options.out / f"{name}.png")
            print(options.out / f"{name}.png")


def four(images: Tensor) -> Image.Image:
    """Four images in a square, at twice their size."""
    side = images.shape[-1]
    square = Image.new("RGB", (2 * side, 2 * side))
    for i in range(4):
        square.paste(to_pil(images[i]), (i % 2 * side, i // 2 * side))
    return square.resize((4 * side, 4 * side), Image.Resampling.NEAREST)


def draw_sheet(tiles: dict[tuple[str, int], Image.Image], names: list[str]) -> Image.Image:
    columns = [column for column in COLUMNS if any(place[1] == column for place in tiles)]
    names = [name for name in names if any(place[0] == name for place in tiles)]
    side = next(iter(tiles.values())).width + 6
    top, font = 24, ImageFont.load_default(14)
    left = 16 + int(max(font.getlength(name) for name in names))
    sheet = Image.new("RGB", (left + side * len(columns), top + side * len(names)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, column in enumerate(columns):
        pen.text((left + side * x + side // 2, top // 2), str(column), "black", font, anchor="mm")
    for y, name in enumerate(names):
        pen.text((8, top + side * y + side // 2), name, "black", font, anchor="lm")
        for x, column in enumerate(columns):
            if (name, column) in tiles:
                sheet.paste(tiles[name, column], (left + side * x, top + side * y))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (train, plan, measure, table, pictures):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--out", type=Path, default=Path("samplers"))
        sub.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
        if command is train:
            sub.add_argument("--steps", type=int, default=5000)
            continue
        sub.add_argument("--digits", type=int, default=500, metavar="N", help="images in a block")
        sub.add_argument("--emoji", type=int, default=250, metavar="N")
        sub.add_argument("--only", default="", help="rows whose name has this in it")
        if command in (plan, measure):
            sub.add_argument("--runs", type=Path, required=True, help="the folder that `train` filled")
            sub.add_argument("--seeds", type=int, default=2, help="blocks of each")
            sub.add_argument("--most", type=int, default=1000, help="evaluations")
            sub.add_argument("--batch-size", type=int, default=50)
            sub.add_argument("--precision", default="auto")
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
