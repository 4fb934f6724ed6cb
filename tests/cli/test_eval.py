"""`ddpm eval`: what it measures, keeps, says and refuses."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import picture, train_once, write_model
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.models.results import RESULTS
from processes import wait_until


class Pooled(torch.nn.Module):
    """Features and classes of an image: means of its quarters, of any number of channels."""

    def forward(self, x):
        means = torch.nn.functional.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), 2).flatten(1)
        return means, means / 32


@pytest.fixture(scope="session")
def extractor(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("extractors") / "pooled.pt"
    torch.jit.save(torch.jit.script(Pooled()), path)
    return path


@pytest.fixture(scope="session")
def held_run(digits, quick_model, tmp_path_factory) -> Path:
    """A run that holds out some of the digits. Its model has four steps. Tests copy it."""
    options = ("--from", quick_model, "--precision", "fp32", "--holdout", 0.3)
    return train_once(tmp_path_factory.mktemp("runs") / "held", digits, *options)


@pytest.fixture
def run(held_run) -> Path:
    return Path(shutil.copytree(held_run, "run"))


@pytest.fixture
def evaluate(cli):
    """Run `ddpm eval`, and return its results by metric and images, and its notes."""

    def call(*args: object):
        code, out, err = cli("eval", *args, "--json")
        assert code == 0, err
        results = json.loads(out)["results"]
        return {(result["metric"], result["set"]): result for result in results}, err

    return call


def test_a_run_is_measured_on_its_own_images(evaluate, run, extractor):
    """Bits/dim on the images that it was trained on and on those held out; distances from the former."""
    found, err = evaluate(run, "--features", extractor, "-n", 40, "--terms", 3)
    folder = run / "eval" / "step-00000004"
    assert found.keys() == {
        ("bits_per_dim", "train"),
        ("bits_per_dim", "held-out"),
        ("frechet", "train"),
        ("kid", "train"),
        ("precision", "train"),
        ("recall", "train"),
        ("inception_score", "samples"),
    }
    train, held = found["bits_per_dim", "train"], found["bits_per_dim", "held-out"]
    assert train["images"] == 40
    assert 2 <= held["images"] < 30
    assert train["terms"] == 3
    assert train["prior"] + train["rate"] - train["prior"] + train["distortion"] == pytest.approx(train["value"])
    assert "3 of 4 terms of 40 images" in train["how"]
    assert "40 samples (ddpm, 4 uniform steps" in found["frechet", "train"]["how"]
    assert "(train); pooled.pt" in found["frechet", "train"]["how"]
    assert "against" not in found["inception_score", "samples"]["how"]
    assert found["inception_score", "samples"]["reference"] is None
    assert "few samples (40)" in err
    assert json.loads((folder / RESULTS).read_text())["results"] == list(found.values())
    rows = list(csv.DictReader((folder / "bound.csv").read_text().splitlines()))
    assert {row["set"] for row in rows} == {"train", "held-out"}
    assert [int(row["t"]) for row in rows] == [4, 3, 2, 1] * 2
    assert picture(folder / "bound.png").width == 1280
    assert len(list((folder / "samples").glob("*.png"))) == 40


def test_results_of_several_calls_are_kept_together(evaluate, run, extractor, cli):
    evaluate(run, "--metrics", "bpd", "-n", 2)
    _, err = evaluate(run, "--metrics", "fid", "-n", 33, "--features", extractor)
    values = json.loads((run / "eval" / "step-00000004" / RESULTS).read_text())
    assert [result["metric"] for result in values["results"]] == ["bits_per_dim", "bits_per_dim", "frechet"]
    assert "exist already" not in err
    _, err = evaluate(run, "--metrics", "kid", "-n", 35, "--features", extractor)
    assert "33 of 35 images exist already" in err
    code, out, _ = cli("eval", run, "--metrics", "kid", "-n", 35, "--features", extractor, "-q")
    assert (code, out.split()[:2]) == (0, ["KID", "x"])


def test_an_evaluation_that_was_killed_continues(evaluate, start, run, extractor):
    """The parts of the bound and the samples that exist are used, and the results are those of one call."""
    options = ("--features", extractor, "-n", 40, "--batch-size", 1)
    shutil.copytree(run, "other")
    process = start("eval", "other", *options, "-q")
    folder = Path("other/eval/step-00000004")
    wait_until(lambda: len(list(folder.glob("bound/*/*.safetensors"))) > 3, process)
    process.kill()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("bound/*/*.safetensors")}
    process = start("eval", "other", *options, "-q")
    wait_until(lambda: len(list(folder.glob("samples/*.png"))) > 3, process)
    process.kill()
    again, err = evaluate("other", *options)
    assert all(path.stat().st_mtime_ns == before[path] for path in before)
    assert "of 40 images exist already" in err
    assert f"kept in {folder}" in err
    assert again == evaluate(run, *options)[0]


KILLED = """
import os
import signal
import sys

