"""The results of an evaluation: kept by metric and images, in words, and on the model's card."""

import json

import pytest
from huggingface_hub import ModelCard

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.errors import DataError
from ddpm_cli.models.card import is_generated, model_card
from ddpm_cli.models.facts import facts
from ddpm_cli.models.results import (
    RESULTS,
    default_folder,
    in_words,
    read_results,
    require_results_of,
    write_results,
)
from ddpm_cli.training.presets import PRESETS

FID = {"metric": "fid", "set": "cats", "value": 3.17, "how": "50000 samples | Inception 6726825d"}
BITS = {"metric": "bits_per_dim", "set": "train", "value": 3.721, "error": 0.004, "how": "all terms"}
KID = {"metric": "kid", "set": "cats", "value": 0.00071, "deviation": 0.0001, "how": ""}
IS = {"metric": "inception_score", "set": "samples", "value": 9.46, "deviation": 0.11, "how": "50000 samples"}


def test_results_replace_those_of_the_same_metric_and_images(tmp_path):
    write_results(tmp_path, "a1", [FID, BITS])
    better, other = FID | {"value": 2.0}, FID | {"set": "dogs"}
    assert write_results(tmp_path, "a1", [better, other], version="1") == [better, BITS, other]
    assert read_results(tmp_path, "a1") == [better, BITS, other]
    assert json.loads((tmp_path / RESULTS).read_text())["version"] == "1"


def test_results_of_another_model_are_not_kept(tmp_path):
    write_results(tmp_path, "a1", [FID])
    assert read_results(tmp_path, "b2") == []
    assert write_results(tmp_path, "b2", [BITS]) == [BITS]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"fingerprint": "a1", "results": 3}',
        b'{"fingerprint": "a1", "results": [3, {}, {"metric": "fid", "set": 1, "value": 2}]}',
        b'{"fingerprint": "a1", "results": [{"metric": "fid", "set": "x", "value": NaN}, {"metric": [], "set": "x"}]}',
    ],
)
def test_a_damaged_file_has_no_results(tmp_path, content):
    (tmp_path / RESULTS).write_bytes(content)
    assert read_results(tmp_path, "a1") == []


def test_words():
    assert in_words([FID, BITS, KID | {"set": "a\nb"}]) == [
        ("FID (cats)", "3.170", "50000 samples | Inception 6726825d"),
        ("bits/dim (train)", "3.7210 ± 0.0040", "all terms"),
        ("KID x 1000 (a\\nb)", "0.710 ± 0.100", ""),
    ]
    assert in_words([IS]) == [("Inception score (samples)", "9.460 ± 0.110", "50000 samples")]


def test_the_card_shows_them():
    about = facts(PRESETS["cifar10"].unet(32, 3), ScheduleConfig())
    text = model_card(about, None, False, "me/cats", [FID, BITS, IS])
    assert "| FID (cats) | 3.170 | 50000 samples \\| Inception 6726825d |" in text
    assert is_generated(text)
    found = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert found == {"fid": 3.17, "bits_per_dim": 3.721, "inception_score": 9.46}
    assert "| Inception score (samples) | 9.460 ± 0.110 | 50000 samples |" in text
    assert "Evaluation" not in model_card(about, None, False, "me/cats")


def test_a_checkpoint_is_evaluated_in_its_run(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    assert default_folder(checkpoint, "run") == tmp_path / "run" / "eval" / "step-00000010"
    assert str(default_folder(tmp_path / "model", "model")) == "eval/model"


def test_raw_weights_have_a_folder_of_their_own(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    assert default_folder(checkpoint, "run", "raw") == tmp_path / "run" / "eval" / "step-00000010-raw"
    assert str(default_folder(tmp_path / "model", "model", "raw")) == "eval/model-raw"


def test_results_of_something_else_are_not_lost_by_chance(tmp_path):
    require_results_of(tmp_path, "b2")
    write_results(tmp_path, "a1", [FID])
    require_results_of(tmp_path, "a1")
    with pytest.raises(DataError, match="has results of another model, or of other images"):
        require_results_of(tmp_path, "b2")
