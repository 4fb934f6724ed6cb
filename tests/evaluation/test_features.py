"""Features of sets of images: computed in parts, saved, cached, and compared."""

import hashlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_cli.data import pictures
from ddpm_cli.data.images import decode, from_pil
from ddpm_cli.data.npz import Npz
from ddpm_cli.errors import DataError
from ddpm_cli.evaluation import features
from ddpm_cli.evaluation.comparison import described, remarks, require_comparable
from ddpm_cli.evaluation.distances import frechet, inception_score, kid, precision_recall
from ddpm_cli.evaluation.evaluate import Images, features_in_parts
from ddpm_cli.evaluation.extractors import Extractor, open_extractor
from ddpm_cli.evaluation.features import features_of
from ddpm_cli.evaluation.moments import Statistics, moments
from ddpm_cli.evaluation.reference import open_reference
from ddpm_cli.evaluation.statistics import FeatureSet, feature_set, has_statistics, read_statistics, write_statistics

CPU = torch.device("cpu")
DIGITS = Path(__file__).parents[2] / "examples" / "digits-features.pt"


class InMemory:
    """Images in memory: (N, C, H, W) uint8."""

    def __init__(self, images):
        self.images, self.shape = images, tuple(images.shape[1:])
        self.fingerprint = hashlib.sha256(images.numpy().tobytes()).hexdigest()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        return self.images[indices]


def random(count, shape=(3, 2, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return InMemory(torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8))


class Counted:
    """The mean and the largest value of each channel as features, the first pixel as logits; counts the images.

    most: of the images that it takes, after which it is interrupted.
    """

    def __init__(self, most=None):
        self.images = 0
        self.most = most

    def __call__(self, images):
        if self.most is not None and self.images + len(images) > self.most:
            raise KeyboardInterrupt
        self.images += len(images)
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.amax(2)], 1), x[:, :, 0]


def extractor(sha256="a" * 64, most=None):
    return Extractor(Counted(most), Path("counted.pt"), sha256, CPU, "counted", channels=3)


def computed(images, place="parts", batch_size=7, most=None, **options):
    place = Path(place, f"{images.fingerprint}-{len(images)}")
    return features_of(extractor(most=most), images, len(images), place, batch_size, **options)


def a_set(count=40, seed=0):
    images = random(count, seed=seed)
    return feature_set(computed(images), extractor(), images.shape, "some images", images.fingerprint)


def test_parts_make_the_whole():
    images = random(3000)
    expected = Counted()(images.images)
    for size in (7, 1100):
        whole = computed(images, f"parts-{size}", size)
        torch.testing.assert_close(whole.moments.statistics.sigma, torch.cov(expected[0].double().T))
        assert whole.moments.count == 3000
        assert whole.kept.equal(expected[0])
        assert whole.logits.equal(expected[1])


def test_features_go_on_after_an_interruption(monkeypatch):
    """Those that exist are not computed again, and the result does not depend on how the parts were cut."""
    monkeypatch.setattr(features, "KEPT", 10)
    images = random(37)
    whole = computed(images, "whole")
    with pytest.raises(KeyboardInterrupt):
        computed(images, batch_size=5, most=20)
    again = computed(images, batch_size=6, most=17)
    assert again.kept.equal(whole.kept)
    assert again.logits.equal(whole.logits)
    torch.testing.assert_close(again.moments.scatter, whole.moments.scatter, rtol=1e-12, atol=1e-6)
    computed(images, most=0)
    with pytest.raises(KeyboardInterrupt):
        computed(images, most=0, again=True)


def test_a_limited_number_of_features_is_kept(monkeypatch):
    monkeypatch.setattr(features, "KEPT", 10)
    images = random(37)
    found = features_in_parts(extractor(), Images("images", images), 37, Path("eval"), batch_size=5)
    assert len(found.features) == len(found.logits) == 10
    assert found.statistics.count == 37
    all_of_them, logits = Counted()(images.images)
    torch.testing.assert_close(found.statistics.mu, all_of_them.double().mean(0))
    places = [(all_of_them == row).all(1).nonzero().item() for row in found.features]
    assert places == sorted(places)
    assert max(b - a for a, b in itertools.pairwise(places)) <= 4  # evenly spread
    assert found.logits.equal(logits[places])


def test_progress():
    seen = []
    computed(random(16), progress=lambda *now: seen.append(now))
    assert seen == [("extracting features", done, 16) for done in (7, 14, 16)]


def test_one_image_has_no_statistics():
    with pytest.raises(DataError, match="some images: one image"):
        a_set(1)


