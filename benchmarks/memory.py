"""Peak memory of packing and of training, for data sets of several sizes.

    python benchmarks/memory.py [--counts 1000 20000] [--size 32]

Makes a folder of each number of small images, and runs two processes: one that decodes the images, and one that trains
for a few steps on them. Prints the peak resident memory of each, in MB, as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

PACK = """
import sys
from pathlib import Path
from ddpm_cli.config import DataConfig
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import open_source
images, size, cache = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
open_pack(open_source(images, cache), DataConfig(images=images, size=size, channels=3), cache)
"""


def make_images(folder: Path, count: int, size: int) -> None:
    """Images of noise. Only a hundred files differ; the others are links to them, since only names must be many."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        path = folder / f"{i:06d}.png"
        if i < 100:
            pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=generator)
            Image.frombytes("RGB", (size, size), bytes(pixels.flatten().tolist())).save(path)
        else:
            path.hardlink_to(folder / f"{i % 100:06d}.png")


def peak(command: list[str], cache: Path) -> float:
    """Peak resident memory of a process, in MB."""
    process = subprocess.Popen(command, env=os.environ | {"DDPM_CACHE_DIR": str(cache)}, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    for count in options.counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_images(folder / "images", count, options.size)
            common = [str(folder / "images")]
            pack = [sys.executable, "-c", PACK, *common, str(options.size), str(folder / "cache")]
            train = [sys.executable, "-m", "ddpm_cli", "train", *common, "-o", str(folder / "run"), "-q"]
            settings = ["--preset", "tiny", "--size", str(options.size), "--batch-size", "8", "--steps", "3"]
            result = {
                "images": count,
                "packing": round(peak(pack, folder / "cache"), 1),
                "training": round(peak([*train, *settings, "--json"], folder / "cache"), 1),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
