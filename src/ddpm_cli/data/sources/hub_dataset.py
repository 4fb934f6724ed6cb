"""Images in a data set on the Hugging Face Hub, through the library `datasets` (an extra)."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import IO, Any

from ddpm_cli.data.sources.source import Source, check_size, open_file
from ddpm_cli.data.work import OnProgress
from ddpm_cli.errors import DataError
from ddpm_cli.hub_address import HubAddress, parse_url
from ddpm_cli.text import printable

__all__ = ["HubDataset", "parse_address"]


class HubDataset(Source):
    """The first column of images in a data set on the Hub, from the split `train` if there is one, else from the first.

    The library `datasets` downloads it and keeps it in its own cache, as memory-mapped files.
    """

    def __init__(self, address: str, progress: OnProgress) -> None:
        super().__init__(address, address)
        name, revision = parse_address(address)
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise DataError(
                f"{address}: data sets on the Hub need the library datasets", "pip install 'ddpm-cli[datasets]'"
            ) from None
        progress(f"fetching {name}", 0, None)
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        try:
            splits = datasets.load_dataset(name, revision=revision)
        except Exception as error:  # from the library, the network or the file format
            reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
            raise DataError(f"{address}: cannot be loaded ({reason})", "Does it exist, and may you read it?") from None
        split = "train" if "train" in splits else next(iter(splits))
        rows = splits[split]
        column = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise DataError(f"{address}: has no column of images (only {', '.join(rows.features)})")
        self.key = f"{address} {split} {column} {rows._fingerprint}"
        self._rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self.names = [f"{split}/{i}" for i in range(len(rows))]
        self.require_names()

    def open(self, name: str) -> IO[bytes]:
        image = self._rows[int(name.rpartition("/")[2])][self._column]
        if image is None:
            raise DataError("there is no image in this row")
        if image["bytes"] is None:
            return open_file(Path(image["path"]))  # the table may contain any path
        check_size(len(image["bytes"]))
        return io.BytesIO(image["bytes"])


def parse_address(address: str) -> HubAddress:
    """The name and the revision in hf://org/name[@revision], or in the URL of a data set's page. Raises DataError."""
    if found := parse_url(address, dataset=True):
        return found
    raise DataError(
        f"{address}: not a data set on the Hugging Face Hub",
        "Write hf://org/name, or hf://org/name@revision, or https://huggingface.co/datasets/org/name.",
    )
