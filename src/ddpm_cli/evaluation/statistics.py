"""Sets of images as an extractor sees them, and their `.npz` files: ours, and those of other projects.

The field's files have `mu` and `sigma`: pytorch-fid writes these two, and the reference batches of guided-diffusion add
`mu_s`, `sigma_s` (which we do not use) and images. Ours add `features`, and `ddpm`: a JSON object of their origin.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from ddpm_cli.config.strict import Count, Strict, at_least
from ddpm_cli.errors import DataError, ModelError
from ddpm_cli.evaluation.extractors import Extractor
from ddpm_cli.evaluation.features import Features
from ddpm_cli.evaluation.moments import Statistics
from ddpm_cli.files import json_bytes, parse_json, require_regular, write_file

__all__ = ["FeatureSet", "Origin", "feature_set", "has_statistics", "read_statistics", "write_statistics"]

_ARRAYS = ("mu", "sigma", "features", "ddpm")
_HINT = "A file of statistics has mu (D,) and sigma (D, D), as ddpm, pytorch-fid and guided-diffusion write them."


@dataclass(frozen=True)
class Origin(Strict):
    """Which images, and what looked at them.

    source: the images, for people. shape: (C, H, W) of each. images: a hash of their pixels, if it is known.
    extractor: its name, sha256: of its weights, resize: what it does to sizes, repeated: whether gray images were
    repeated to three channels. mirrored: how many of the images are mirror images of others.
    """

    source: str
    shape: tuple[int, ...]
    images: str | None
    extractor: str
    sha256: str
    resize: str
    repeated: bool
    mirrored: Annotated[int, at_least(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shape) != 3:
            raise ModelError(f"shape={self.shape}: must be channels, height and width")


@dataclass(frozen=True)
class FeatureSet:
    """A set of images as an extractor sees it: all that the distances need.

    features: (K, D) float32 of at most `features.KEPT` images, or None if only the statistics are known.
    logits: (K, L) float32, or None. origin: None in files of other projects. name: of the images or the file.
    """

    name: str
    statistics: Statistics
    features: Tensor | None
    logits: Tensor | None = None
    origin: Origin | None = None


def feature_set(
    features: Features,
    extractor: Extractor,
    shape: tuple[int, int, int],
    source: str,
    images: str | None = None,
) -> FeatureSet:
    """The set of images whose features were computed. For the other arguments see `Origin`.

    Raises DataError if there are fewer than two images, which have no covariance.
    """
    if features.moments.count < 2:
        raise DataError(f"{source}: one image has no statistics", "Give more: thousands, for numbers that mean much.")
    network = (extractor.name, extractor.sha256, extractor.resize, extractor.repeats(shape))
    origin = Origin(source, shape, images, *network, features.mirrored)
    return FeatureSet(source, features.moments.statistics, features.kept, features.logits, origin)


@dataclass(frozen=True)
class _Record(Strict):
    """The JSON of our files."""

    count: Count
    origin: Origin


def write_statistics(path: Path, found: FeatureSet, with_features: bool = True) -> None:
    """Write an .npz file: mu, sigma, features (which KID, precision and recall need), and their origin.

    It is not compressed: of Inception it takes 34 MB, and 8 kB more for each feature. Raises DataError, and ValueError
    if the origin is not known.
    """
    if found.origin is None or found.statistics.count is None:
        raise ValueError("the origin of these statistics is not known")
    arrays = {"mu": found.statistics.mu.numpy(), "sigma": found.statistics.sigma.numpy()}
    if with_features and found.features is not None:
        arrays["features"] = found.features.numpy()
    record = json_bytes(_Record(found.statistics.count, found.origin).to_dict()).decode()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, ddpm=np.array(record), **arrays)
    write_file(path, buffer.getbuffer())


def has_statistics(path: Path) -> bool:
    """Whether an .npz file has statistics, and not only images. False for files that cannot be read."""
    try:
        require_regular(path)
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} & set(archive.namelist()) != set()
    except (OSError, zipfile.BadZipFile, ValueError):
        return False


def read_statistics(path: Path) -> FeatureSet:
    """Read statistics, of ddpm or of another project. Nothing is unpickled. Raises DataError that names the file."""
    try:
        require_regular(path)
        with path.open("rb") as file, zipfile.ZipFile(file), np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, np.ndarray] = {name: archive[name] for name in _ARRAYS if name in archive.files}
        record = _record(arrays)
        mu, sigma = (_numbers(arrays, name, "f8") for name in ("mu", "sigma"))
        width = mu.numel()
        if mu.shape != (width,) or sigma.shape != (width, width) or not width:
            raise DataError(f"mu is {tuple(mu.shape)} and sigma is {tuple(sigma.shape)}")
        if not torch.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6) or sigma.diagonal().min() < 0:
            raise DataError("sigma is not a covariance")
        features = _numbers(arrays, "features", "f4") if record and "features" in arrays else None
        if features is not None and (features.ndim != 2 or features.shape[1] != width):
            raise DataError(f"features are {tuple(features.shape)}, for {width} in mu")
    except Exception as error:  # zipfile and NumPy may raise any exception on a damaged file
        raise DataError(f"{path}: {_reason(error)}", _HINT) from None
    statistics = Statistics(mu, sigma, record.count if record else None)
    return FeatureSet(str(path), statistics, features, origin=record.origin if record else None)


def _record(arrays: Mapping[str, np.ndarray]) -> _Record | None:
    """What our files say of their origin."""
    if "ddpm" not in arrays:
        return None
    values = parse_json(str(arrays["ddpm"]).encode())
    if not isinstance(values, dict):
        raise DataError("its record is not a JSON object")
    return _Record.from_dict(values)


def _numbers(arrays: Mapping[str, np.ndarray], name: str, dtype: str) -> Tensor:
    if name not in arrays:
        raise DataError(f"has no {name}")
    if arrays[name].dtype.kind != "f":
        raise DataError(f"{name} is {arrays[name].dtype}, not floating point")
    values = torch.from_numpy(np.ascontiguousarray(arrays[name], dtype))
    if not values.isfinite().all():
        raise DataError(f"{name} holds values that are not finite")
    return values


def _reason(error: Exception) -> str:
    match error:
        case DataError() | ModelError():
            return error.message
        case OSError() if error.strerror:
            return f"cannot be read ({error.strerror})"
    return f"not an .npz file of statistics, or damaged ({error or type(error).__name__})"
