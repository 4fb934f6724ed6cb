"""Uploads a model to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ddpm_cli.errors import ModelError
from ddpm_cli.models import pipeline
from ddpm_cli.models.card import CARD, PREVIEW, is_generated, model_card
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.models.facts import facts
from ddpm_cli.models.hub import Located, check_token, status_of
from ddpm_cli.models.pretrained import WEIGHTS, read_model
from ddpm_cli.models.recipe import RECIPE, read_recipe
from ddpm_cli.models.results import RESULTS, default_folder, read_results

__all__ = ["contents", "look", "send"]

_WEIGHTS = f"unet/{WEIGHTS}.safetensors"


@dataclass(frozen=True)
class Remote:
    """A repository before the upload. files: their names; empty if it does not exist."""

    exists: bool
    private: bool
    files: frozenset[str]


@contextlib.contextmanager
def contents(located: Located, address: str) -> Iterator[dict[str, Path | bytes]]:
    """The files to send, by their names in the repository: a diffusers pipeline, its card, preview, recipe and results.

    A model in an older layout or format is converted. Training state is not sent. A card that a user wrote or changed
    is sent unchanged; a generated one gets the address. address: org/name.
    Raises ModelError if the model does not load.
    """
    unet, schedule = read_model(located.folder, located.files)
    recipe = read_recipe(located.folder)
    with contextlib.ExitStack() as stack:
        # The configurations are written again: keys of other programs may contain paths of a machine.
        files: dict[str, Path | bytes] = {**pipeline.configurations(unet.config, schedule)}
        files[_WEIGHTS] = located.folder / _WEIGHTS
        if located.files.weights != (_WEIGHTS,):
            written = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-"))) / "weights"
            pipeline.save_weights(written, unet.state_dict())
            files[_WEIGHTS] = written
        for name in (PREVIEW, RECIPE):
            if (located.folder / name).is_file():
                files[name] = located.folder / name
        evaluation = default_folder(located.folder, located.name)
        if results := read_results(evaluation, DDPM(unet, schedule).fingerprint()):
            files[RESULTS] = evaluation / RESULTS
        card = located.folder / CARD
        about, preview = facts(unet.config, schedule), PREVIEW in files
        ours = not card.is_file() or is_generated(card.read_text(encoding="utf-8", errors="replace"))
        files[CARD] = model_card(about, recipe, preview, address, results).encode() if ours else card
        yield files


def look(address: str) -> Remote:
    """Look up a repository on the Hub. Raises ModelError without a login, or if the Hub does not answer."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    check_token()
    if not get_token():
        raise ModelError("push: you are not logged in to the Hugging Face Hub", "hf auth login, or set HF_TOKEN")
    with _explained(address):
        try:
            info = HfApi().model_info(address)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Remote(False, False, frozenset())
        return Remote(True, bool(info.private), frozenset(file.rfilename for file in info.siblings or []))


def send(address: str, files: Mapping[str, Path | bytes], private: bool, message: str, quiet: bool) -> tuple[str, str]:
    """Create the repository if needed, and send all files in one commit. Returns the page's URL and the commit.

    huggingface_hub handles the token. Raises ModelError if the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if quiet:
        disable_progress_bars()
    api = HfApi()
    with _explained(address):
        api.create_repo(address, private=private or None, exist_ok=True)  # None: the owner's default
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit(address, operations, commit_message=message)
    return f"{api.endpoint}/{address}", str(commit.oid)


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into ModelErrors without the token."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ModelError(f"{address}: not a name that the Hub takes ({error})") from None
    except ModelError:
        raise
    except Exception as error:  # of the Hub, and of the libraries that huggingface_hub uses
        status = status_of(error)
        if status in (401, 403):
            hint = "Log in as a user and with a token that can write to it: hf auth login"
            raise ModelError(f"{address}: the Hub denies access ({status})", hint) from None
        reason = f"the Hub answered {status}" if status else f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"{address}: could not be sent to the Hugging Face Hub ({reason})",
            "The repository is unchanged or complete. Check the network and HF_ENDPOINT, and try again.",
        ) from None
