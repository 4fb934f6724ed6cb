"""Addresses as people write them: a path, or on the Hugging Face Hub org/name[@revision], a URL, hf://..."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["NAME", "HubAddress", "parse_name", "parse_url", "path_of"]

# org/name: letters, digits and _; also . and -, but not first or last. So no part is `..` or begins with a dot.
_PART = r"\w(?:[\w.-]*\w)?"
NAME = rf"{_PART}/{_PART}"
_REVISION = rf"{_PART}(?:/{_PART})*"
_NAMED = re.compile(rf"(?P<name>{NAME})(?:@(?P<revision>{_REVISION}))?")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_NOT_MODELS = ("datasets", "spaces", "docs", "papers", "collections", "api")  # pages that are not models, by path
_WITH_REVISION = ("tree", "blob", "resolve", "commit")  # pages of a repository; a revision follows


class HubAddress(NamedTuple):
    """name: org/name. revision: a branch, a tag or a commit; None is the default branch."""

    name: str
    revision: str | None


def path_of(address: str) -> Path:
    """An address as a path, with ~ and ~user replaced by the home folder of that user, if there is one."""
    try:
        return Path(address).expanduser()
    except RuntimeError:
        return Path(address)


def parse_name(text: str) -> HubAddress | None:
    """org/name[@revision]; None for anything else."""
    match = _NAMED.fullmatch(text)
    return HubAddress(match["name"], match["revision"]) if match else None


def parse_url(url: str, dataset: bool = False) -> HubAddress | None:
    """The model or the data set at a URL; None if the URL is not such a page of the Hub.

    https://huggingface.co/org/name[/tree|blob|resolve|commit/REVISION[/...]], with datasets/ before org for a data set;
    hf.co and $HF_ENDPOINT mean huggingface.co too. hf://org/name[@REVISION], or hf://datasets/org/name[@REVISION].
    A slash in REVISION is written %2F, as the Hub does; in refs/pr/N and refs/convert/NAME it may also be a slash.
    """
    try:
        scheme, host, path, *_ = urlsplit(url)
    except ValueError:  # brackets that are not closed
        return None
    if scheme == "hf":
        words = f"{host}{path}".strip("/").split("/")
        kind = words[0] if words[0] in ("datasets", "models") else None
        if kind not in (None, "datasets" if dataset else "models"):
            return None
        return parse_name(unquote("/".join(words[1:] if kind else words)))
    kind, *words = _below_the_hub(f"{host}{path}") if scheme in ("http", "https") else [""]
    if dataset != (kind == "datasets") or (not dataset and kind in _NOT_MODELS):
        return None
    words = words if dataset else [kind, *words]
    revision = ""
    if len(words) > 3 and words[2] in _WITH_REVISION:
        revision = "@" + "/".join(words[3:6] if words[3] == "refs" else words[3:4])
    return parse_name(unquote("/".join(words[:2]) + revision))


def _below_the_hub(place: str) -> list[str]:
    """The parts of a URL's path on the Hub; [""] for another host. place: the host and path of the URL."""
    endpoint = os.environ.get("HF_ENDPOINT", "").partition("://")[2].rstrip("/")
    for hub in (*_HOSTS, *([endpoint] if endpoint else [])):
        if place.lower().startswith(f"{hub.lower()}/"):
            return place[len(hub) :].strip("/").split("/")
    return [""]