from ddpm_cli.cli.app import main
from ddpm_cli.evaluation import parts

write, most = parts.write_file, int(sys.argv.pop(1))

def write_and_die(path, *args, **options):
    global most
    write(path, *args, **options)
    most -= 1
    if not most:
        os.kill(os.getpid(), signal.SIGKILL)

parts.write_file = write_and_die
main()
"""


def test_real_images_that_were_seen_are_not_looked_at_again(evaluate, start, run, extractor):
    """The evaluation is killed twice among the real images, which are its first work: after 5 parts, and after 4."""
    options = ("--metrics", "fid,kid", "--features", extractor, "-n", 40, "--batch-size", 3)
    shutil.copytree(run, "other")
    folder = Path("other/eval/step-00000004")
    seen: dict[Path, int] = {}
    for parts in (5, 4):
        process = start(parts, "eval", "other", *options, source=KILLED)
        assert process.wait() == -9
        now = {path: path.stat().st_mtime_ns for path in folder.glob("features/*/*.safetensors")}
        assert len(now) == len(seen) + parts
        assert seen.items() <= now.items()
        seen = now
    assert not (folder / "samples").exists()
    again, _ = evaluate("other", *options)
    assert not any(path.exists() for path in seen)  # the cache has the whole
    shutil.rmtree("cache/statistics")
    assert again == evaluate(run, *options)[0]


def test_two_processes_measure_what_one_does(evaluate, pair, run, extractor):
    options = ("--features", extractor, "-n", 33, "--terms", 3, "--batch-size", 4, "--precision", "fp32")
    shutil.copytree(run, "other")
    first, second = pair("eval", "other", *options, "--json")
    assert first.wait() == second.wait() == 0, first.err + second.err
    assert (second.out, second.err) == (b"", "")
    one, _ = evaluate(run, *options)
    for result in json.loads(first.out)["results"]:
        expected = one[result["metric"], result["set"]]
        assert result["value"] == pytest.approx(expected["value"], rel=1e-5), result["metric"]
        assert result["how"].partition("95 %")[0] == expected["how"].partition("95 %")[0]


def test_images_are_evaluated_without_a_model(evaluate, cli, small_model, digits, extractor):
    """A folder and an .npz file of the same samples have the same distances; of themselves, 0 and 1."""
    for output in ("samples/", "samples.npz"):
        assert cli("sample", "-m", small_model, "-n", 40, "-o", output, "--steps", 2, "-q")[0] == 0
    common = ("--features", extractor, "--data")
    folder, err = evaluate("--samples", "samples", *common, digits)
    array, _ = evaluate("--samples", "samples.npz", *common, digits)
    assert {key[0]: result["value"] for key, result in folder.items()} == {
        key[0]: result["value"] for key, result in array.items()
    }
    assert "digits: the images are 28x28: resized to 8x8 (bicubic, crop)" in err
    same, err = evaluate("--samples", "samples", *common, "samples.npz", "--metrics", "fid,pr")
    assert [result["value"] for result in same.values()] == [pytest.approx(0, abs=1e-6), 1, 1]


def test_statistics_are_saved_and_compared_with(evaluate, cli, small_model, digits, extractor):
    options = ("--samples", "samples.npz", "--features", extractor, "--data")
    assert cli("sample", "-m", small_model, "-n", 40, "-o", "samples.npz", "--steps", 2, "-q")[0] == 0
    images, _ = evaluate(*options, digits, "--save-statistics", "digits.npz")
    saved, _ = evaluate(*options, "digits.npz")
    assert [r["value"] for r in saved.values()] == [r["value"] for r in images.values()]
    with np.load("digits.npz") as arrays:
        np.savez("field.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    again, _ = evaluate(*options, digits, "--save-statistics", "digits.npz")  # finds its own file
    assert again == images
    code, _, err = cli("eval", *options, "field.npz", "--save-statistics", "digits.npz")
    assert code == 2  # it has them already
    code, _, err = cli("eval", *options, "samples.npz", "--save-statistics", "digits.npz")
    assert (code, "--save-statistics digits.npz: exists already" in err) == (1, True)
    field, err = evaluate(*options, "field.npz")
    assert field["frechet", "field.npz"]["value"] == images["frechet", "digits"]["value"]
    assert field.keys() == {("frechet", "field.npz"), ("inception_score", "samples.npz")}
    assert "field.npz does not say which network, images and resize it is from" in err
    assert "has no features, so there is no KID" in err


def test_odd_references_are_named(evaluate, cli, color_model, small_model, digits, photo, extractor, tmp_path):
    options = ("--metrics", "fid", "-n", 33, "--steps", 2, "--features", extractor, "--data")
    _, err = evaluate(color_model, *options, digits)
    assert "digits: 60 of 60 images are gray: repeated to three channels" in err
    for i in range(33):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(photo, tmp_path / "photos" / f"{i}.jpg")
    _, err = evaluate(small_model, *options, "photos")
    assert "photos: 33 of 33 images have colours: converted to gray" in err
    assert "photos: the images are of several sizes or not square: resized to 8x8 (bicubic, crop)" in err
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(digits.rglob("*.png"))[:10]:
        shutil.copy(path, few)
    code, _, err = cli("eval", small_model, *options, "few")
    assert code == 1
    assert "few: 10 images are too few for FID, KID, IS or precision" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--metrics", "bpd,fad"), "--metrics fad is not one of bpd, fid, kid, is, pr"),
        (("--samples", "x", "--data", "y", "--metrics", "bpd"), "--metrics bpd is about a model"),
        (("model", "--samples", "x", "--data", "y"), "--samples is evaluated without a model"),
        (("--samples", "x"), "--data is missing"),
        (("model", "--metrics", "bpd"), "--data is missing"),
        (("model", "--terms", "1"), "--terms 1: a sample needs two terms"),
        (("model", "--metrics", "bpd", "--save-statistics", "x.npz"), "--metrics bpd computes no statistics"),
        (("model", "--metrics", "is", "--save-statistics", "x.npz"), "--metrics is computes no statistics of real im"),
        (("--samples", "-", "--data", "-"), "-: stdin can be read only once"),
        (("model", "-m", "other"), "and --model other are two models"),
        (("model", "--save-statistics", "x.pt"), "--save-statistics x.pt: the name must end in .npz"),
        (("model", "--fit", "x"), "--fit x is not one of crop, pad, stretch"),
    ],
)
def test_wrong_usage(cli, small_model, args, message):
    code, out, err = cli("eval", *(small_model if arg == "model" else arg for arg in args))
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("eval").exists()


def test_an_inception_score_needs_no_real_images(evaluate, cli, small_model, extractor):
    """Of a model, and of its samples; which have the same score as in a comparison with real images."""
    options = ("--features", extractor, "--metrics")
    found, err = evaluate(small_model, *options, "is", "-n", 40, "--steps", 2)
    [result] = found.values()
    assert (result["metric"], result["set"], result["reference"]) == ("inception_score", "samples", None)
    assert (result["samples"], result["reference_images"]) == (40, None)
    assert result["how"].endswith("ema weights); pooled.pt " + result["extractor_sha256"][:8] + ", not resized")
    assert "few samples (40): compare the Inception score only with those of as many images" in err
    assert "Fréchet" not in err
    [folder] = Path("eval").iterdir()
    assert not Path("cache/statistics").exists()
    images, _ = evaluate("--samples", folder / "samples", *options, "is")
    [same] = images.values()
    assert same["value"] == result["value"]
    assert same["how"].startswith("40 images of samples; pooled.pt")
    code, out, _ = cli("eval", "--samples", folder / "samples", *options, "is")
    assert (code, out.split()[:3]) == (0, ["Inception", "score", "(samples)"])
    both, _ = evaluate("--samples", folder / "samples", *options, "fid,is", "--data", folder / "samples")
    assert both["inception_score", "samples"] == same
    unused, err = evaluate("--samples", folder / "samples", *options, "is", "--data", "none/")
    assert unused == images
    assert "--data is not used: the Inception score is about the samples alone" in err


def test_bits_per_dim_and_an_inception_score(evaluate, run, extractor):
    found, _ = evaluate(run, "--metrics", "bpd,is", "-n", 33, "--terms", 2, "--features", extractor)
    assert found.keys() == {("bits_per_dim", "train"), ("bits_per_dim", "held-out"), ("inception_score", "samples")}


def test_an_extractor_without_classes_has_no_inception_score(cli, small_model, tmp_path):
    class Means(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    torch.jit.save(torch.jit.script(Means()), tmp_path / "means.pt")
    options = ("--features", "means.pt", "--metrics", "is")
    code, _, err = cli("eval", small_model, *options)
    assert (code, "--metrics is: not possible with means.pt, which has no classes" in err) == (1, True), err
    code, _, err = cli("eval", small_model, *options, "-n", 31)
    assert (code, "samples: 31 images are too few" in err) == (1, True), err
    assert not Path("eval").exists()


def test_two_processes_share_a_list_on_stdin(evaluate, pair, small_model, digits, extractor):
    """Only the first can read it: torchrun gives all of its processes one stdin."""
    names = "".join(f"{path}\n" for path in sorted(digits.rglob("*.png"))).encode()
    options = ("--features", extractor, "--metrics", "fid", "-n", 33, "--steps", 2, "--batch-size", 4)
    reader, writer = os.pipe()  # the list is far smaller than what a pipe holds
    os.write(writer, names)
    os.close(writer)
    first, second = pair("eval", small_model, *options, "--data", "-", "-o", "list", "--json", stdin=reader)
    os.close(reader)
    assert first.wait() == second.wait() == 0, first.err + second.err
    [found] = json.loads(first.out)["results"]
    assert (found["set"], found["reference_images"]) == ("list", 60)
    one, _ = evaluate(small_model, *options, "--data", digits)
    assert found["value"] == pytest.approx(one["frechet", "digits"]["value"], rel=1e-5)


def test_a_missing_extractor_is_found_before_anything_is_measured(cli, run):
    code, _, err = cli("eval", run, "--features", "none.pt")
    assert code == 1
    assert "none.pt" in err
    assert not list(run.glob("eval/**/*.safetensors"))


def test_missing_samples_are_found_before_an_extractor_is_loaded(cli):
    code, _, err = cli("eval", "--samples", "nowhere", "--data", "real", "--features", "none.pt")
    assert (code, "nowhere: no such" in err) == (1, True), err


def test_what_cannot_be_compared_is_found_before_samples_are_drawn(cli, small_model, digits, extractor, tmp_path):
    """Too few samples or images, statistics of another extractor, and metrics that are not possible."""
    np.savez("other.npz", mu=np.zeros(9), sigma=np.eye(9))
    np.savez("field.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez("broken.npz", mu=np.zeros(4), sigma=np.eye(9))
    np.savez("big.npz", arr_0=np.zeros((40, 16, 16, 1), np.uint8))
    (tmp_path / "few").mkdir()
    for path in sorted(digits.rglob("*.png"))[:10]:
        shutil.copy(path, tmp_path / "few")
    for args, message in (
        (("--data", digits, "-n", 10), "samples: 10 images are too few"),
        (("--data", "few"), "few: 10 images are too few"),
        (("--data", "other.npz"), "other.npz: has 9 features, and the extractor of the samples gives 4"),
        (("--data", "field.npz", "--metrics", "kid,pr"), "--metrics kid,pr: not possible with pooled.pt and field.npz"),
        (("--data", "broken.npz"), "broken.npz: mu is (4,) and sigma is (9, 9)"),
        (("--data", "big.npz"), "--data big.npz: its images are 16x16 gray, not 8x8 gray"),
        (("--data", digits, "--save-statistics", "field.npz"), "--save-statistics field.npz: exists already"),
        (("--metrics", "bpd,is"), "--data is missing"),
        (("--data", digits, "--metrics", "fid", "--order", 9), "--order 9"),
    ):
        code, _, err = cli("eval", small_model, "--features", extractor, *args)
        assert (code in (1, 2), message in err) == (True, True), err
        assert not Path("eval").exists()


def test_samples_that_were_made_otherwise_are_found_before_the_bound(evaluate, cli, small_model, digits, extractor):
    options = ("eval", small_model, "--data", digits, "--features", extractor, "-n", 33, "--steps", 2)
    evaluate(*options[1:], "--metrics", "fid")
    code, _, err = cli(*options, "--seed", 1)
    assert (code, "holds samples that were made differently: seed 0, not 1" in err) == (1, True)
    [folder] = Path("eval").iterdir()
    assert not (folder / "bound").exists()


def test_a_damaged_sample_is_named_and_drawn_again(evaluate, cli, small_model, digits, extractor):
    options = (small_model, "--data", digits, "--features", extractor, "-n", 33, "--steps", 2, "--metrics", "fid")
    right, _ = evaluate(*options)
    [folder] = Path("eval").iterdir()
    path = folder / "samples" / "000003.png"
    path.write_bytes(path.read_bytes()[:50])
    shutil.rmtree(folder / "features")
    code, _, err = cli("eval", *options)
    assert (code, str(path) in err, "Remove it, and it is drawn again." in err) == (1, True, True)
    path.unlink()
    assert evaluate(*options)[0] == right


def test_statistics_have_all_metrics_that_are_possible(evaluate, small_model, extractor):
    """Without --metrics: no bits/dim, which need images, and no error."""
    np.savez("field.npz", mu=np.zeros(4), sigma=np.eye(4))
    found, _ = evaluate(small_model, "--data", "field.npz", "--features", extractor, "-n", 33, "--steps", 2)
    assert {metric for metric, _ in found} == {"frechet", "inception_score"}


def test_images_that_have_changed_since_the_training_are_noticed(evaluate, digits, quick_model, tmp_path, capfd):
    shutil.copytree(digits, "mine")
    train_once(tmp_path / "run", "mine", "--from", quick_model, "--precision", "fp32")
    capfd.readouterr()
    _, err = evaluate("run", "--metrics", "bpd", "-n", 2)
    assert "have changed" not in err
    next(Path("mine").rglob("*.png")).unlink()
    _, err = evaluate("run", "--metrics", "bpd", "-n", 2)
    assert "the images of the run have changed since this checkpoint was trained" in err


def test_a_run_that_holds_out_none_is_measured(evaluate, digits, quick_model, tmp_path, capfd):
    """So small a fraction of so few images that none of them is held out."""
    train_once(tmp_path / "run", digits, "--from", quick_model, "--precision", "fp32", "--holdout", 0.0001)
    capfd.readouterr()
    found, _ = evaluate("run", "--metrics", "bpd", "-n", 2)
    assert found.keys() == {("bits_per_dim", "train")}


def test_only_one_process_evaluates_into_a_folder(cli, run):
    from ddpm_cli.files import LOCK, lock

    with lock(run / "eval" / "step-00000004" / LOCK):
        code, _, err = cli("eval", run, "--metrics", "bpd")
    assert code == 1
    assert "another evaluation is writing to it" in err


def test_every_kind_of_model_has_a_bound(evaluate, tmp_path, digits):
    from dataclasses import replace

    from conftest import SMALL

    kinds = ("epsilon", "sample", "v_prediction", "mean")
    variances = ("fixed_small", "learned_range", "learned_log")
    for kind, variance in [*((kind, "fixed_large") for kind in kinds), *(("epsilon", other) for other in variances)]:
        schedule = ScheduleConfig(10, prediction_type=kind, variance_type=variance)
        config = replace(SMALL, out_channels=2 if variance.startswith("learned") else 1)
        model = write_model(tmp_path / kind / variance, config, schedule)
        found, _ = evaluate(model, "--data", digits, "--metrics", "bpd", "-n", 3, "-o", f"{kind}-{variance}")
        [result] = found.values()
        assert result["value"] > 0
        assert "all 10 terms of 3 images" in result["how"]


@pytest.mark.parametrize("T", [1, 2])
def test_models_of_one_and_of_two_steps(evaluate, tmp_path, digits, T):
    from conftest import SMALL

    model = write_model(tmp_path / "model", SMALL, ScheduleConfig(T))
    found, _ = evaluate(model, "--data", digits, "--metrics", "bpd", "-n", 3, "--terms", 2)
    [result] = found.values()
    assert (result["terms"], result["steps"]) == (T, T)
    assert result["rate"] + result["distortion"] == pytest.approx(result["value"])
    assert (result["rate"] > result["prior"]) == (T > 1)


def test_another_model_does_not_replace_results(evaluate, cli, run, small_model, digits):
    """The raw weights of a checkpoint have a folder of their own; other models and other images are refused."""
    options = ("--metrics", "bpd", "-n", 2)
    evaluate(run, *options)
    found, _ = evaluate(run, *options, "--weights", "raw")
    assert len(found) == 2
    assert {path.name for path in (run / "eval").iterdir()} == {"step-00000004", "step-00000004-raw"}
    before = (run / "eval" / "step-00000004" / RESULTS).read_bytes()
    other = (small_model, "--data", digits, *options, "-o", run / "eval" / "step-00000004")
    code, _, err = cli("eval", *other)
    assert code == 1
    assert "step-00000004: has results of another model" in err
    assert (run / "eval" / "step-00000004" / RESULTS).read_bytes() == before
    evaluate(*other, "--force")


def test_results_of_other_images_are_not_mixed(evaluate, cli, small_model, digits, extractor):
    """Two folders of samples that have one name."""
    for seed, parent in enumerate("ab"):
        options = ("-n", 40, "-o", f"{parent}/images/", "--steps", 2, "--seed", seed, "-q")
        assert cli("sample", "-m", small_model, *options)[0] == 0
    options = ("--features", extractor, "--data", digits)
    evaluate("--samples", "a/images", *options, "--metrics", "fid")
    code, _, err = cli("eval", "--samples", "b/images", *options, "--metrics", "kid")
    assert code == 1
    assert "eval/images: has results of another model, or of other images" in err
    evaluate("--samples", "b/images", *options, "--metrics", "kid", "--force")
    [result] = json.loads(Path("eval/images", RESULTS).read_text())["results"]
    assert result["metric"] == "kid"


def test_samples_that_are_drawn_again_are_looked_at_again(evaluate, run, extractor):
    options = (run, "--metrics", "fid", "-n", 33, "--features", extractor)
    right, _ = evaluate(*options)
    folder = run / "eval" / "step-00000004"
    for path in (folder / "samples").glob("*.png"):
        path.write_bytes((folder / "samples" / "000000.png").read_bytes())
    shutil.rmtree(folder / "features")
    assert evaluate(*options)[0] != right
    assert evaluate(*options, "--force")[0] == right
