"""The part of gpu.py that checks whether ddpm computes on a device what it computes on a CPU.

Every check measures a number and compares it with the largest one that is allowed, for a reason that it names.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_cli import DDPM
from ddpm_cli import device as machine
from ddpm_cli.config import ScheduleConfig, UNetConfig
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.models.runs import checkpoints
from ddpm_cli.nn.unet import UNet
from ddpm_cli.run_folder import METRICS

__all__ = [
    "EMOJI",
    "Check",
    "Failed",
    "NotRun",
    "Outcome",
    "attempt",
    "check_network",
    "check_processes",
    "check_resume",
    "check_samples",
    "check_waits",
    "last_words",
]

EMOJI = Path(__file__).parent.parent / "examples" / "emoji.zip"
_MODEL = "bundled:digits"
_GUARD = 300  # seconds that a process may take

# What is allowed. The numbers of CPUs are of an AMD EPYC (Zen 4).
_ROUNDING = 1e-4
_ROUNDING_WHY = "on a CPU float32 is 1e-6 from float64 here, and TF32 would be 8e-4: not allowed"
_BF16 = 5e-2
_BF16_WHY = "bf16 has 8 bits, so each factor is wrong by up to 0.4 %; on a CPU it is 1e-2 in all"
_LEVEL = 1.0
_LEVEL_WHY = "of 255 levels; on a CPU, weights that are wrong by 1e-5 change pixels by 1, by rounding"
_BF16_LEVELS = 5.0
_BF16_LEVELS_WHY = "of 255 levels, root of the mean square; on a CPU 1.5, at the edges of strokes"
_LOSSES = 1e-3
_LOSSES_WHY = "two processes add the gradient in another order, and each step of Adam widens the gap"
_EXACT_WHY = "the same operations in the same order"

# `ddpm`, in which every operation must be deterministic.
_DETERMINISTIC = """
import torch
from ddpm_cli.cli.app import main

