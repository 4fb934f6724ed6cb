"""Extractors of features: weights of Inception, TorchScript, and files that are neither."""

import hashlib
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_inception import image, random_weights

from ddpm_cli.data.images import decode, from_pil
from ddpm_cli.errors import ModelError
from ddpm_cli.evaluation import extractors, inception
from ddpm_cli.evaluation.extractors import open_extractor
from ddpm_cli.evaluation.fetch import Published
from ddpm_cli.evaluation.inception import Inception

CPU = torch.device("cpu")
DIGITS = Path(__file__).parents[2] / "examples" / "digits-features.pt"


class Means(torch.nn.Module):
    """The mean of each channel, with a weight, so that only images of so many channels fit."""

    def __init__(self, channels, result="features"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.result = result

    def forward(self, x):
        means = torch.nn.functional.conv2d(x.float(), self.weight, groups=len(self.weight)).mean((2, 3))
        return {
            "features": means,
            "both": (means, 2 * means),
            "half": means.half(),
            "pixels": x,
            "sum": means.sum(),
            "infinite": 1 / (means - means),
            "infinite classes": (means, 1 / (means - means)),
        }[self.result]


class Detector(torch.nn.Module):
    """Like inception-2015-12-05.pt of StyleGAN."""

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False) -> torch.Tensor:
        x = img.float().mean((2, 3))
        return x if return_features else torch.softmax(x, 1)


def saved(module, path, shape=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(module, torch.ones(shape, dtype=torch.uint8)) if shape else torch.jit.script(module)
        torch.jit.save(script, path)
    return path


def pixels(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.mark.parametrize("form", ["safetensors", "with counts", "without counts", "old"])
def test_weights_of_inception(weights, form, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "SIDE", 75)  # it is sixteen times faster
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    match form:
        case "safetensors":
            save_file(weights, path)
        case "without counts":
            torch.save(weights, path)
        case _:
            network = Inception()
            network.load_state_dict(weights, strict=False)
            torch.save(network.state_dict(), path, _use_new_zipfile_serialization=form != "old")
    extractor = open_extractor(path, CPU)
    network = Inception().eval()
    network.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = network(image())
    found = extractor(image())
    torch.testing.assert_close(found.features, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected[1], rtol=1e-3, atol=1e-3)
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (extractor.name, extractor.resize) == ("Inception", "resized to 299x299, bilinear as in TensorFlow 1")
    gray = image()[:, :1]
    assert extractor.repeats((1, 40, 50))
    assert extractor(gray).features.equal(extractor(gray.repeat(1, 3, 1, 1)).features)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("fc.bias"), "fc.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra"),
        (lambda weights: weights.update({"fc.bias": torch.zeros(1000)}), "fc.bias"),
        (lambda weights: weights.update({"fc.bias": torch.full((1008,), float("nan"))}), "fc.bias"),
    ],
)
def test_other_weights_are_refused(weights, change, named, tmp_path):
    changed = dict(weights)
    change(changed)
    save_file(changed, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=rf"w\.safetensors: has not the weights .* example {named}"):
        open_extractor(tmp_path / "w.safetensors", CPU)


def test_without_a_file_inception_is_downloaded(weights, tmp_path, monkeypatch):
    """The cache has it already; a damaged one is refused."""
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path))
    (tmp_path / "extractors").mkdir()
    path = tmp_path / "extractors" / "w.pth"
    torch.save(weights, path)
    data = path.read_bytes()
    monkeypatch.setattr(
        extractors, "INCEPTION", Published("http://127.0.0.1:1/w.pth", len(data), hashlib.sha256(data).hexdigest())
    )
    assert open_extractor(None, CPU).name == "Inception"
    path.write_bytes(data[:-1] + b"?")
    with pytest.raises(ModelError, match=r"w\.pth: is damaged"):
        open_extractor(None, CPU)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be downloaded") as caught:
        open_extractor(None, CPU)
    assert "--features" in caught.value.hint


def test_the_published_file_is_the_one_of_the_field():
    """Its name begins with its hash, by the habit of PyTorch."""
    assert extractors.INCEPTION.sha256[:8] in extractors.INCEPTION.name


