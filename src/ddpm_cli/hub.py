"""One address for a model: a folder here, or a repository on the Hugging Face Hub -> a model directory on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ddpm_cli import checkpoint
from ddpm_cli.errors import ModelError

__all__ = ["resolve"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Everything a model can consist of here, in either layout, and none of the other formats that repositories carry.
_HUB_FILES = [
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "*/config.json",
    "*/scheduler_config.json",
    "*diffusion_pytorch_model.safetensors",
]


def resolve(address: str | None = None, runs: Path = Path("runs"), quiet: bool = True) -> Path:
    """Find the model directory that an address means.

    address: a model directory, a checkpoint, or a run (its newest checkpoint); else `org/name[@revision]` on the Hub.
    None: $DDPM_MODEL, else the newest run under `runs`. quiet: no progress bars for downloads.
    Raises ModelError that says what was looked for.
    """
    address = address or os.environ.get("DDPM_MODEL")
    if not address:
        return _newest_run(runs)
    path = Path(address).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        raise ModelError(f"{address}: is a file, not a model directory", "Give the directory that holds it.")
    if _HUB_NAME.fullmatch(address) and not address.startswith("."):
        return _from_hub(address, quiet)
    raise ModelError(
        f"{address}: no such directory", "Give a model directory, a run, or org/name on the Hugging Face Hub."
    )


def _in_folder(path: Path) -> Path:
    if checkpoint.is_model(path):
        return path
    if found := checkpoint.checkpoints(path):
        return found[-1]
    if checkpoint.is_run(path):
        raise ModelError(
            f"{path}: this run has no checkpoint yet", "It writes one at --save-every, at its end, and on Ctrl-C."
        )
    raise ModelError(
        f"{path}: holds no model", "Expected model_index.json with unet/ and scheduler/, or a run of `ddpm train`."
    )


def _newest_run(runs: Path) -> Path:
    found = [
        (newest[-1].stat().st_mtime, newest[-1]) for run in runs.glob("*") if (newest := checkpoint.checkpoints(run))
    ]
    if not found:
        raise ModelError(
            f"no model given, and no trained run under {runs}/",
            "Name one with -m (a directory, or org/name on the Hugging Face Hub), or train one: ddpm train ./images",
        )
    return max(found)[1]


def _from_hub(address: str, quiet: bool) -> Path:
    # Imported late: it reads its environment at import, and takes a while.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet:
        disable_progress_bars()
    name, _, revision = address.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
        for worse in ("*model.fp16.safetensors", "*model.bin"):  # the first models of the field come as .bin only
            if not checkpoint.is_model(folder):
                patterns = [*_HUB_FILES, worse]
                folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError:
        raise ModelError(
            f"{name}: access to this model must be asked for on the Hub", "Accept its terms there, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: neither a directory here nor a public model on the Hugging Face Hub",
            "Check the spelling; for a private model: hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{name}: has no revision {revision!r} on the Hugging Face Hub") from None
    except HFValidationError as error:
        raise ModelError(f"{address}: no such directory, and not a name on the Hub ({error})") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name}: not a directory here, and the Hugging Face Hub cannot be reached",
            "Check the network, or HF_HUB_OFFLINE.",
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name}: the Hugging Face Hub answered with an error ({error})") from None
    if not checkpoint.is_model(folder):
        raise ModelError(f"{name}: holds no model that ddpm can read", "Expected a diffusers DDPMPipeline.")
    return folder