def test_statistics_are_written_and_read(tmp_path):
    found = a_set()
    found = replace(found, origin=replace(found.origin, mirrored=3))
    path = tmp_path / "new" / "real.npz"
    write_statistics(path, found)
    again = read_statistics(path)
    assert again.statistics.mu.equal(found.statistics.mu)
    assert again.statistics.sigma.equal(found.statistics.sigma)
    assert again.statistics.count == 40
    assert again.features.equal(found.features)
    assert (again.origin, again.name, again.logits) == (found.origin, str(path), None)
    assert frechet(found.statistics, again.statistics) < 1e-6
    write_statistics(path, found, with_features=False)
    assert read_statistics(path).features is None
    with np.load(path) as field:  # as others read it
        assert np.array_equal(field["mu"], found.statistics.mu.numpy())
    with pytest.raises(ValueError, match="not known"):
        write_statistics(path, replace(found, origin=None))


@pytest.mark.parametrize(
    "extra", [{}, {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu_s": np.zeros(3), "features": np.eye(4)}]
)
def test_statistics_of_other_projects(extra):
    np.savez("field.npz", mu=np.arange(4.0), sigma=np.eye(4, dtype=np.float32), **extra)
    found = read_statistics(Path("field.npz"))
    assert (found.statistics.mu.tolist(), found.statistics.count) == ([0, 1, 2, 3], None)
    assert (found.features, found.origin) == (None, None)
    assert has_statistics(Path("field.npz"))
    if extra:
        assert len(Npz(Path("field.npz"), Path("cache"))) == 2


def test_files_without_statistics():
    np.savez("images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    Path("text.npz").write_text("?")
    for path in ("images.npz", "text.npz", "none.npz", "."):
        assert not has_statistics(Path(path))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"mu": np.zeros(4)}, "has no sigma"),
        ({"arr_0": np.zeros(4)}, "has no mu"),
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, r"mu is \(4,\) and sigma is \(3, 3\)"),
        ({"mu": np.zeros((2, 2)), "sigma": np.eye(4)}, r"mu is \(2, 2\)"),
        ({"mu": np.zeros(0), "sigma": np.eye(0)}, r"mu is \(0,\)"),
        ({"mu": np.zeros(4, int), "sigma": np.eye(4)}, "mu is int64, not floating point"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "mu holds values that are not finite"),
        ({"mu": np.zeros(4), "sigma": np.tri(4)}, "sigma is not a covariance"),
        ({"mu": np.zeros(4), "sigma": -np.eye(4)}, "sigma is not a covariance"),
        ({"mu": np.array([Evil()] * 4), "sigma": np.eye(4)}, "allow_pickle"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "ddpm": np.array("[]")}, "not a JSON object"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "ddpm": np.array("{}")}, "setting 'count' is missing"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "ddpm": np.array('{"count": 0, "origin": 1}')}, "count=0"),
    ],
)
def test_damaged_statistics_are_named(arrays, reason):
    np.savez("bad.npz", **arrays)
    with pytest.raises(DataError, match=rf"^bad\.npz: .*{reason}"):
        read_statistics(Path("bad.npz"))
    assert not Path("evil").exists()


def test_files_that_are_no_statistics():
    Path("text.npz").write_text("?")
    np.save("array.npy", np.zeros(3))
    write_statistics(Path("cut.npz"), a_set())
    Path("cut.npz").write_bytes(Path("cut.npz").read_bytes()[:-300])
    for name in ("text.npz", "array.npy", "cut.npz", "none.npz", "."):
        with pytest.raises(DataError) as caught:
            read_statistics(Path(name))
        assert caught.value.message.startswith(f"{name}: ")


def opened(images, judge=None, name="real", **options):
    return open_reference(images, name, judge or extractor(), Path("cache"), Path("eval"), **options)


def kept_parts():
    return sorted(Path("eval").rglob("*.safetensors"))


def test_a_reference_is_computed_once():
    images = random(40)
    first = extractor()
    found = opened(images, first, batch_size=9)
    expected = Counted()(images.images)[0].double()
    torch.testing.assert_close(found.statistics.mu, expected.mean(0))
    torch.testing.assert_close(found.statistics.sigma, torch.cov(expected.T))
    assert found.features.equal(expected.float())
    assert first._network.images == 40
    moved = opened(images, first, "moved")
    assert first._network.images == 40
    assert (moved.name, moved.statistics.mu.tolist()) == ("moved", found.statistics.mu.tolist())
    assert moved.statistics.sigma.equal(found.statistics.sigma)
    assert moved.features.equal(found.features)
    for other_images, other in ((random(40, seed=1), first), (images, extractor("b" * 64))):
        before = other._network.images
        opened(other_images, other)
        assert other._network.images == before + 40
    assert len(list(Path("cache/statistics").iterdir())) == 3


