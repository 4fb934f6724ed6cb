"""Addresses on the Hugging Face Hub: the meaning of each notation, and what is refused."""

import pytest

from ddpm_cli.hub_address import parse_name, parse_url

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("org/name", None),
        ("org/name@main", "main"),
        ("org/name@v1.0", "v1.0"),
        (f"org/name@{COMMIT}", COMMIT),
        ("org/name@refs/pr/3", "refs/pr/3"),
        ("org/name@feature/x", "feature/x"),
    ],
)
def test_names(text, revision):
    assert parse_name(text) == ("org/name", revision)


@pytest.mark.parametrize(
    "text",
    [
        *("name", "a/b/c", "org/name@", "@v1", "org/..", "../name", "org/.name", "org/name@..", "org/name@a/../b"),
        *("a b/c", "org/name@v1@v2", "", "/", "org/", "/name", "org\\name", "org/name\n"),
    ],
)
def test_names_that_are_refused(text):
    assert parse_name(text) is None


@pytest.mark.parametrize("host", ["huggingface.co", "www.huggingface.co", "hf.co", "HuggingFace.co", "hub.lan:8080/hf"])
@pytest.mark.parametrize(
    ("page", "revision"),
    [
        ("", None),
        ("/", None),
        ("?library=diffusers", None),
        ("#use", None),
        ("/discussions/3", None),
        ("/tree/main", "main"),
        ("/tree/main/unet", "main"),
        ("/blob/v1/unet/config.json", "v1"),
        ("/resolve/v1/unet/config.json?download=true", "v1"),
        (f"/commit/{COMMIT}", COMMIT),
        ("/tree/refs%2Fpr%2F3", "refs/pr/3"),
        ("/tree/refs/pr/3", "refs/pr/3"),
        ("/blob/refs/pr/3/README.md", "refs/pr/3"),
        ("/tree/refs%2Fconvert%2Fparquet", "refs/convert/parquet"),
        ("/tree/feature%2Fx/unet", "feature/x"),
    ],
)
def test_pages_of_the_hub(monkeypatch, host, page, revision):
    """A page is of a model or of a data set, never both. $HF_ENDPOINT is a Hub too, and may have a path."""
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.lan:8080/hf/")
    model, data = f"https://{host}/org/name{page}", f"https://{host}/datasets/org/name{page}"
    assert parse_url(model) == parse_url(data, dataset=True) == ("org/name", revision)
    assert parse_url(model, dataset=True) is parse_url(data) is None


@pytest.mark.parametrize(
    ("url", "dataset", "revision"),
    [
        ("hf://org/name", False, None),
        ("hf://org/name", True, None),
        ("hf://models/org/name@v1", False, "v1"),
        ("hf://datasets/org/name@v1", True, "v1"),
        ("hf://datasets/org/name@refs/pr/3", True, "refs/pr/3"),
        ("hf://datasets/org/name@refs%2Fpr%2F3", True, "refs/pr/3"),
        ("hf://org/name/", True, None),
    ],
)
def test_hf_addresses(url, dataset, revision):
    assert parse_url(url, dataset) == ("org/name", revision)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/org/name",
        "https://huggingface.co.example.com/org/name",
        "https://example.com/huggingface.co/org/name",
        "https://me@huggingface.co/org/name",
        "ftp://huggingface.co/org/name",
        "file:///org/name",
        "http:///org/name",
        "https://huggingface.co",
        "https://huggingface.co/name",
        "https://huggingface.co/spaces/org/name",
        "https://huggingface.co/docs/hub",
        "https://huggingface.co/api/models/org/name",
        "https://huggingface.co/org/name/tree/..",
        "https://huggingface.co/org/name/tree/a%2F..%2Fb",
        "https://huggingface.co/..%2F..%2Fetc/name",
        "https://[/org/name",
        "hf://name",
        "hf://datasets/org/name",
        "hf://spaces/org/name",
        "hf://org/name/unet",
        "hf://",
    ],
)
@pytest.mark.parametrize("endpoint", ["", "https://hub.lan"])
def test_urls_that_are_not_models(monkeypatch, url, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert parse_url(url) is None


def test_urls_that_are_not_data_sets():
    for url in ("https://example.com/datasets/org/name", "hf://models/org/name", "https://huggingface.co/org/name"):
        assert parse_url(url, dataset=True) is None
