"""The work of `ddpm eval`, in every process of torchrun. Rank 0 prints it and writes the results."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_cli import __version__
from ddpm_cli.cli.console import Console, columns
from ddpm_cli.cli.drawing import draw_into
from ddpm_cli.cli.model import find_model, note_sampling, open_model, pick_sampling
from ddpm_cli.config import RunConfig
from ddpm_cli.data import pictures, plots
from ddpm_cli.data.cache import cache_folder
from ddpm_cli.data.images import check_background
from ddpm_cli.data.sources import name_of
from ddpm_cli.data.split import open_part
from ddpm_cli.distributed import World
from ddpm_cli.errors import DataError, LockedError, UsageError
from ddpm_cli.evaluation import bound as bounds
from ddpm_cli.evaluation.collection import Collection, open_images, open_samples
from ddpm_cli.evaluation.comparison import remarks, require_comparable
from ddpm_cli.evaluation.evaluate import Images, bound_of, bound_result, compared, features_in_parts
from ddpm_cli.evaluation.extractors import Extractor, open_extractor
from ddpm_cli.evaluation.reference import open_reference
from ddpm_cli.evaluation.statistics import FeatureSet, has_statistics, read_statistics, write_statistics
from ddpm_cli.files import LOCK, lock, read_config, write_file
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.models.hub import Located
from ddpm_cli.models.results import default_folder, in_words, write_results
from ddpm_cli.models.sample_folder import Drawn
from ddpm_cli.run_folder import CHECKPOINTS, CONFIG, is_run

__all__ = ["Evaluation", "Request"]

_COUNT = 50_000  # samples, as the field has it
_OF_FEATURES = ("fid", "kid", "is", "pr")


@dataclass(frozen=True)
class Request:
    """The options of `ddpm eval`, checked one by one. metrics: None for all that are possible."""

    data: tuple[str, ...]
    metrics: tuple[str, ...] | None
    n: int | None
    samples: str | None
    features: str | None
    terms: int | None
    save: Path | None
    fit: str
    background: str
    batch_size: int
    seed: int

    def wants(self, *metrics: str) -> bool:
        return self.metrics is None or bool(set(metrics) & set(self.metrics))

    def statistics(self) -> Path | None:
        """The file of statistics that `data` is, if it is one."""
        files = [Path(path) for path in self.data if path.lower().endswith(".npz") and has_statistics(Path(path))]
        if files and len(self.data) > 1:
            raise UsageError(f"--data {files[0]}: statistics cannot be combined with other images", "Give them alone.")
        if files and self.metrics is not None and "bpd" in self.metrics:
            raise UsageError(f"--data {files[0]}: has statistics, and bpd needs images", "Give the images themselves.")
        if files and self.save:
            raise UsageError(f"--save-statistics: --data {files[0]} has them already")
        return files[0] if files else None


class Evaluation:
    """One evaluation: its images, its folder, and the results that it has."""

    def __init__(self, request: Request, console: Console, world: World, held: ExitStack, force: bool) -> None:
        """held: contexts that stay open until the end, such as locks. force: draw all samples again."""
        check_background(request.background)
        self.request = request
        self.console = console
        self.world = world
        self._held = held
        self._force = force
        self._results: list[dict[str, Any]] = []

    def of_model(
        self,
        address: str | None,
        device: str,
        precision: str,
        weights: str,
        sampling: Mapping[str, Any],
        output: Path | None,
    ) -> None:
        """Evaluate a model. address: see `hub.resolve`. sampling: the arguments of `DDPM.sampling`."""
        request = self.request
        statistics = self.world.on_main(request.statistics)
        located = find_model(self.console, address, self.world)
        extractor = None
        if request.wants(*_OF_FEATURES):  # first, since it may have to be downloaded
            extractor = self._extractor(self.world.pick_device(device))
        exact = open_model(self.console, located, device, "fp32", weights, self.world)
        fingerprint = self.world.on_main(exact.fingerprint)
        sets = [] if statistics else self._real(located, exact.shape)
        folder = self._opened(output or default_folder(located.folder, located.name))
        about = {"version": __version__, "weights": weights}
        if request.wants("bpd") and sets:
            self._bound(exact, sets, folder)
            self._write(folder, fingerprint, about)
        if extractor:
            drawn, how = self._draw(located, device, precision, weights, sampling, folder)
            self._compare(extractor, drawn, request.n or _COUNT, sets[0] if sets else statistics, how, folder)
        self._finish(folder, fingerprint, about)

    def of_images(self, samples: str, device: str, output: Path | None) -> None:
        """Evaluate images. samples: a folder, or whatever else `open_samples` takes."""
        request = self.request
        statistics = self.world.on_main(request.statistics)
        folder = self._opened(output or Path("eval") / name_of([samples]))
        with self.console.progress("looking for images") as progress:
            found = self.world.first_on_main(
                lambda: open_samples([samples], cache_folder(), request.background, progress)
            )
        drawn = self._named(name_of([samples]), found)
        real = statistics or self._open([*request.data], drawn.pixels.shape)
        n = min(request.n or len(drawn.pixels), len(drawn.pixels))
        if request.n and request.n > n:
            self.console.warn(f"--n {request.n}: there are {n} samples")
        extractor = self._extractor(self.world.pick_device(device))
        self._compare(extractor, drawn, n, real, f"{n} images of {drawn.name}", folder)
        self._finish(folder, None, {"version": __version__, "samples": drawn.name})

    def _opened(self, folder: Path) -> Path:
        """Make the folder of the evaluation, and lock it."""

        def make() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(lock(folder / LOCK, wait=False))
            except LockedError:
                raise LockedError(
                    f"-o {folder}: another evaluation is writing to it", "Wait for it, or name another folder with -o."
                ) from None
            except OSError as error:
                raise DataError(f"-o {error.filename or folder}: {error.strerror}") from None

        self.world.on_main(make)
        return folder

    def _extractor(self, device: torch.device) -> Extractor:
        with self.console.progress("loading the extractor") as progress:
            return self.world.first_on_main(lambda: open_extractor(self.request.features, device, progress))

    def _real(self, located: Located, shape: tuple[int, int, int]) -> list[Images]:
        """The real images: those of --data, or the training and the held-out images of the model's run."""
        if self.request.data:
            return [self._open([*self.request.data], shape)]
        run = located.folder.parent.parent
        if located.folder.parent.name != CHECKPOINTS or not is_run(run):
            raise self.world.reported_once(
                UsageError("--data is missing: the real images", "Give the images that the model was trained on.")
            )
        data = read_config(RunConfig, run / CONFIG).data
        sets = []
        for name, held_out in (("train", False), ("held-out", True))[: 2 if data.holdout else 1]:
            with self.console.progress("looking for images") as progress:
                pack, _ = self.world.first_on_main(
                    lambda: open_part(data, cache_folder(), held_out, progress)  # noqa: B023  called at once
                )
            sets.append(Images(name, pack))
        return sets

    def _open(self, paths: Sequence[str], shape: tuple[int, int, int]) -> Images:
        """The images of --data in the shape of the samples, with a note on what had to change for that."""
        request, cache = self.request, cache_folder()
        array = any(path.lower().endswith(".npz") for path in paths)
        with self.console.progress("looking for images") as progress:
            if array:
                found = self.world.first_on_main(lambda: open_samples(paths, cache, progress=progress))
            else:
                found = self.world.first_on_main(
                    lambda: open_images(paths, shape, cache, request.fit, request.background, progress)
                )
        if found.pixels.shape != shape:  # the images of an array are taken as they are
            here, wanted = (f"{w}x{h} {'gray' if c == 1 else 'RGB'}" for c, h, w in (found.pixels.shape, shape))
            raise self.world.reported_once(DataError(f"--data {paths[0]}: its images are {here}, not {wanted}"))
        return self._named(name_of(paths), found)

    def _named(self, name: str, found: Collection) -> Images:
        """Images for people to know by this name, with notes on what they are not."""
        for change in found.changes:
            self.console.warn(f"{name}: {change}")
        if found.left_out:
            file, reason = found.left_out[0]
            self.console.warn(f"{name}: {len(found.left_out)} files cannot be used, for example {file}: {reason}")
        return Images(name, found.pixels)

    def _bound(self, model: DDPM, sets: Sequence[Images], folder: Path) -> None:
        """Measure bits per dimension, and write its terms as a table and as a picture."""
        request = self.request
        T = model.schedule.T
        n, terms = request.n or _COUNT, min(request.terms or T, T)
        found: dict[str, bounds.Bound] = {}
        for images in sets:
            total = min(n, len(images.pixels)) * terms
            with self.console.bar(f"bits/dim ({images.name}), images x terms", total) as update:
                bound = bound_of(
                    *(model, images, folder, n, request.terms, request.seed, request.batch_size, self.world),
                    progress=lambda done: update(min(total, done * self.world.size)),  # noqa: B023  called at once
                )
            if bound:
                found[images.name] = bound
                self._results.append(bound_result(bound, images.name, T))
        if found:
            write_file(folder / "bound.csv", _csv(found), sync=False)
            picture = plots.draw(bounds.charts(found), f"the bound by t, of {' and '.join(found)} images")
            write_file(folder / "bound.png", pictures.picture_bytes(picture), sync=False)

    def _draw(
        self, located: Located, device: str, precision: str, weights: str, sampling: Mapping[str, Any], folder: Path
    ) -> tuple[Images, str]:
        """Draw the samples that are missing. Returns all of them, and how they were made."""
        request, n = self.request, self.request.n or _COUNT
        quiet = Console("eval", as_json=False, quiet=True)
        model = open_model(quiet, located, device, precision, weights, self.world)
        plan = self.world.on_main(lambda: pick_sampling(model, **sampling))
        note_sampling(self.console, model, plan)
        place = folder / "samples"
        draw_into(
            *(self.console, self.world, self._held, model, plan, place, n),
            seed=request.seed,
            batch_size=request.batch_size,
            force=self._force,
        )
        dtype = str(model.unet.conv_in.weight.dtype).removeprefix("torch.")
        how = f"{n} samples ({plan.describe()}, seed {request.seed}, {dtype}, {weights} weights)"
        return Images("samples", Drawn(place, n, model.shape)), how

    def _compare(
        self, extractor: Extractor, drawn: Images, n: int, real: Images | Path | None, how: str, folder: Path
    ) -> None:
        """Compare samples with real images, or with their statistics."""
        request, console = self.request, self.console
        with console.progress("extracting features of the samples") as progress:
            samples = features_in_parts(extractor, drawn, n, folder, request.batch_size, self.world, progress)
        reference: FeatureSet | None = None
        if isinstance(real, Images):
            with console.progress("extracting features of the real images") as progress:
                reference = open_reference(
                    *(real.pixels, real.name, extractor, cache_folder(), request.batch_size, self.world, progress)
                )
        elif real is not None:
            reference = self.world.on_main(lambda: read_statistics(real))

        def compare() -> None:
            assert samples is not None
            assert reference is not None
            if request.save:
                write_statistics(request.save, reference)
            require_comparable(samples, reference)
            for remark in remarks(samples, reference):
                console.warn(remark)
            if samples.logits is None and request.wants("is"):
                console.warn(f"{extractor.name} has no classes, so there is no Inception score")
            count = reference.statistics.count
            against = f"{count} images of {reference.name}" if count else f"the statistics in {reference.name}"
            described = f"{how} against {against}; {extractor.name} {extractor.sha256[:8]}, {extractor.resize}"
            wanted = _OF_FEATURES if request.metrics is None else request.metrics
            with console.progress("comparing") as progress:
                self._results += compared(wanted, samples, reference, described, progress)

        self.world.on_main(lambda: compare() if self.world.is_main else None)

    def _write(self, folder: Path, fingerprint: str | None, about: Mapping[str, Any]) -> None:
        if self.world.is_main:
            write_results(folder, fingerprint, self._results, **about)

    def _finish(self, folder: Path, fingerprint: str | None, about: Mapping[str, Any]) -> None:
        """Write and print the results."""
        self._write(folder, fingerprint, about)
        if not self.world.is_main:
            return
        rows = in_words(self._results)
        alike: dict[str, list[str]] = {}
        for name, _, how in rows:
            alike.setdefault(how, []).append(name)
        for how, names in alike.items():
            self.console.note(f"  {', '.join(names)}: {how}")
        text = "\n".join(columns([(name, value) for name, value, _ in rows])) if rows else ""
        self.console.result(text, output=str(folder), results=self._results)


def _csv(found: Mapping[str, bounds.Bound]) -> bytes:
    """The terms of several sets of images: set, t (the paper's), bits, rate, rmse, images."""
    file = io.StringIO()
    rows = [{"set": name, **row} for name, bound in found.items() for row in bound.rows()]
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()