def test_a_reference_goes_on_after_an_interruption():
    """What was computed is in the folder of the evaluation until the cache has the whole."""
    images = random(40)
    with pytest.raises(KeyboardInterrupt):
        opened(images, extractor(most=27), batch_size=9)
    assert len(kept_parts()) == 3
    assert not Path("cache/statistics").exists()
    rest = extractor(most=13)
    found = opened(images, rest, batch_size=9)
    assert rest._network.images == 13
    assert kept_parts() == []
    shutil.rmtree("cache")
    whole = opened(images, batch_size=9)
    assert found.features.equal(whole.features)
    assert found.statistics.sigma.equal(whole.statistics.sigma)
    assert found.origin == whole.origin


def test_a_reference_that_the_cache_cannot_hold_stays_in_parts():
    images = random(40)
    Path("cache").touch()
    found = opened(images)
    assert kept_parts()
    assert opened(images, extractor(most=0)).features.equal(found.features)


def test_samples_and_real_images_that_are_the_same_have_parts_of_their_own():
    """Those of the real images are removed."""
    images = random(40)
    features_in_parts(extractor(), Images("samples", images), 40, Path("eval"))
    before = kept_parts()
    opened(images)
    assert kept_parts() == before != []


def test_a_damaged_reference_in_the_cache_is_computed_again():
    images = random(40)
    found = opened(images)
    (path,) = Path("cache/statistics").iterdir()
    path.write_bytes(path.read_bytes()[:999])
    again = opened(images)
    assert again.statistics.mu.equal(found.statistics.mu)
    assert read_statistics(path).statistics.count == 40


def test_mirrored_references_are_noticed():
    images = random(30).images
    symmetric = torch.cat([images[:5], images[:5].flip(3)], 3)  # its own mirror image
    plain = InMemory(torch.cat([images, images[:3]]))
    mirrored = InMemory(torch.cat([images, images[:20].flip(3)]))
    for found, expected in ((plain, 0), (mirrored, 40), (InMemory(symmetric), 0)):
        assert computed(found, batch_size=8).mirrored == expected
    with pytest.raises(KeyboardInterrupt):
        opened(mirrored, extractor(most=30), batch_size=10)
    cached = [opened(mirrored) for _ in range(2)]
    assert [found.origin.mirrored for found in cached] == [40, 40]
    assert "40 reference images are mirror images of others" in " ".join(remarks(a_set(), cached[1], ("fid",)))


def test_the_pixels_of_an_npz_file_have_a_hash():
    for name, images in (("a", random(5).images), ("b", random(5).images), ("c", random(5, seed=1).images)):
        Path(f"{name}.npz").write_bytes(pictures.npz_bytes([images], 5))
    a, b, c = (Npz(Path(f"{name}.npz"), Path("cache")).fingerprint for name in "abc")
    assert (a == b, a == c, len(a)) == (True, False, 64)


