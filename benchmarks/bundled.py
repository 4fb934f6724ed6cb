"""Makes the model that comes with ddpm, `bundled:digits`, from the bundled images.

    python benchmarks/bundled.py train --out FOLDER     # `ddpm train`, for an hour or more on one core
    python benchmarks/bundled.py write --out FOLDER     # measures each model, and writes src/ddpm_cli/bundled/
    python benchmarks/bundled.py commands --out FOLDER  # only prints the commands

The weights are the averages of the last checkpoint, rounded to float16, and all numbers on a model's card are measured
on these. `train` goes on where it was stopped.

`--models emoji` makes one in colour. It does not come with ddpm: of 64 pictures, 27 are definite at a glance, mostly
faces, cats and hearts; 24 are vague, and 13 are blots.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from ddpm_cli.data.split import is_held_out
from ddpm_cli.files import new_directory
from ddpm_cli.models import hub
from ddpm_cli.models.card import CARD, PREVIEW, model_card
from ddpm_cli.models.facts import facts
from ddpm_cli.models.pipeline import save_model
from ddpm_cli.models.pretrained import WEIGHTS, read_model
from ddpm_cli.models.recipe import read_recipe
from ddpm_cli.run_folder import METRICS

ROOT = Path(os.path.relpath(Path(__file__).parent.parent))
BUNDLED = ROOT / "src/ddpm_cli/bundled"
HELD_OUT = 0.1
CURVE = "curve.png"


class Example(NamedTuple):
    """options: of `ddpm train`. metrics: of `ddpm eval`. licence: of the images, by its name on the Hub."""

    options: str
    metrics: str
    licence: str
    about: str


MODELS = {
    "digits": Example(
        "--size 28 --no-flip --steps 20k --loss simple --lr-decay 0",
        f"--metrics bpd,fid --features {ROOT / 'examples/digits-features.pt'}",
        "cc-by-sa-3.0",
        "The images are 5,000 digits of [MNIST](http://yann.lecun.com/exdb/mnist/) by Yann LeCun and Corinna Cortes, "
        "[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/).\n"
        "The Fréchet distance is in the 64 features of a small classifier of digits, so it is not FID.",
    ),
    "emoji": Example(
        "--size 32 --steps 20k --loss min-snr --lr-decay 0.5",
        "--metrics bpd",
        "apache-2.0",
        "The images are 459 pictures of [Noto Emoji](https://github.com/googlefonts/noto-emoji) by Google, Apache 2.0.",
    ),
}


def train_command(name: str, out: Path) -> list[str]:
    images = f"{ROOT / 'examples' / name}.zip"
    options = f"--preset tiny {MODELS[name].options} --holdout {HELD_OUT} --seed 0"
    return shlex.split(f"train {images} -o {out / name} {options} --sample-every 2500 --resume")


def eval_commands(name: str, out: Path) -> Iterator[list[str]]:
    """Of the model on images that it has not seen; and for digits of the real images that it has seen."""
    held, seen = (out / f"{name}-{part}.txt" for part in ("held-out", "seen"))
    metrics = MODELS[name].metrics
    yield shlex.split(
        f"eval {out / 'models' / name} --data {held} -n 2000 --terms 50 -o {out / 'eval' / name} {metrics}"
    )
    if "fid" in metrics:
        real = metrics.replace("bpd,", "")
        yield shlex.split(f"eval --samples {seen} --data {held} -o {out / 'eval' / name}-seen {real}")


def commands(name: str, out: Path) -> None:
    """Print the commands of a model."""
    for command in (train_command(name, out), *eval_commands(name, out)):
        print(shlex.join(["ddpm", *command]))


def train(name: str, out: Path) -> None:
    """Train a model, or go on with it."""
    ddpm(train_command(name, out))


def write(name: str, out: Path, machine: str) -> None:
    """Round the weights, measure the model, and write it with its card. machine: what trained it, in words."""
    run = out / name
    located = hub.resolve(str(run))
    unet, schedule = read_model(located.folder, located.files)
    recipe = read_recipe(located.folder)
    rounded = {key: value.half() for key, value in unet.state_dict().items()}
    with new_directory(out / "models" / name) as partial:
        save_model(partial, rounded, unet.config, schedule, recipe)
    split(name, out)
    results: list[dict[str, Any]] = []
    for command in eval_commands(name, out):
        ddpm(command)
        found = json.loads((Path(command[command.index("-o") + 1]) / "eval.json").read_text())["results"]
        results += found if not results else [result | {"set": "real images that it has seen"} for result in found]
    with new_directory(BUNDLED / name) as partial:
        ddpm(shlex.split(f"sample -m {out / 'models' / name} -o {partial / PREVIEW}"))
        ddpm(shlex.split(f"plot {run} -o {partial / CURVE}"))
        preview = (partial / PREVIEW).read_bytes()
        save_model(partial, rounded, unet.config, schedule, recipe, preview)
        file = partial / "unet" / f"{WEIGHTS}.safetensors"
        save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
        file.chmod(0o644)
        text = model_card(facts(unet.config, schedule), recipe, True, results=results)
        (partial / CARD).write_text(card(name, text, run, machine), encoding="utf-8")


def card(name: str, text: str, run: Path, machine: str) -> str:
    """The card of `ddpm train` with a licence, the address, and how the model was made."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    minutes = lines[-1]["seconds"] / 60
    text = text.replace("---\n", f"---\nlicense: {MODELS[name].licence}\n", 1)
    text = text.replace("-m path/to/this/folder", f"-m bundled:{name}").rpartition("\n<!--")[0]
    made = [
        "## How it was made",
        f"By `python benchmarks/bundled.py train` and `write`, with these commands. "
        f"Training took {minutes:.0f} minutes on {machine}.",
        "```sh\n" + "\n".join(shlex.join(["ddpm", *command]) for command in shown(name)) + "\n```",
        f"![Loss, gradient norm, learning rate and speed]({CURVE})",
        "The weights are rounded to float16, and all numbers above are measured on these.\n" + MODELS[name].about,
    ]
    return text.rstrip() + "\n\n" + "\n\n".join(made) + "\n"


def shown(name: str) -> Iterator[list[str]]:
    """The commands as they are in a clone, with a short name for the folder."""
    for command in (train_command(name, Path("models")), *eval_commands(name, Path("models"))):
        yield [part.replace(f"{ROOT}/", "") for part in command]


def split(name: str, out: Path) -> None:
    """Unpack the images, and list those that `--holdout` holds out and the others."""
    lists: dict[bool, list[str]] = {True: [], False: []}
    with zipfile.ZipFile(ROOT / "examples" / f"{name}.zip") as archive:
        archive.extractall(out / "images" / name)
        for image in sorted(archive.namelist()):
            if image.endswith(".png"):
                lists[is_held_out(image, HELD_OUT)].append(f"images/{name}/{image}\n")
    for held, lines in lists.items():
        (out / f"{name}-{'held-out' if held else 'seen'}.txt").write_text("".join(lines))


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")), "a processor")


def ddpm(command: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "ddpm_cli", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "write", "commands"))
    parser.add_argument("--out", type=Path, default=Path("models"))
    parser.add_argument("--machine", default=processor(), help="what trained it, for the card")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["digits"])
    options = parser.parse_args()
    for name in options.models:
        if options.command == "write":
            write(name, options.out, options.machine)
        else:
            {"train": train, "commands": commands}[options.command](name, options.out)


if __name__ == "__main__":
    main()
