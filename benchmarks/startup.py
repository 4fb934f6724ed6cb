"""How long `ddpm COMMAND --help` takes, compared with the smallest Typer app.

    python benchmarks/startup.py [--rounds 7]

Starts the small app and every command in turn, `--rounds` times, and prints the least CPU time of each and its ratio
to the small app. Other processes disturb CPU time less than wall-clock time.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ddpm_cli.cli.app import COMMANDS

SMALL_APP = """
import typer

def hello(name: str = "world") -> None:
    "Greet somebody."

typer.run(hello)
"""


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a command, user and system."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with TemporaryDirectory() as folder:
        script = Path(folder) / "small_app.py"
        script.write_text(SMALL_APP)
        commands = {"small Typer app": [sys.executable, str(script), "--help"]}
        commands["ddpm"] = [sys.executable, "-m", "ddpm_cli", "--help"]
        commands |= {f"ddpm {name}": [sys.executable, "-m", "ddpm_cli", name, "--help"] for name in COMMANDS}
        least = dict.fromkeys(commands, float("inf"))
        for _ in range(rounds):
            for name, command in commands.items():
                least[name] = min(least[name], cpu_seconds(command))
    base = least["small Typer app"]
    for name, seconds in least.items():
        print(f"{name:20} {seconds:.3f} s  {seconds / base:.2f}")


if __name__ == "__main__":
    main()
