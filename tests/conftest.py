"""Small real data and small real models, made once."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import hub_server  # noqa: F401  before anything that imports huggingface_hub: it says where the Hub is
from ddpm_cli.config import ScheduleConfig, UNetConfig
from ddpm_cli.files import new_directory
from ddpm_cli.models import pipeline
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.presets import PRESETS

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits.zip"
EMOJI = ROOT / "examples" / "emoji.zip"

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# Three levels and attention, as the real ones, at 3,000 parameters.
SMALL = replace(
    PRESETS["tiny"].unet(8, 1), block_out_channels=(4, 8, 8), norm_num_groups=4, layers_per_block=1, sample_size=8
)


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights at which every layer matters; at initialisation the residual branches are nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def write_model(folder: Path, config: UNetConfig, schedule: ScheduleConfig | None = None) -> Path:
    unet = UNet(config)
    randomize(unet)
    with new_directory(folder) as partial:
        pipeline.save_model(partial, unet.state_dict(), config, schedule or ScheduleConfig(num_train_timesteps=20))
    return folder


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test in a folder and with a cache of its own, and none of the user's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("DDPM_MODEL", "DDPM_DEVICE", "DDPM_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder of 60 gray 28x28 digits."""
    folder = tmp_path_factory.mktemp("images") / "digits"
    with zipfile.ZipFile(DIGITS) as archive:
        archive.extractall(folder, archive.namelist()[::83][:60])
    return folder


@pytest.fixture(scope="session")
def emoji(tmp_path_factory) -> Path:
    """A 32x32 RGBA picture with transparent corners."""
    folder = tmp_path_factory.mktemp("images")
    with zipfile.ZipFile(EMOJI) as archive:
        return Path(archive.extract("grinning.png", folder))


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> Path:
    """A colour JPEG that is not square: real pictures side by side."""
    path = tmp_path_factory.mktemp("images") / "a photo.jpg"
    with zipfile.ZipFile(EMOJI) as archive:
        tiles = [Image.open(archive.open(name)).convert("RGBA") for name in sorted(archive.namelist())[:6]]
    sheet = Image.new("RGBA", (96, 64), "teal")
    for i, tile in enumerate(tiles):
        sheet.alpha_composite(tile, (32 * (i % 3), 32 * (i // 3)))
    sheet.convert("RGB").save(path, quality=95)
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A gray 8x8 model of 20 steps."""
    return write_model(tmp_path_factory.mktemp("models") / "small", SMALL)


@pytest.fixture(scope="session")
def color_model(tmp_path_factory) -> Path:
    """An RGB 8x8 model of 1000 steps, with the schedule of `ddpm noise`."""
    config = replace(SMALL, in_channels=3, out_channels=3)
    return write_model(tmp_path_factory.mktemp("models") / "color", config, ScheduleConfig())


@pytest.fixture(scope="session")
def finished_run(digits, tmp_path_factory) -> Path:
    """Not to be changed: a run of four steps, with two checkpoints and two previews."""
    from ddpm_cli.cli.app import main

    folder = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--steps", "4", "--batch-size", "4", "--size", "8", "--save-every", "2", "--no-flip", "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE_DIR", str(folder.parent / "cache"))
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["train", str(digits), "-o", str(folder), *options, "--sample-every", "4"])
    return folder


@pytest.fixture
def ddpm():
    """Run the command line in a process of its own: ddpm("noise", "a.png", stdin=b"…")."""

    def run(*args: object, stdin: bytes | None = None, env: dict[str, str] | None = None):
        return subprocess.run(
            [sys.executable, "-m", "ddpm_cli", *map(str, args)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env=os.environ | (env or {}),
            timeout=120,
        )

    return run


@pytest.fixture
def torchrun():
    """Start the command line in two processes, as users do: torchrun("train", …) -> Popen."""
    started = []

    def run(*args: object, options: tuple[str, ...] = ()) -> subprocess.Popen:
        process = subprocess.Popen(
            [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *options, "-m", "ddpm_cli", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            kill_all(process)
        process.communicate()


def in_a_terminal(*args: object) -> tuple[int, str]:
    """Run ddpm with a terminal for stdin, stdout and stderr; returns its exit code and what the terminal saw."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "ddpm_cli", *map(str, args)]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=os.environ | {"TERM": "xterm"})
    os.close(other)
    seen = b""
    while True:
        try:
            seen += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    os.close(main)
    return process.wait(60), seen.decode()


def heed_signals() -> None:
    """For processes that get signals, in tests that are run under nohup or in the background of a script."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes that torchrun started; each is in a group of its own."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def kill_all(launcher: subprocess.Popen) -> None:
    """SIGKILL for torchrun and what it started, as when a machine goes down."""
    for pid in [launcher.pid, *workers(launcher)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.wait()


@pytest.fixture
def cli(capfd):
    """Run the command line in this process, which is quicker: cli("noise", "a.png") -> (code, stdout, stderr)."""
    from ddpm_cli.cli.app import main

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return caught.value.code, out, err

    return run
