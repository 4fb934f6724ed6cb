"""Small networks whose features tell how alike sets of images are, trained on the bundled examples alone.

    python benchmarks/features.py [--out FOLDER]    # trains them
    python benchmarks/features.py --export FOLDER   # also writes them as extractors: <example>-features.pt

- digits: a classifier of the ten digits.
- emoji, which have no labels: a network that tells the images apart, however they are shifted, turned, mirrored and
  coloured, as exemplar networks do (Dosovitskiy et al. 2014).

Each example has a split, by the order of the names: every fifth image is held out, and the networks are trained on the
others. Training takes about a minute on one core, and its result is kept in a file.

An extractor is TorchScript, as `--features` of ddpm takes it. examples/digits-features.pt is the one of the digits.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import math
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from ddpm_cli.data import images

EXAMPLES = Path(__file__).parent.parent / "examples"


class Example(NamedTuple):
    """A bundled data set, and how its network is trained.

    labels: whether the folders are labels; otherwise each image is a class. mirror: whether a mirrored image is the
    same. colour: the largest change of each channel's contrast and brightness, of its whole range.
    """

    name: str
    size: int
    channels: int
    labels: bool
    mirror: bool
    colour: float
    steps: int

    @property
    def archive(self) -> Path:
        return EXAMPLES / f"{self.name}.zip"

    def names(self, held: bool) -> list[str]:
        """The held out images, or the others."""
        with zipfile.ZipFile(self.archive) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return [name for i, name in enumerate(names) if (i % 5 == 4) == held]

    def images(self, held: bool) -> Tensor:
        """(N, C, H, W) uint8, as `ddpm train` sees them."""
        with zipfile.ZipFile(self.archive) as archive:
            opened = [images.decode(archive.read(name), name, self.channels) for name in self.names(held)]
        return torch.stack([images.from_pil(image) for image in opened])

    def classes(self, held: bool) -> Tensor:
        """(N,) int64: what the network learns to tell."""
        names = self.names(held)
        return torch.tensor([int(name.split("/")[0]) if self.labels else i for i, name in enumerate(names)])


DATA = {
    "digits": Example("digits", 28, 1, labels=True, mirror=False, colour=0.0, steps=500),
    "emoji": Example("emoji", 32, 3, labels=False, mirror=True, colour=0.1, steps=600),
}

_WIDTH = 64
_BATCH = 128


class Network(nn.Module):
    """Four convolutions, and the mean over the places: 64 features with mean 0 and deviation 1 on training images."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = [channels, 32, 48, _WIDTH, _WIDTH]
        layers: list[nn.Module] = []
        for i, (width, wider) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i in (1, 2) else 1
            layers += [nn.Conv2d(width, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.scale = nn.BatchNorm1d(_WIDTH, affine=False)
        self.classes = nn.Linear(_WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, 64)."""
        return self.scale(self.convolutions(x).mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.features(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> (N, 64) float64."""
        return torch.cat([self.features(images.to_float(part)) for part in torch.split(pixels, _BATCH)]).double()

    def fingerprint(self) -> str:
        return hashlib.sha256(save(self.state_dict())).hexdigest()[:8]


class Extractor(nn.Module):
    """A network as `ddpm_cli.evaluation.extractors` takes it: pixels to features, and to logits of real labels."""

    def __init__(self, network: Network, labels: bool) -> None:
        super().__init__()
        self.network = network
        self.labels = labels

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.network.features(images.to_float(pixels))
        return (features, self.network.classes(features)) if self.labels else features


def export(example: Example, network: Network, folder: Path) -> Path:
    """Write an extractor, without the names of source files of this machine that PyTorch adds for debugging."""
    path = folder / f"{example.name}-features.pt"
    folder.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its successor runs pickles when it reads a file
        pixels = torch.zeros(2, example.channels, example.size, example.size, dtype=torch.uint8)
        torch.jit.save(torch.jit.trace(Extractor(network, example.labels).eval(), pixels), whole)  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as written:
        for name in archive.namelist():
            if not name.endswith(".debug_pkl") and "/traced_inputs" not in name:
                written.writestr(zipfile.ZipInfo(name.replace("archive/", f"{path.stem}/", 1)), archive.read(name))
    return path


def open_network(example: Example, folder: Path) -> Network:
    """The network of an example from its file in a folder, where it is put if it is missing."""
    path = folder / f"features-{example.name}.safetensors"
    classes = example.classes(held=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(example.channels, int(classes.max()) + 1)
    if not path.exists():
        _train(network, example, classes)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(network.state_dict(), partial)
        partial.replace(path)
    network.load_state_dict(load_file(path))
    return network.eval()


def _train(network: Network, example: Example, classes: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = images.to_float(example.images(held=False))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=example.steps)
    network.train()
    for _ in range(example.steps):
        rows = torch.randint(len(pixels), (_BATCH,), generator=generator)
        loss = F.cross_entropy(network(_varied(pixels[rows], example, generator)), classes[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _varied(x: Tensor, example: Example, generator: torch.Generator) -> Tensor:
    """Images, each turned by up to 10 degrees, shifted by up to 2 pixels, mirrored and coloured at random."""

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=generator)

    turn = between(-1, 1) * math.radians(10)
    mirror = 1 - 2 * (between(0, 1) < 0.5).float() if example.mirror else torch.ones(len(x))
    shift = between(-1, 1, 2) * 2 * 2 / example.size  # a grid is 2 wide
    rows = [
        torch.stack([mirror * turn.cos(), -turn.sin(), shift[:, 0]], 1),
        torch.stack([mirror * turn.sin(), turn.cos(), shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast, brightness = (example.colour * between(-1, 1, example.channels, 1, 1) for _ in range(2))
    return (moved * (1 + contrast) + brightness).clamp(-1, 1)


def report(example: Example, network: Network) -> str:
    """What the network has learned: how many held out digits it knows, or training images from their mirror images."""
    pixels, classes = example.images(held=example.labels), example.classes(held=example.labels)
    if example.mirror:
        pixels = pixels.flip(-1)
    with torch.no_grad():
        right = network(images.to_float(pixels)).argmax(1) == classes
    what = "of the held out images" if example.labels else "of the mirrored training images"
    return f"{example.name}: {right.float().mean():.1%} {what} are told, features {network.fingerprint()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("samplers"), help="where the networks are kept")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="where extractors are written")
    options = parser.parse_args()
    for example in DATA.values():
        started = time.process_time()
        network = open_network(example, options.out)
        print(f"{report(example, network)} ({time.process_time() - started:.0f} s)", flush=True)
        if options.export:
            print(export(example, network, options.export))


if __name__ == "__main__":
    main()
