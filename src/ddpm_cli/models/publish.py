"""A model on this machine -> a repository on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ddpm_cli.errors import ModelError
from ddpm_cli.models import pipeline
from ddpm_cli.models.card import CARD, PREVIEW, is_generated, model_card
from ddpm_cli.models.facts import facts
from ddpm_cli.models.hub import Located, check_token, status_of
from ddpm_cli.models.pretrained import WEIGHTS, read_model
from ddpm_cli.models.recipe import RECIPE, read_recipe

__all__ = ["Remote", "contents", "look", "send"]

_WEIGHTS = f"unet/{WEIGHTS}.safetensors"


@dataclass(frozen=True)
class Remote:
    """A repository as it is before. files: names; none if it does not exist yet."""

    exists: bool
    private: bool
    files: frozenset[str]


@contextlib.contextmanager
def contents(located: Located, address: str) -> Iterator[dict[str, Path | bytes]]:
    """What is sent, by its name in the repository: a pipeline that diffusers loads, its card, preview and recipe.

    A model in an older layout or format is written anew for that, under today's names. Training state is not sent. A
    card that somebody wrote or changed is sent as it is, and ours with the address on it. address: org/name.
    Raises ModelError if the model does not load: nothing is sent that others could not use.
    """
    unet, schedule = read_model(located.folder, located.files)
    recipe = read_recipe(located.folder)
    with contextlib.ExitStack() as stack:
        # The configurations are written anew: keys of other programs may name folders of the machine they ran on.
        files: dict[str, Path | bytes] = {**pipeline.configurations(unet.config, schedule)}
        files[_WEIGHTS] = located.folder / _WEIGHTS
        if located.files.weights != (_WEIGHTS,):
            written = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-"))) / "weights"
            pipeline.save_weights(written, unet.state_dict())
            files[_WEIGHTS] = written
        for name in (PREVIEW, RECIPE):
            if (located.folder / name).is_file():
                files[name] = located.folder / name
        card = located.folder / CARD
        about, preview = facts(unet.config, schedule), PREVIEW in files
        ours = not card.is_file() or is_generated(card.read_text(encoding="utf-8", errors="replace"))
        files[CARD] = model_card(about, recipe, preview, address).encode() if ours else card
        yield files


def look(address: str) -> Remote:
    """Ask the Hub for a repository. Raises ModelError without a login, or if the Hub does not answer."""
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
    """Make the repository if need be and commit all files at once. Returns the page's URL and the commit.

    The token is huggingface_hub's own; it is neither read nor kept here. Raises ModelError if the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if quiet:
        disable_progress_bars()
    api = HfApi()
    with _explained(address):
        api.create_repo(address, private=private or None, exist_ok=True)  # None: as its owner has chosen
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        commit = api.create_commit(address, operations, commit_message=message)
    return f"{api.endpoint}/{address}", str(commit.oid)


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Errors of the Hub and of the way there as ModelErrors. They name no token."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ModelError(f"{address}: not a name that the Hub takes ({error})") from None
    except ModelError:
        raise
    except Exception as error:  # the Hub's answers, and what the libraries below raise
        status = status_of(error)
        if status in (401, 403):
            hint = "Log in as somebody who may, with a token that may write: hf auth login"
            raise ModelError(f"{address}: the Hub does not let you in there ({status})", hint) from None
        reason = f"the Hub answered {status}" if status else f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"{address}: could not be sent to the Hugging Face Hub ({reason})",
            "What is there is as it was, or complete. Check the network and HF_ENDPOINT, and try again.",
        ) from None
