"""Names on the Hugging Face Hub, as people write them: org/name[@revision], a URL of the Hub, hf://…"""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["NAME", "HubAddress", "parse_name", "parse_url"]

# org/name: letters, digits and _, and in between . and -; so never .. or a leading dot.
_PART = r"\w(?:[\w.-]*\w)?"
NAME = rf"{_PART}/{_PART}"
_REVISION = rf"{_PART}(?:/{_PART})*"
_NAMED = re.compile(rf"(?P<name>{NAME})(?:@(?P<revision>{_REVISION}))?")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PAGES = ("tree", "blob", "resolve", "commit")  # of a repository, followed by a revision


class HubAddress(NamedTuple):
    """name: org/name. revision: a branch, a tag or a commit; None is the default branch."""

    name: str
    revision: str | None


def parse_name(text: str) -> HubAddress | None:
    """org/name[@revision]; None for anything else."""
    match = _NAMED.fullmatch(text)
    return HubAddress(match["name"], match["revision"]) if match else None


def parse_url(url: str, dataset: bool = False) -> HubAddress | None:
    """The model, or the data set, that a URL means; None if it is no such page of the Hub.

    https://huggingface.co/org/name[/tree|blob|resolve|commit/REVISION[/…]], with datasets/ before org for a data set;
    hf.co and $HF_ENDPOINT stand for huggingface.co. hf://org/name[@revision], or hf://datasets/org/name[@revision].
    """
    parts = urlsplit(url)
    words = [unquote(word) for word in f"{parts.netloc}/{parts.path.strip('/')}".strip("/").split("/")]
    if parts.scheme == "hf":
        kind = words[0] if words[0] in ("datasets", "models") else None
        if kind not in (None, "datasets" if dataset else "models"):
            return None
        return parse_name("/".join(words[1:] if kind else words))
    hosts = {*_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc}
    if parts.scheme not in ("http", "https") or words[0] not in hosts:
        return None
    words = words[1:]
    if dataset != (words[:1] == ["datasets"]):
        return None
    words = words[1:] if dataset else words
    revision = f"@{words[3]}" if len(words) > 3 and words[2] in _PAGES else ""
    return parse_name("/".join(words[:2]) + revision)
