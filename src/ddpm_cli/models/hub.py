"""Finds a model's files from its address: a folder, a file, a run, a bundled model, or a repository on the Hub."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ddpm_cli.errors import ModelError
from ddpm_cli.hub_address import parse_name, parse_url, path_of
from ddpm_cli.models import bundled
from ddpm_cli.models.card import CARD
from ddpm_cli.models.nearby import did_you_mean
from ddpm_cli.models.pretrained import ModelFiles, read_configs
from ddpm_cli.models.recipe import RECIPE
from ddpm_cli.models.runs import checkpoints, newest_run
from ddpm_cli.models.verify import verify
from ddpm_cli.run_folder import CHECKPOINTS, is_run

__all__ = ["Located", "check_token", "resolve", "status_of"]

_WEIGHTS_SUFFIXES = (".safetensors", ".bin")
_OTHER_FORMATS = (".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Located:
    """A model that was found. files: relative to folder. origin: its name in messages. address: to find it again.

    fallback: whether it is a bundled model because nobody named one, and there is no run.
    """

    folder: Path
    files: ModelFiles
    origin: str
    address: str
    weight_bytes: int  # size of the weights, also if they were not downloaded
    fallback: bool = False

    @property
    def weights(self) -> list[Path]:
        return [self.folder / name for name in self.files.weights]

    @property
    def name(self) -> str:
        """A short name, for files about it: that of its folder, or of its repository without the organisation."""
        address = self.address if Path(self.address).is_absolute() else self.address.partition("@")[0]
        return Path(address.removeprefix(bundled.PREFIX)).name


def resolve(address: str | None = None, runs: Path = Path("runs"), quiet: bool = True, weights: bool = True) -> Located:
    """Find the model at an address.

    address: a model directory in any layout, a checkpoint, a run (its newest checkpoint), or a file of weights next to
    its configuration; `bundled:NAME`; else `org/name[@revision]` on the Hub, or the URL of its page there. None:
    $DDPM_MODEL, else the newest run under `runs`, else `bundled.DEFAULT`. quiet: no progress bars for downloads.
    weights: whether to download them too.
    Raises ModelError.
    """
    if address is not None and not address.strip():
        raise ModelError("the model's address is empty", "Is a variable not set? The default is the newest run.")
    address = address or os.environ.get("DDPM_MODEL")
    if not address:
        run = newest_run(runs, lambda run: next(reversed(checkpoints(run)), None))
        return _on_disk(run) if run else replace(_bundled(bundled.DEFAULT), fallback=True)
    if address.startswith(bundled.PREFIX):
        return _bundled(address)
    if "://" in address:
        if found := parse_url(address):
            return _from_hub(*found, quiet, weights)
        raise ModelError(
            f"{address}: not a model's page on the Hugging Face Hub", "Write https://huggingface.co/org/name."
        )
    path = path_of(address)
    if path.exists():
        return _on_disk(path)
    try:
        if found := parse_name(address):
            return _from_hub(*found, quiet, weights)
    except ModelError as error:  # runs/cats looks like a name on the Hub
        raise ModelError(error.message, did_you_mean(address, runs, error.hint)) from error
    raise ModelError(
        f"{address}: no such file or directory, and not a name on the Hub",
        did_you_mean(address, runs)
        or "Give a run, a model directory, org/name on the Hugging Face Hub, or bundled:digits.",
    )


def _on_disk(path: Path) -> Located:
    if path.is_file():
        return _beside(path)
    if found := checkpoints(path) or (path.name == CHECKPOINTS and checkpoints(path.parent)):
        path = found[-1]
    elif is_run(path):
        raise ModelError(
            f"{path}: this run has no checkpoint yet", "It writes one at --save-every, at its end, and on Ctrl-C."
        )
    try:
        return _located(path, ModelFiles.in_folder(path).require_weights())
    except ModelError as error:
        hint = error.hint or "Expected model_index.json with unet/ and scheduler/, or a run of `ddpm train`."
        if runs := [found.parent for found in path.glob(f"*/{CHECKPOINTS}")]:
            hint = f"Did you mean {runs[0]}?"
        raise ModelError(f"{path}: {error.message}", hint) from None


def _beside(path: Path) -> Located:
    """A file of weights, with its configuration in the same folder."""
    if path.suffix not in _WEIGHTS_SUFFIXES:
        hint = "Give the directory that holds it."
        if path.suffix in _OTHER_FORMATS:
            hint = f"Weights of pytorch_diffusion or improved-diffusion: ddpm convert {path} -o DIR"
        raise ModelError(f"{path}: is not a model directory, nor weights in {' or '.join(_WEIGHTS_SUFFIXES)}", hint)
    folder = path.parent
    if re.search(r"-\d+-of-\d+\.", path.name):  # one shard means all of them
        return _on_disk(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: there is no config.json next to it, so its network is not known")
    return _located(folder, ModelFiles.in_folder(folder, path.name), str(path), str(path.resolve()))


def _located(folder: Path, files: ModelFiles, origin: str | None = None, address: str | None = None) -> Located:
    size = sum((folder / name).stat().st_size for name in files.weights)
    return Located(folder, files, origin or str(folder), address or str(folder.resolve()), size)


def _bundled(address: str) -> Located:
    folder = bundled.find_bundled(address)
    return _located(folder, ModelFiles.in_folder(folder).require_weights(), address, address)


def _from_hub(name: str, revision: str | None, quiet: bool, weights: bool) -> Located:
    """Download the missing files of a model, its configuration first. Without a network, use the cache.

    The cache is that of huggingface_hub, with its rules and environment variables.
    """
    # Imported late: the import is slow, and reads the environment.
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    check_token()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # errors are explained below, once
    quiet = quiet or are_progress_bars_disabled()
    at = f"{name}@{revision}" if revision else name
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):  # it becomes the name of a folder
            raise ModelError(f"{name}: the Hub answers with {info.sha!r}, which is not a commit")
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        files = ModelFiles.among(sizes).require_weights()
        about = [RECIPE] if weights else [CARD, RECIPE]  # without weights, the caller wants information
        disable_progress_bars()  # for files of a few hundred bytes
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*files.small, *about]))
        verify(folder, files.small)
        read_configs(folder, files)  # before large weights are downloaded in vain
        if not quiet:
            enable_progress_bars()
        for file in files.weights if weights else ():
            hf_hub_download(name, file, revision=folder.name)
            verify(folder, [file])
    except GatedRepoError:
        raise ModelError(
            f"{name}: access to this model must be requested on the Hub",
            "Accept its terms there, then run: hf auth login",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: neither a directory here nor a public model on the Hugging Face Hub",
            "Check the spelling; for a private model: hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{name}: has no revision {revision!r} on the Hugging Face Hub") from None
    except HFValidationError as error:
        raise ModelError(f"{at}: no such directory, and not a name on the Hub ({error})") from None
    except ModelError as error:
        raise ModelError(error.message if name in error.message else f"{name}: {error.message}", error.hint) from None
    except Exception as error:  # of huggingface_hub, and of the libraries that it uses
        status = status_of(error)
        if (status is None or status == 429 or status >= 500) and (cached := _in_cache(name, revision, weights)):
            return cached
        reason = f"the Hub answered {status}" if status else f"{type(error).__name__}: {error}".splitlines()[0]
        hint = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again: files that are complete are kept."
        if status in (401, 403):
            hint = "The Hub refuses your login: hf auth login, or correct HF_TOKEN."
        raise ModelError(
            f"{name}: not a directory here, and could not be fetched from the Hugging Face Hub ({reason})", hint
        ) from error
    size = sum(sizes[file] for file in files.weights)
    return Located(folder, files, f"{name}@{folder.name[:7]}", f"{name}@{folder.name}", size)


def check_token() -> None:
    """Raises ModelError if the token has invalid characters: the HTTP library would print it in its error."""
    from huggingface_hub import get_token

    try:
        token = get_token() or "none"
    except UnicodeError:
        token = ""
    if not re.fullmatch("[!-~]+", token):
        raise ModelError(
            "the token for the Hugging Face Hub is damaged: it has invalid characters",
            "hf auth login, or correct HF_TOKEN.",
        )


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of the Hub's answer, if an error or its cause is such an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    while error:
        if isinstance(error, HfHubHTTPError):
            return int(error.response.status_code)
        error = error.__cause__
    return None


def _in_cache(name: str, revision: str | None, weights: bool) -> Located | None:
    """A model that was downloaded before, or None if it is not complete."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("unet/config.json", "config.json"):
        path = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            folder = Path(path).parents[file.count("/")]
            with contextlib.suppress(ModelError):  # incomplete or damaged: the error of the network is reported instead
                files = ModelFiles.in_folder(folder)
                if files.weights or not weights:
                    verify(folder, [*files.small, *files.weights])
                    origin = f"{name}@{folder.name[:7]} (from the cache; the Hub cannot be reached)"
                    return _located(folder, files, origin, f"{name}@{folder.name}")
    return None
