"""Networks that turn images into features: Inception, or a file that somebody else made."""

from __future__ import annotations

import contextlib
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.data.cache import cache_folder, extractors_folder
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import ModelError, reason
from ddpm_cli.evaluation.fetch import Published, fetch, sha256_of
from ddpm_cli.evaluation.inception import SIDE, Inception
from ddpm_cli.files import require_regular
from ddpm_cli.models.pretrained import read_weights
from ddpm_cli.text import printable

__all__ = ["INCEPTION", "Extracted", "Extractor", "open_extractor"]

INCEPTION = Published(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
_INSTEAD = "Download it elsewhere, and give the file with --features. --metrics bpd needs no such file."
_CONTRACT = (
    "An extractor is a TorchScript file: uint8 (B, C, H, W) to features (B, D) in floating point, or to features and "
    "logits."
)
_COUNTED = ".num_batches_tracked"  # of a batch norm, which is not used


class Extracted(NamedTuple):
    """features: (B, D) float32. logits: (B, K) float32 of classes, or None if the network has none."""

    features: Tensor
    logits: Tensor | None


class Extractor:
    """A network that turns images into features.

    name: for people. sha256: of the file of its weights. resize: what it does to the size of images, for people.
    channels: of the images that it takes; None: not known.
    """

    def __init__(
        self,
        network: Callable[[Tensor], object],
        path: Path,
        sha256: str,
        device: torch.device,
        name: str,
        resize: str = "not resized",
        channels: int | None = None,
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.resize = resize
        self.device = device
        self.channels = channels
        self._network = network
        self._path = path
        self._repeated: dict[tuple[int, int, int], bool] = {}

    def __call__(self, images: Tensor) -> Extracted:
        """images: (B, C, H, W) uint8. The result is on the CPU. Raises ModelError if it takes no such images.

        Products are in float32, never TF32.
        """
        if self.repeats((images.shape[1], images.shape[2], images.shape[3])):
            images = images.expand(-1, 3, -1, -1)
        return self._run(images)

    def repeats(self, shape: tuple[int, int, int]) -> bool:
        """Whether gray images of this shape (C, H, W) are repeated to three channels, since it takes no others.

        If its channels are not known, it is tried on two black images, once for each shape.
        """
        if shape[0] != 1 or self.channels is not None:
            return shape[0] == 1 and self.channels == 3
        if shape not in self._repeated:
            black = torch.zeros(2, *shape, dtype=torch.uint8)
            self._repeated[shape] = not self._takes(black) and self._takes(black.expand(-1, 3, -1, -1))
        return self._repeated[shape]

    def _takes(self, images: Tensor) -> bool:
        with contextlib.suppress(ModelError):
            self._results(images)
            return True
        return False

    def _run(self, images: Tensor) -> Extracted:
        # A network that was traced for several images may not take one.
        batch = images if len(images) > 1 else images.expand(2, -1, -1, -1)
        features, *logits = [
            self._checked(result, len(batch))[: len(images)].float().cpu() for result in self._results(batch)
        ]
        for name, values in (("features", features), ("logits", logits[0] if logits else features)):
            if not values.isfinite().all():
                raise ModelError(f"{self._path}: gives {name} that are not finite", "Its weights may be damaged.")
        return Extracted(features, logits[0] if logits else None)

    @torch.inference_mode()
    def _results(self, images: Tensor) -> tuple[object, ...]:
        """What the network gives: features, or features and logits. Raises ModelError if it cannot take the images."""
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
            try:
                found = self._network(images.to(self.device))
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # code in the file can raise anything
                _, channels, height, width = images.shape
                raise ModelError(
                    f"{self._path}: cannot take images of {width}x{height} pixels with {channels} channels "
                    f"({_last_line(error)})",
                    _CONTRACT,
                ) from None
        return found if isinstance(found, tuple) and len(found) == 2 else (found,)

    def _checked(self, result: object, count: int) -> Tensor:
        """A result of the network. Raises ModelError unless it is a row of numbers for each of so many images."""
        if isinstance(result, Tensor) and result.is_floating_point() and result.ndim == 2 and len(result) == count:
            return result
        raise ModelError(f"{self._path}: gives {_described(result)} for {count} images", _CONTRACT)


def open_extractor(file: str | Path | None, device: torch.device, progress: OnProgress = silent) -> Extractor:
    """Open an extractor of features on a device.

    file: weights of Inception under the names of the published file (.pth, .pt, .safetensors), or a TorchScript
    program. None: the published weights of Inception, which are downloaded once into the cache, 96 MB.
    No pickled code is run. A TorchScript file is a program too, though one of tensors: trust who made it.
    Raises ModelError.
    """
    path = fetch(INCEPTION, extractors_folder(cache_folder()), _INSTEAD, progress) if file is None else Path(file)
    try:
        require_regular(path)
        sha256 = sha256_of(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or reason(error)})") from None
    if file is None and sha256 != INCEPTION.sha256:
        raise ModelError(f"{path}: is damaged: its SHA-256 is {sha256[:12]}…", "Remove it, and it is downloaded again.")
    names = _members(path)
    if any("/code/" in f"/{name}" for name in names):
        return Extractor(_script(path, device), path, sha256, device, path.name)
    if path.suffix == ".pt2" or any(name.endswith("archive_format") for name in names):
        raise ModelError(
            f"{path}: reading a file of torch.export runs code in it (pickles and expressions); refused",
            f"Write it with torch.jit.save. {_CONTRACT}",
        )
    network = _inception(path).to(device)
    resize = f"resized to {SIDE}x{SIDE}, bilinear as in TensorFlow 1"
    return Extractor(network, path, sha256, device, "Inception", resize, 3)


def _members(path: Path) -> list[str]:
    """The files in an archive; none if it is something else."""
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(path) as archive:
        return archive.namelist()
    return []


def _script(path: Path, device: torch.device) -> Callable[[Tensor], object]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its successor runs pickles
            module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        arguments = [argument.name for argument in module.forward.schema.arguments]
    except Exception as error:  # a damaged file can raise anything
        raise ModelError(f"{path}: cannot be read as TorchScript ({_last_line(error)})") from None
    if "return_features" in arguments:  # NVIDIA's inception-2015-12-05.pt, which gives probabilities otherwise
        return lambda images: module(images, return_features=True)
    return lambda images: module(images)


def _inception(path: Path) -> Inception:
    """Raises ModelError unless the file has the weights of this network and no others."""
    with torch.device("meta"):
        network = Inception()
    found = {name: value for name, value in read_weights(path).items() if not name.endswith(_COUNTED)}
    expected = network.state_dict()
    wrong = [name for name in expected if not name.endswith(_COUNTED) and _wrong(found.get(name), expected[name])]
    if wrong or found.keys() - expected.keys():
        name = (wrong or sorted(found.keys() - expected.keys()))[0]
        raise ModelError(
            f"{path}: has not the weights of the Inception network of FID, for example {printable(name)}",
            f"Those are in {INCEPTION.name}. Other networks are given as TorchScript. {_CONTRACT}",
        )
    counted = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith(_COUNTED)}
    network.load_state_dict({name: value.float() for name, value in found.items()} | counted, assign=True)
    return network.eval().requires_grad_(False)


def _wrong(value: Tensor | None, expected: Tensor) -> bool:
    return value is None or value.shape != expected.shape or not value.isfinite().all()


def _described(result: object) -> str:
    if isinstance(result, Tensor):
        return f"{str(result.dtype).removeprefix('torch.')} {tuple(result.shape)}"
    return f"a {type(result).__name__}"


def _last_line(error: Exception) -> str:
    """Errors of TorchScript have a traceback before the reason."""
    return printable(next(reversed([line for line in str(error).splitlines() if line.strip()]), type(error).__name__))
