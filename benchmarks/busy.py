"""How fast `tiny` trains on CPUs: on an idle machine, and next to processes that keep all cores busy.

OpenMP threads spin while they wait for each other. On an idle machine that is the fastest way. On a busy one a thread
spins while the thread that it waits for cannot run. `GOMP_SPINCOUNT` limits it. This script compares settings in turn:

    python benchmarks/busy.py --busy 3 --rounds 3

It prints images per second for each setting, idle and busy: the median of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ddpm_cli  # noqa: F401  before torch, as the command line does: it limits how long threads spin

SECONDS = 6.0
SETTINGS: dict[str, dict[str, str]] = {
    "ddpm's default": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def measure() -> None:
    """Train for some seconds and print images per second; runs in its own process."""
    import torch

    from ddpm_cli.data.survey import Survey
    from ddpm_cli.training.plan import plan_run
    from ddpm_cli.training.rehearsal import BlankPack
    from ddpm_cli.training.trainer import Trainer

    config = plan_run(Survey(5000, 5000, 5000, 28, 28), "images", on_gpu=False, preset="tiny")
    with tempfile.TemporaryDirectory() as folder:
        pack = BlankPack(5000, (1, 28, 28))
        trainer = Trainer(Path(folder), config, pack, torch.device("cpu"), torch.float32)
        trainer.unite()
        for _ in range(2):
            trainer.train_step()
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < SECONDS:
            trainer.train_step()
            steps += 1
        print(steps * config.train.batch_size / (time.perf_counter() - started))


def images_per_second(setting: dict[str, str]) -> float:
    unset = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    command = [sys.executable, __file__, "--measure"]
    return float(subprocess.run(command, env=unset | setting, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=3, help="processes that keep the machine busy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    found: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in SETTINGS}
    for _ in range(arguments.rounds):
        for busy in (False, True):
            load = [
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(arguments.busy if busy else 0)
            ]
            try:
                for name, setting in SETTINGS.items():
                    found[name][busy].append(images_per_second(setting))
            finally:
                for process in load:
                    process.kill()
    print(f"{'':24} {'idle':>8} {f'next to {arguments.busy}':>10}   images/s")
    for name, speeds in found.items():
        idle, busy = (statistics.median(speeds[kind]) for kind in (False, True))
        print(f"{name:24} {idle:8.1f} {busy:10.1f}")


if __name__ == "__main__":
    main()
