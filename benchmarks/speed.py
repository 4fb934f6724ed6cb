"""How fast ddpm is on this machine, as Markdown: against diffusers, by batch, size and steps, and from a cold start.

    python benchmarks/speed.py [--rounds 5] > speed.md

Takes a quarter of an hour on two cores. Run it on a machine that does nothing else. With a GPU, use gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
CONTESTS = {  # options of vs_diffusers.py
    "CIFAR-10 model (35.7M), 16 images": "--preset cifar10 --batch-size 16",
    "CIFAR-10 model (35.7M), 64 images": "--preset cifar10 --batch-size 64 --steps 1",
    "`tiny` (1.3M) at 32x32, 32 images": "--preset tiny --batch-size 32 --steps 20 --training-steps 10",
}
GROWTH = {
    **{f"{n} images of 32x32": f"--batch-size {n}" for n in (1, 4, 16, 64)},
    **{f"16 images of {size}x{size}": f"--batch-size 16 --size {size}" for size in (16, 64)},
    "16 images of 32x32, 20 steps": "--batch-size 16 --steps 20",
}
COLD = "-m ddpm_cli sample -m bundled:digits --n 1 --force -q --steps"


def processor() -> str:
    """The name of the processor, and what it multiplies bf16 with."""
    names = [platform.processor() or platform.machine()]
    flags: set[str] = set()
    if (info := Path("/proc/cpuinfo")).exists():
        pairs = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        found = {key.strip(): value.strip() for key, value in pairs}
        names, flags = [found.get("model name", names[0])], set(found.get("flags", "").split())
    units = [
        name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("avx2", "AVX2")) if flag in flags
    ]
    return f"{names[0]}, {os.cpu_count()} cores, {units[0] if units else 'neither AVX2 nor AVX512'}"


def compare(words: str, rounds: int) -> dict[str, dict[str, Any]]:
    """The rows of vs_diffusers.py by their work."""
    command = [sys.executable, str(HERE / "vs_diffusers.py"), *words.split(), "--device", "cpu", "--json"]
    done = subprocess.run([*command, "--rounds", str(rounds)], stdout=subprocess.PIPE, text=True, check=True)
    return {row["work"]: row for row in map(json.loads, done.stdout.splitlines())}


def cold_start(rounds: int) -> list[float]:
    """Seconds of `import torch`, and of drawing one image in 10 steps and in 1, in a new process each: medians."""
    # Python keeps the compiled modules, as pip makes it for a package that is installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with TemporaryDirectory() as folder:
        draws = ([*COLD.split(), steps, "-o", f"{folder}/x.png"] for steps in ("10", "1"))
        commands = [["-c", "import torch"], *draws]
        times: list[list[float]] = [[] for _ in commands]
        for _ in range(rounds + 1):
            for seconds, words in zip(times, commands, strict=True):
                start = time.perf_counter()
                subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]  # the first one reads from the disk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{processor()}.\n")
    print("| against diffusers | ddpm, images/s | diffusers | ratio | memory, MB |\n|---|---|---|---|---|", flush=True)
    for name, words in CONTESTS.items():
        rows = compare(words, rounds)
        memory = rows.pop("memory")
        for work, row in rows.items():
            ratio = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
            sizes = f"{memory['ours']:.0f}, {memory['diffusers']:.0f}"
            cells = [f"{work}, {name}", f"{row['ours']:.3g}", f"{row['diffusers']:.3g}", ratio, sizes]
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| `tiny` | evaluations of an image/s | training, images/s |\n|---|---|---|", flush=True)
    for name, words in GROWTH.items():
        rows = compare(f"--preset tiny --alone --training-steps 10 {words}", rounds)
        print(f"| {name} | {rows['sampling']['ours']:.3g} | {rows['training']['ours']:.3g} |", flush=True)
    torch_alone, ten, one = cold_start(rounds)
    print(f"\n`import torch`: {torch_alone:.2f} s. `ddpm sample --n 1 --steps 10`: {ten:.2f} s; 1 step: {one:.2f} s.")


if __name__ == "__main__":
    main()
