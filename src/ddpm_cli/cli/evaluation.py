"""The work of `ddpm eval`, in every process of torchrun. Rank 0 prints it and writes the results."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from ddpm_cli.data.pack import Pack
from ddpm_cli.data.sources import Listed, name_of, read_streams
from ddpm_cli.data.split import open_part
from ddpm_cli.diffusion.samplers import Sampling
from ddpm_cli.distributed import World
from ddpm_cli.errors import DataError, DDPMError, LockedError, UsageError
from ddpm_cli.evaluation import bound as bounds
from ddpm_cli.evaluation.collection import Collection, open_images, open_samples
from ddpm_cli.evaluation.comparison import possible, remarks, require_comparable, require_enough
from ddpm_cli.evaluation.evaluate import Images, bound_of, bound_result, compared, features_in_parts, stand_in
from ddpm_cli.evaluation.extractors import Extractor, open_extractor
from ddpm_cli.evaluation.reference import open_reference
from ddpm_cli.evaluation.statistics import FeatureSet, has_statistics, read_statistics, write_statistics
from ddpm_cli.files import LOCK, lock, read_config, write_file
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.models.hub import Located
from ddpm_cli.models.results import default_folder, in_words, require_results_of, write_results
from ddpm_cli.models.sample_folder import Drawn, made_with, require_made_with
from ddpm_cli.run_folder import CHECKPOINTS, CONFIG, is_run
from ddpm_cli.training.checkpoint import trained_on

__all__ = ["Evaluation", "Request"]

_COUNT = 50_000  # samples, as the field has it
_ON_CPU = 16  # the most images whose terms are computed together on a CPU
_SAMPLES = "samples"  # their folder in that of the evaluation
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

    def wants(self, metric: str) -> bool:
        return self.metrics is None or metric in self.metrics

    def of_features(self) -> tuple[str, ...]:
        """The metrics that are computed from features."""
        return tuple(metric for metric in _OF_FEATURES if self.wants(metric))

    def compares(self) -> bool:
        """Whether a metric compares samples with real images: all of features do but the Inception score."""
        return self.of_features() not in ((), ("is",))

    def needs_images(self) -> bool:
        """Whether a metric is about real images, or their statistics."""
        return self.compares() or self.wants("bpd")

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
        """held: contexts that stay open until the end, such as locks. force: replace samples and results."""
        check_background(request.background)
        if request.data and not request.needs_images():
            console.warn("--data is not used: the Inception score is about the samples alone")
            request = replace(request, data=())
        self.request = request
        self.console = console
        self.world = world
        self._held = held
        self._force = force
        self._results: list[dict[str, Any]] = []
        self._source = ""  # of a run's images, in words

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
        if request.of_features():  # first, since it may have to be downloaded
            extractor = self._extractor(self.world.pick_device(device))
        exact = open_model(self.console, located, device, "fp32", weights, self.world)
        if request.wants("bpd") and request.terms and request.terms > exact.schedule.T:
            self.console.warn(f"--terms {request.terms}: this model has {exact.schedule.T}, and all are computed")
        fingerprint = self.world.on_main(exact.fingerprint)
        sets = self._real(located, exact.shape) if request.needs_images() and not statistics else []
        real = (sets[0] if sets else statistics) if request.compares() else None
        n = request.n or _COUNT
        folder = output or default_folder(located.folder, located.name, weights)
        drawing, reference = None, None
        if extractor:  # what is wrong with it is found before anything is made
            reference = self._expected(extractor, exact.shape, n, real)
            drawing = self._plan(located, device, precision, weights, sampling, folder)
        self._open_folder(folder, fingerprint)
        if extractor:
            reference = self._reference(extractor, real, reference, folder)
        about = {"version": __version__, "weights": weights}
        if request.wants("bpd") and sets:
            self._bound(exact, sets, folder)
            self._write(folder, fingerprint, about)
        if extractor and drawing:
            drawn, how = self._draw(*drawing, n, weights, folder)
            self._compare(extractor, drawn, n, reference, how, folder)
        self._finish(folder, fingerprint, about)

    def of_images(self, samples: str, device: str, output: Path | None) -> None:
        """Evaluate images. samples: a folder, or whatever else `open_samples` takes."""
        request = self.request
        statistics = self.world.on_main(request.statistics)
        with self.console.progress("looking for images") as progress:
            paths = self._read_once([samples])
            found = self.world.first_on_main(lambda: open_samples(paths, cache_folder(), request.background, progress))
        extractor = self._extractor(self.world.pick_device(device))
        drawn = self._named(name_of([samples]), found)
        shape = drawn.pixels.shape
        real = (statistics or self._open([*request.data], shape)) if request.compares() else None
        n = min(request.n or len(drawn.pixels), len(drawn.pixels))
        if request.n and request.n > n:
            self.console.warn(f"--n {request.n}: there are {n} samples")
        expected = self._expected(extractor, shape, n, real, drawn.name)
        fingerprint = self.world.on_main(lambda: drawn.pixels.fingerprint)
        folder = output or Path("eval") / drawn.name
        self._open_folder(folder, fingerprint)
        reference = self._reference(extractor, real, expected, folder)
        self._compare(extractor, drawn, n, reference, f"{n} images of {drawn.name}", folder)
        self._finish(folder, fingerprint, {"version": __version__, "samples": drawn.name})

    def _open_folder(self, folder: Path, fingerprint: str) -> None:
        """Make the folder of the evaluation, and lock it. Raises DataError if it has results of something else."""

        def make() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._held.enter_context(lock(folder / LOCK, wait=False))
            except LockedError:
                raise LockedError(
                    f"{folder}: another evaluation is writing to it", "Wait for it, or name another folder with -o."
                ) from None
            except OSError as error:
                place = error.filename or folder
                raise DataError(f"{place}: {error.strerror}", "Name another folder with -o.") from None
            if not self._force:
                require_results_of(folder, fingerprint)

        self.world.on_main(make)

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
                UsageError(
                    "--data is missing: the real images",
                    "Give the images that the model was trained on. --metrics is needs none.",
                )
            )
        data = self.world.on_main(lambda: read_config(RunConfig, run / CONFIG)).data

        def part(held_out: bool) -> Pack:
            with self.console.progress("looking for images") as progress:
                return self.world.first_on_main(lambda: open_part(data, cache_folder(), held_out, progress))[0]

        train = part(held_out=False)
        if self.world.on_main(lambda: trained_on(located.folder)) not in (train.fingerprint, None):
            self.console.warn("the images of the run have changed since this checkpoint was trained")
        self._source = name_of([data.images] if isinstance(data.images, str) else data.images)
        return [Images("train", train), *([Images("held-out", part(held_out=True))] if train.held_out else [])]

    def _open(self, paths: Sequence[str], shape: tuple[int, int, int]) -> Images:
        """The images of --data in the shape of the samples, with a note on what had to change for that."""
        request, cache = self.request, cache_folder()
        array = any(path.lower().endswith(".npz") for path in paths)
        with self.console.progress("looking for images") as progress:
            once = self._read_once(paths)
            if array:
                found = self.world.first_on_main(lambda: open_samples(once, cache, progress=progress))
            else:
                found = self.world.first_on_main(
                    lambda: open_images(once, shape, cache, request.fit, request.background, progress)
                )
        if found.pixels.shape != shape:  # the images of an array are taken as they are
            here, wanted = (f"{w}x{h} {'gray' if c == 1 else 'RGB'}" for c, h, w in (found.pixels.shape, shape))
            raise self.world.reported_once(DataError(f"--data {paths[0]}: its images are {here}, not {wanted}"))
        return self._named(name_of(paths), found)

    def _read_once(self, paths: Sequence[str]) -> list[str | Listed]:
        """The paths, with the lists that come through pipes: only one process can read those."""
        return self.world.on_main(lambda: read_streams(paths))

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
        T, n, size = model.schedule.T, request.n or _COUNT, self.world.size
        # What a stop loses is one batch of all terms. On a CPU that takes long, and a small batch is as fast.
        batch_size = min(request.batch_size, _ON_CPU) if model.device.type == "cpu" else request.batch_size
        found: dict[str, bounds.Bound] = {}
        for images in sets:
            with self.console.bar(f"bits/dim ({images.name}), images x terms", None) as update:
                bound = bound_of(
                    *(model, images, folder, n, request.terms, request.seed, batch_size, self.world),
                    # The other processes have as much to do.
                    progress=lambda done, total: update(done * size, total=total * size),
                )
            if bound:
                found[images.name] = bound
                self._results.append(bound_result(bound, images.name, T))
        if found:
            table = bounds.to_csv(found)
            write_file(folder / "bound.csv", table, sync=False)
            picture = plots.draw(bounds.charts(table), f"the bound by t, of {' and '.join(found)} images")
            write_file(folder / "bound.png", pictures.picture_bytes(picture), sync=False)

    def _plan(
        self, located: Located, device: str, precision: str, weights: str, sampling: Mapping[str, Any], folder: Path
    ) -> tuple[DDPM, Sampling]:
        """The model that draws the samples, and how. Raises DDPMError if there are samples that were made otherwise."""
        quiet = Console("eval", as_json=False, quiet=True)
        model = open_model(quiet, located, device, precision, weights, self.world)
        plan = self.world.on_main(lambda: pick_sampling(model, **sampling))
        if not self._force:
            record = made_with(model, plan, self.request.seed)
            self.world.on_main(lambda: require_made_with(folder / _SAMPLES, record))
        return model, plan

    def _draw(self, model: DDPM, plan: Sampling, n: int, weights: str, folder: Path) -> tuple[Images, str]:
        """Draw the samples that are missing. Returns all of them, and how they were made."""
        request = self.request
        note_sampling(self.console, model, plan)
        place = folder / _SAMPLES
        draw_into(
            *(self.console, self.world, self._held, model, plan, place, n),
            seed=request.seed,
            batch_size=request.batch_size,
            force=self._force,
        )
        dtype = str(model.unet.conv_in.weight.dtype).removeprefix("torch.")
        how = f"{n} samples ({plan.describe()}, seed {request.seed}, {dtype}, {weights} weights)"
        return Images("samples", Drawn(place, n, model.shape)), how

    def _expected(
        self,
        extractor: Extractor,
        shape: tuple[int, int, int],
        n: int,
        real: Images | Path | None,
        name: str = "samples",
    ) -> FeatureSet | None:
        """The statistics of real images in a file, or what images will be compared as. None without, and above rank 0.

        Raises DDPMError if n samples of this shape and name cannot be compared with them, or they cannot be saved.
        """
        wanted, save = self.request.of_features(), self.request.save

        def check() -> FeatureSet | None:
            samples = stand_in(extractor, shape, n, name)
            require_enough(name, n)
            reference = None
            if isinstance(real, Images):
                pixels = real.pixels
                reference = stand_in(extractor, pixels.shape, len(pixels), real.name, pixels.fingerprint)
            elif real:
                reference = read_statistics(real)
            if reference:
                require_comparable(samples, reference)
            if not possible(wanted, samples, reference):
                what = f" and {reference.name}" if reference else ", which has no classes"
                raise DataError(
                    f"--metrics {','.join(wanted)}: not possible with {extractor.name}{what}",
                    "IS needs an extractor with classes. KID, precision and recall need the real images' features.",
                )
            if save and reference:
                self._is_saved(save, reference)
            return reference

        return self.world.on_all(lambda: check() if self.world.is_main else None)

    def _reference(
        self, extractor: Extractor, real: Images | Path | None, expected: FeatureSet | None, folder: Path
    ) -> FeatureSet | None:
        """What samples are compared with, on rank 0. It is saved, if that was asked for. expected: see `_expected`."""
        if not isinstance(real, Images):
            return expected
        request = self.request
        with self.console.progress("extracting features of the real images") as progress:
            reference = open_reference(
                *(real.pixels, real.name, extractor, cache_folder(), folder, request.batch_size, self.world, progress)
            )

        def save() -> None:
            if request.save and reference and not self._is_saved(request.save, reference):
                write_statistics(request.save, reference)

        self.world.on_main(save)
        return reference

    def _is_saved(self, path: Path, reference: FeatureSet) -> bool:
        """Whether --save-statistics has this reference already. Raises DDPMError if the file has something else."""
        if self._force or not path.exists():
            return False
        with contextlib.suppress(DataError):
            origin = read_statistics(path).origin
            if origin and reference.origin and origin == replace(reference.origin, mirrored=origin.mirrored):
                return True  # how many are mirrored follows from the others, and is not known yet in `_expected`
        raise DDPMError(f"--save-statistics {path}: exists already", "Name another file, or use --force.")

    def _compare(
        self, extractor: Extractor, drawn: Images, n: int, reference: FeatureSet | None, how: str, folder: Path
    ) -> None:
        """Measure samples, and compare them with the real images. how: the samples, in words."""
        request, console = self.request, self.console
        with console.progress("extracting features of the samples") as progress:
            samples = features_in_parts(
                *(extractor, drawn, n, folder, request.batch_size, self.world, progress), again=self._force
            )

        def compare() -> None:
            assert samples is not None
            for remark in remarks(samples, reference, request.of_features()):
                console.warn(remark)
            if samples.logits is None and request.wants("is"):
                console.warn(f"{extractor.name} has no classes, so there is no Inception score")
            against = self._in_words(reference) if reference else ""
            with console.progress("comparing") as progress:
                self._results += compared(request.of_features(), samples, reference, how, against, progress)

        self.world.on_main(lambda: compare() if self.world.is_main else None)

    def _in_words(self, reference: FeatureSet) -> str:
        """How many real images there are, and where they are from."""
        count, name = reference.statistics.count, reference.name
        if count is None:
            return f"the statistics in {name}"
        return f"{count} images of {f'{self._source} ({name})' if self._source else name}"

    def _write(self, folder: Path, fingerprint: str, about: Mapping[str, Any]) -> None:
        if self.world.is_main:
            write_results(folder, fingerprint, self._results, **about)

    def _finish(self, folder: Path, fingerprint: str, about: Mapping[str, Any]) -> None:
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
        self.console.note(f"  kept in {folder}")
        text = "\n".join(columns([(name, value) for name, value, _ in rows])) if rows else ""
        self.console.result(text, output=str(folder), results=self._results)