def test_sets_that_cannot_be_compared():
    samples = a_set()
    unlike = replace(samples, name="real.npz")
    require_comparable(samples, unlike)
    for other, reason in (
        (replace(unlike, statistics=replace(unlike.statistics, count=10)), "real.npz: 10 images are too few"),
        (
            replace(unlike, origin=replace(samples.origin, sha256="b" * 64)),
            "real.npz: was computed by counted .bbbbbbbb",
        ),
        (
            replace(unlike, origin=replace(samples.origin, shape=(3, 4, 4))),
            "real.npz: is of RGB 4x4 images, .* RGB 2x2",
        ),
        (replace(unlike, origin=replace(samples.origin, shape=(1, 2, 2))), "real.npz: is of gray 2x2 images"),
        (
            FeatureSet("real.npz", Statistics(torch.zeros(9), torch.eye(9)), None),
            "real.npz: has 9 features, .* gives 6",
        ),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            require_comparable(samples, other)
        assert caught.value.hint
    with pytest.raises(DataError, match="some images: 12 images are too few"):
        require_comparable(a_set(12), unlike)


def test_remarks_name_what_is_unusual():
    samples = a_set()
    assert [note.partition(":")[0] for note in remarks(samples, samples, ("fid", "pr"))] == [
        "few samples (40)",
        "few reference images (40)",
    ]
    many = replace(samples, statistics=replace(samples.statistics, count=50_000))
    assert not list(remarks(many, many, ("fid", "pr")))
    fewer = replace(many, statistics=replace(samples.statistics, count=6))
    assert "precision and recall depend on the numbers of images" in " ".join(remarks(many, samples, ("pr",)))
    assert "precision" not in " ".join(remarks(many, samples, ("fid",)))
    assert "few samples (6 for 6 features)" in next(remarks(fewer, many, ("fid",)))
    assert not list(remarks(fewer, fewer, ("kid",)))  # KID of few images is noisy, and not too large
    field = FeatureSet("field.npz", samples.statistics, None)
    gray = replace(many, origin=replace(samples.origin, repeated=True))
    assert "has no features" not in " ".join(remarks(gray, field, ("fid",)))
    text = "\n".join(remarks(gray, field, ("fid", "kid")))
    for words in ("field.npz does not say which network", "gray images are repeated", "field.npz has no features"):
        assert words in text


def test_numbers_are_described():
    found = described(a_set(40), replace(a_set(60, seed=1), name="real"))
    assert (found["samples"], found["reference_images"], found["reference"]) == (40, 60, "real")
    assert (found["extractor"], found["extractor_sha256"]) == ("counted", "a" * 64)
    assert found["reference_fingerprint"] == random(60, seed=1).fingerprint
    assert (
        described(a_set(), FeatureSet("x", Statistics(torch.zeros(6), torch.eye(6)), None))["reference_images"] is None
    )


def test_real_digits_are_nearer_to_digits_than_their_negatives_are(digits):
    """The bundled extractor, from files to distances."""
    images = torch.stack([from_pil(decode(file, file.name, 1)) for file in sorted(digits.rglob("*.png"))])
    judge = open_extractor(DIGITS, CPU)
    even, odd, negative = (judge(part) for part in (images[::2], images[1::2], 255 - images))
    near, far = (
        frechet(moments(even.features).statistics, moments(found.features).statistics) for found in (odd, negative)
    )
    assert far > 3 * near
    assert kid(even.features, odd.features).mean < 0.1 * kid(even.features, negative.features).mean
    assert precision_recall(even.features, negative.features) == (0, 0)
    assert inception_score(even.logits, splits=1).mean > 5


class Once:
    """An extractor that is interrupted after some batches."""

    def __init__(self, judge, batches):
        self.judge, self.left = judge, batches

    def __call__(self, images):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return tuple(self.judge(images))


TOGETHER = """
import sys
from pathlib import Path

import torch

from ddpm_cli.data.npz import Npz
from ddpm_cli.distributed import process_group
from ddpm_cli.evaluation.extractors import open_extractor
from ddpm_cli.evaluation.reference import open_reference
from ddpm_cli.evaluation.statistics import write_statistics

with process_group() as world:
    extractor = open_extractor(sys.argv[1], torch.device("cpu"))
    cache = Path(f"cache-{world.rank}")  # each machine may have its own
    for name in ("computed", "cached"):
        images = Npz(Path(sys.argv[2]), cache)
        found = open_reference(
            images, "real", extractor, cache, Path("eval"), 8, world, lambda what, done, total: print(name, done, total)
        )
        if found:
            write_statistics(Path(f"{name}-{world.rank}.npz"), found)
"""


def test_two_processes_compute_a_reference_together(pair, digits):
    """Each computes half of what is missing; only the first gets the result, and keeps it in its cache."""
    images = torch.stack([from_pil(decode(file, file.name, 1)) for file in sorted(digits.rglob("*.png"))])
    Path("real.npz").write_bytes(pictures.npz_bytes([images], len(images)))
    judge = open_extractor(DIGITS, CPU)
    first = Extractor(Once(judge, 2), DIGITS, judge.sha256, CPU, judge.name, channels=1)
    with pytest.raises(KeyboardInterrupt):
        open_reference(Npz(Path("real.npz"), Path("cache")), "real", first, Path("cache"), Path("eval"), 8)
    processes = pair(DIGITS, "real.npz", source=TOGETHER)
    for process in processes:
        process.finish()
        assert process.out.decode().splitlines()[-1] == "computed 22 22"
    alone = judge(images)
    for name in ("computed-0", "cached-0"):
        found = read_statistics(Path(f"{name}.npz"))
        torch.testing.assert_close(found.features, alone.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.statistics.sigma, torch.cov(alone.features.double().T), rtol=1e-4, atol=1e-5)
        assert found.statistics.count == 60
    assert len(list(Path("cache-0/statistics").iterdir())) == 1
    assert not Path("computed-1.npz").exists()
    assert not Path("cache-1/statistics").exists()
    assert kept_parts() == []