def test_torchscript_traced_for_two_images_takes_any_number():
    path = saved(Means(3), "means.pt", (2, 3, 8, 8))
    extractor = open_extractor(path, CPU)
    for count in (1, 2, 5):
        batch = pixels(count, 3, 8, 8)
        found = extractor(batch)
        torch.testing.assert_close(found.features, batch.float().mean((2, 3)))
        assert found.logits is None
    assert (extractor.name, extractor.sha256) == ("means.pt", hashlib.sha256(Path(path).read_bytes()).hexdigest())


def test_logits_and_half_precision():
    found = open_extractor(saved(Means(1, "both"), "both.pt", (2, 1, 8, 8)), CPU)(pixels(3, 1, 8, 8))
    assert found.logits.equal(2 * found.features)
    half = open_extractor(saved(Means(1, "half"), "half.pt", (2, 1, 8, 8)), CPU)(pixels(3, 1, 8, 8))
    assert half.features.dtype == torch.float32


def test_the_detector_of_stylegan_is_asked_for_features():
    batch = pixels(2, 3, 8, 8)
    found = open_extractor(saved(Detector(), "detector.pt"), CPU)(batch)
    torch.testing.assert_close(found.features, batch.float().mean((2, 3)))


def test_gray_and_rgb():
    gray, color = (open_extractor(saved(Means(c), f"{c}.pt", (2, c, 8, 8)), CPU) for c in (1, 3))
    assert [extractor.repeats((1, 8, 8)) for extractor in (gray, color)] == [False, True]
    assert color(pixels(2, 1, 8, 8)).features.shape == (2, 3)
    with pytest.raises(
        ModelError, match=r"1\.pt: cannot take images of 8x8 pixels with 3 channels .*1 channel"
    ) as caught:
        gray(pixels(2, 3, 8, 8))
    assert "TorchScript" in caught.value.hint


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("pixels", r"gives uint8 \(2, 1, 8, 8\) for 2 images"),
        ("sum", r"gives float32 \(\) for 2 images"),
        ("infinite", "gives features that are not finite"),
        ("infinite classes", "gives logits that are not finite"),
    ],
)
def test_results_that_are_no_features(result, reason):
    extractor = open_extractor(saved(Means(1, result), "bad.pt", (2, 1, 8, 8)), CPU)
    with pytest.raises(ModelError, match=rf"bad\.pt: {reason}"):
        extractor(pixels(2, 1, 8, 8))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_no_pickle_is_run():
    torch.save({"fc.bias": Evil()}, "evil.pth")
    torch.save(Evil(), "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile("exported.pt", "w") as archive:  # as torch.export.save writes it
        archive.writestr("exported/archive_format", "pt2")
    for name, reason in (
        ("evil.pth", "refused"),
        ("old.pth", "refused"),
        ("exported.pt", r"runs code in it .* refused"),
    ):
        with pytest.raises(ModelError, match=rf"{name}: .*{reason}"):
            open_extractor(name, CPU)
    assert not Path("evil").exists()


def test_files_that_are_something_else(tmp_path):
    Path("empty.pt").write_bytes(b"")
    Path("text.pth").write_text("not weights")
    with zipfile.ZipFile("broken.pt", "w") as archive:
        archive.writestr("broken/code/__torch__.py", "?")
    for name, reason in (
        ("none.pt", "No such file"),
        (".", "is a folder"),
        ("empty.pt", "no file of PyTorch"),
        ("text.pth", "no file of PyTorch"),
        ("broken.pt", "cannot be read as TorchScript"),
        ("a.pt2", "No such file"),
    ):
        with pytest.raises(ModelError, match=reason) as caught:
            open_extractor(name, CPU)
        assert name in caught.value.message


def test_the_extractor_of_the_bundled_digits_tells_digits(digits):
    files = sorted(digits.rglob("*.png"))
    images = torch.stack([from_pil(decode(file, file.name, 1)) for file in files])
    labels = torch.tensor([int(file.parent.name) for file in files])
    extractor = open_extractor(DIGITS, CPU)
    found = extractor(images)
    assert found.features.shape == (60, 64)
    assert (found.logits.argmax(1) == labels).float().mean() > 0.9
    with pytest.raises(ModelError, match="3 channels"):
        extractor(images.expand(-1, 3, -1, -1))