torch.use_deterministic_algorithms(True)
main()
"""


class Check(NamedTuple):
    """A check that was run. It passes if what was measured is at most what is allowed."""

    name: str
    measured: float
    allowed: float
    why: str  # that much is allowed

    @property
    def passed(self) -> bool:
        return self.measured <= self.allowed  # False for NaN


class NotRun(NamedTuple):
    """A check, or a measurement, that was not run."""

    name: str
    why: str


class Failed(NamedTuple):
    """A check that ended with an error."""

    name: str
    error: str


Outcome = Check | NotRun | Failed


def attempt(name: str, check: Callable[[], Iterator[Outcome]]) -> Iterator[Outcome]:
    """The outcomes of a check, the last of which may be an error: the others can still tell something."""
    try:
        yield from check()
    except Exception as error:
        traceback.print_exc()
        yield Failed(name, last_words(error))


def last_words(error: Exception) -> str:
    """The end of a message, in one line."""
    return " ".join(str(error).split())[-300:] or type(error).__name__


def _relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


class _Values(NamedTuple):
    """What a network computes: its prediction, and the gradient of L_simple. Flat, float64, on the CPU."""

    prediction: Tensor
    gradient: Tensor


def check_network(config: UNetConfig, images: int, device: torch.device) -> Iterator[Outcome]:
    """A forward and a backward pass: in float32 on the device against the CPU, and in bf16 against float32.

    The weights are PyTorch's initial ones: with those of a new run the network predicts 0, whatever else it computes.
    config: must have no dropout, which draws other numbers on each device.
    """
    torch.manual_seed(0)
    unet = UNet(config)
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    shape = (images, config.in_channels, config.sample_size, config.sample_size)
    x_0, eps, t = torch.rand(shape) * 2 - 1, torch.randn(shape), torch.randint(schedule.T, (images,))

    def values(device: torch.device, dtype: torch.dtype) -> _Values:
        here = machine.place(copy.deepcopy(unet), device)
        noise = eps.to(device)
        with machine.autocast(device, dtype):
            prediction = here(schedule.q_sample(x_0.to(device), t.to(device), noise), t.to(device))
            loss = F.mse_loss(prediction, noise)
        gradient = torch.autograd.grad(loss, list(here.parameters()))
        return _Values(_flat([prediction.detach()]), _flat(gradient))

    float32 = machine.pick_dtype("fp32", device)  # turns TF32 off
    on_cpu, exact, rounded = (
        values(where, dtype)
        for where, dtype in ((torch.device("cpu"), float32), (device, float32), (device, torch.bfloat16))
    )
    cast = machine.place(copy.deepcopy(unet), device, torch.bfloat16)
    with torch.no_grad():
        sampled = _flat([cast(schedule.q_sample(x_0, t, eps).to(device), t.to(device))])

    for what, found, expected in (
        ("prediction", exact.prediction, on_cpu.prediction),
        ("gradient", exact.gradient, on_cpu.gradient),
    ):
        yield Check(f"float32, {device.type} against cpu: {what}", _relative(found, expected), _ROUNDING, _ROUNDING_WHY)
    for what, found, expected in (
        ("prediction in training", rounded.prediction, exact.prediction),
        ("gradient", rounded.gradient, exact.gradient),
        ("prediction in sampling", sampled, exact.prediction),
    ):
        yield Check(f"bf16 against float32: {what}", _relative(found, expected), _BF16, _BF16_WHY)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])


def check_samples(images: int, steps: int, device: torch.device) -> Iterator[Outcome]:
    """Samples of the bundled model: the device against the CPU, a seed twice, other batch sizes, bf16.

    They are drawn by the default sampler, which adds noise in every step.
    """
    few = 6  # images that are drawn in other batch sizes
    exact, rounded = (DDPM.from_pretrained(_MODEL, str(device), precision) for precision in ("fp32", "bf16"))
    expected = DDPM.from_pretrained(_MODEL, "cpu", "fp32").sample(images, steps=steps).float()

    def draw(model: DDPM, batch_size: int = images, count: int = images) -> Tensor:
        return model.sample(count, steps=steps, batch_size=batch_size).float()

    first, first_rounded = draw(exact), draw(rounded)
    name = f"float32, {device.type} against cpu: largest difference in samples"
    yield Check(name, _largest(first, expected), _LEVEL, _LEVEL_WHY)
    yield Check("bf16 against float32: samples", _levels(first_rounded, first), _BF16_LEVELS, _BF16_LEVELS_WHY)
    for dtype, model, before in (("float32", exact, first), ("bf16", rounded, first_rounded)):
        name = f"{dtype}: a seed twice, largest difference in samples"
        yield Check(name, _largest(draw(model), before), 0, _EXACT_WHY)
    on_cpu = device.type == "cpu"
    for size in (1, 4):
        allowed, why = (0.0, "on a CPU an image does not depend on its batch") if on_cpu else (_LEVEL, _LEVEL_WHY)
        name = f"float32: batches of {size} and of {images}, largest difference in samples"
        yield Check(name, _largest(draw(exact, size, few), first[:few]), allowed, why)
        name = f"bf16: batches of {size} and of {images}"
        difference = _levels(draw(rounded, size, few), first_rounded[:few])
        yield Check(name, difference, _BF16_LEVELS, "as for bf16 against float32: other kernels round otherwise")


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _levels(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt())


def check_waits(works: Mapping[str, Callable[[], object]], device: torch.device) -> Iterator[Outcome]:
    """How often the CPU waits for the GPU in work that should only queue operations. Each work must be warm."""
    for name, work in works.items():
        if device.type != "cuda":
            work()
            yield NotRun(f"waits for the GPU in {name}", "needs CUDA")
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # The mode itself warns too, that it is a prototype.
        waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        for place in sorted({f"{warning.filename}:{warning.lineno}" for warning in waits}):
            print(f"waits for the GPU: {place}", file=sys.stderr)
        yield Check(f"waits for the GPU in {name}", len(waits), 0, "a GPU that is waited for has nothing to do next")


def check_resume(options: tuple[str, ...], steps: int, device: torch.device, folder: Path) -> Iterator[Outcome]:
    """A run against one that stops in its middle and goes on in a new process: all tensors of the checkpoint.

    options: of `ddpm train`, for the network and the images.
    """
    train = [sys.executable, "-c", _DETERMINISTIC, "train", str(EMOJI), *options, "--device", str(device), "-q"]
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # else cuBLAS is not deterministic; read when CUDA starts
    for run, until in (("whole", steps), ("resumed", steps // 2), ("resumed", steps)):
        _run([*train, "-o", str(folder / run), "--steps", str(until), "--resume"], folder, env)
    whole, resumed = (_state(folder / run) for run in ("whole", "resumed"))
    different = sum(whole[name] != resumed.get(name) for name in whole)
    name = f"resumed after {steps // 2} of {steps} steps, deterministic: files of weights and moments that differ"
    yield Check(name, different, 0, _EXACT_WHY)


def _state(run: Path) -> dict[str, bytes]:
    """The files with the weights, their averages and Adam's moments in the newest checkpoint, by name."""
    return {path.name: path.read_bytes() for path in sorted(checkpoints(run)[-1].rglob("*.safetensors"))}


def check_processes(steps: int, device: torch.device, folder: Path) -> Iterator[Outcome]:
    """Two processes against one, on two GPUs, or on the CPU: the losses in the log. The preset has no dropout."""
    name = f"two processes against one: largest difference in the losses of {steps} steps"
    if device.type == "mps" or (device.type == "cuda" and torch.cuda.device_count() < 2):
        yield NotRun(name, "one card")
        return
    train = ["-m", "ddpm_cli", "train", str(EMOJI), "--preset", "tiny", "--size", "16", "--precision", "fp32", "-q"]
    train += ["--device", device.type, "--steps", str(steps), "--lr", "0.02"]  # the weights must move in few steps
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for run, started in (("one", []), ("two", launcher)):
        _run([sys.executable, *started, *train, "-o", str(folder / run)], folder)
    one, two = (_losses(folder / run) for run in ("one", "two"))
    assert len(one) == len(two) > 0  # a mean over some steps each
    yield Check(name, max(abs(a - b) / a for a, b in zip(one, two, strict=True)), _LOSSES, _LOSSES_WHY)


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / METRICS).read_text().splitlines()]


def _run(command: list[str], cache: Path, env: dict[str, str] | None = None) -> None:
    """Run a process to its end. Raises RuntimeError with its last words if it fails."""
    environment = os.environ | {"DDPM_CACHE_DIR": str(cache / "cache")} | (env or {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_GUARD)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"{' '.join(command[-6:])}: {done.stderr.strip()[-200:]}")
