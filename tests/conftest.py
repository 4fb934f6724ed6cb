"""Small real data and small real models, made once."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small networks are not faster with more, and much slower on busy machines

import contextlib
import pty
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hub_server  # noqa: F401  before huggingface_hub is imported, which reads the address of the Hub
import processes
from ddpm_cli.config import ScheduleConfig, UNetConfig
from ddpm_cli.files import new_directory
from ddpm_cli.models import pipeline, runs
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.presets import PRESETS
from processes import DDPM, TORCHRUN, Process

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "examples" / "digits.zip"
EMOJI = ROOT / "examples" / "emoji.zip"

# Three levels and attention like real models, but 3,000 parameters.
SMALL = replace(
    PRESETS["tiny"].unet(8, 1), block_out_channels=(4, 8, 8), norm_num_groups=4, layers_per_block=1, sample_size=8
)


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Set random weights, so that every layer matters: at initialisation residual branches are nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def picture(path: str | Path) -> Image.Image:
    """An image file, read whole."""
    with Image.open(path) as image:
        image.load()
        return image


def step_in(run: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    found = runs.checkpoints(run)
    return runs.step_of(found[-1]) if found else 0


def weights_in(run: Path) -> dict[str, bytes]:
    """Raw weights, averages and moments in the newest checkpoint, and its name."""
    newest = runs.checkpoints(run)[-1]
    return {path.name: path.read_bytes() for path in newest.rglob("*.safetensors")} | {"step": newest.name.encode()}


def write_model(folder: Path, config: UNetConfig, schedule: ScheduleConfig | None = None) -> Path:
    unet = UNet(config)
    randomize(unet)
    with new_directory(folder) as partial:
        pipeline.save_model(partial, unet.state_dict(), config, schedule or ScheduleConfig(num_train_timesteps=20))
    return folder


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Give each test its own folder and cache, and none of the user's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    names = ("DDPM_MODEL", "DDPM_DEVICE", "DDPM_DEBUG", "NO_COLOR", "COLORTERM")
    for name in (*names, "TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
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
def quick_model(tmp_path_factory) -> Path:
    """A gray 8x8 model with one level and 4 steps, to train from in tests of runs."""
    one_level = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    schedule = ScheduleConfig(num_train_timesteps=4)
    return write_model(tmp_path_factory.mktemp("models") / "quick", replace(SMALL, **one_level), schedule)


@pytest.fixture(scope="session")
def color_model(tmp_path_factory) -> Path:
    """An RGB 8x8 model of 1000 steps, with the schedule of `ddpm noise`."""
    config = replace(SMALL, in_channels=3, out_channels=3)
    return write_model(tmp_path_factory.mktemp("models") / "color", config, ScheduleConfig())


def train_once(folder: Path, images: Path, *options: object) -> Path:
    """A run of four steps, with checkpoints at 2 and 4 and a preview at 4."""
    from ddpm_cli.cli.app import main

    args = ("train", images, "-o", folder, "--steps", 4, "--batch-size", 4, "--save-every", 2, "--sample-every", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE_DIR", str(folder.parent / "cache"))
        with pytest.raises(SystemExit, match=r"^0$"):
            main([str(arg) for arg in (*args, "--no-flip", "-q", *options)])
    return folder


@pytest.fixture(scope="session")
def finished_run(digits, tmp_path_factory) -> Path:
    """A finished run of the preset tiny, see `train_once`. Tests must not change it."""
    return train_once(tmp_path_factory.mktemp("runs") / "digits", digits, "--size", 8)


@pytest.fixture(scope="session")
def quick_run(digits, quick_model, tmp_path_factory) -> Path:
    """A finished run from `quick_model`, see `train_once`. Tests must not change it; they may resume copies."""
    return train_once(tmp_path_factory.mktemp("runs") / "quick", digits, "--from", quick_model, "--precision", "fp32")


@pytest.fixture(scope="session")
def _server() -> Iterator[socket.socket]:
    if sys.platform != "linux":
        pytest.skip("forks processes in ways that only Linux allows")
    with processes.server() as server:
        yield server


@pytest.fixture
def start(_server) -> Iterator[Callable[..., Process]]:
    """Start the command line in a process, which is killed if it outlives the test: start("train", …) -> Process.

    source: Python code to run instead. For more options see `Process`.
    """
    started = []

    def run(*args: object, source: str = DDPM, **options: Any) -> Process:
        started.append(Process(_server, source, args, **options))
        return started[-1]

    yield run
    for process in started:
        process.close()


@pytest.fixture
def ddpm(start):
    """Run the command line in a process to its end: ddpm("noise", "a.png", stdin=b"…")."""

    def run(*args: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
        process = start(*args, **options)
        return subprocess.CompletedProcess(args, process.wait(), process.out, process.err.encode())

    return run


@pytest.fixture
def pair(start) -> Callable[..., tuple[Process, Process]]:
    """Start the command line in two ranks, as torchrun does, but faster."""
    stores = []  # for the rendezvous

    def run(*args: object, **options: Any) -> tuple[Process, Process]:
        stores.append(store := torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        world = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        first, second = (start(*args, env=world | {"RANK": rank, "LOCAL_RANK": rank}, **options) for rank in "01")
        return first, second

    return run


@pytest.fixture
def torchrun(start) -> Callable[..., Process]:
    """Start the command line in two processes by torchrun itself; options: torchrun's."""

    def run(*args: object, options: Sequence[str] = ("--standalone", "--nproc-per-node", "2")) -> Process:
        return start(*options, "-m", "ddpm_cli", *args, source=TORCHRUN)

    return run


@pytest.fixture
def in_a_terminal(start) -> Callable[..., tuple[int, str]]:
    """Run ddpm in a terminal. Returns its exit code and the output in the terminal. Keywords: environment variables."""

    def run(*args: object, **env: str) -> tuple[int, str]:
        main, other = pty.openpty()
        process = start(*args, env={"TERM": "xterm"} | env, terminal=other)
        os.close(other)
        seen = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                seen += os.read(main, 65536)
        os.close(main)
        return process.wait(), seen.decode()

    return run


@pytest.fixture
def cli(capfd):
    """Run the command line in this process, which is faster: cli("noise", "a.png") -> (code, stdout, stderr)."""
    from ddpm_cli.cli.app import main

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return caught.value.code, out, err

    return run
