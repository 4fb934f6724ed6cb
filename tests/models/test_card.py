"""Information about a model: `ddpm info`, and the model card."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

import hub_server
from conftest import SMALL, write_model
from ddpm_cli import DDPM
from ddpm_cli.config import ScheduleConfig, jsd_betas
from ddpm_cli.models.card import CARD, PREVIEW, is_generated, model_card, read_card
from ddpm_cli.models.facts import facts, words
from ddpm_cli.models.recipe import RECIPE, read_recipe
from ddpm_cli.training.presets import PRESETS

# As diffusers' training example writes it.
THEIRS = """---
license: apache-2.0
datasets:
- huggan/smithsonian_butterflies_subset
metrics: []
---

# ddpm-butterflies-128

## Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.0001
- train_batch_size: 16
- optimizer: AdamW with betas=(0.95, 0.999), weight_decay=1e-06 and epsilon=1e-08
- mixed_precision: fp16

### Training results
- nothing: here
"""


def test_facts_of_the_papers_model():
    model = facts(PRESETS["cifar10"].unet(32, 3), ScheduleConfig(variance_type="fixed_large"))
    assert model["parameters"] == 35_746_307
    assert model["attention"] == [16, 4]
    assert words(model) == {
        "images": "32x32 RGB",
        "network": "35.7M parameters, 2 blocks a level",
        "channels": "128, 256, 256, 256",
        "attention": "at 16x16, 4x4, one head",
        "predicts": "the noise, eps",
        "schedule": "1000 steps, linear, beta from 0.0001 to 0.02",
        "variance": "fixed, the large one (beta_t)",
        "x_0": "clipped to [-1, 1]",
    }


def test_info_of_a_run(cli, finished_run):
    code, out, err = cli("info", finished_run)
    assert (code, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["model"] == str(finished_run / "checkpoints" / "step-00000004")
    assert rows["images"] == "8x8 gray"
    assert rows["steps"] == "4 of 4"
    assert rows["data"] == "60 images, digits"
    assert rows["prepared"] == "8x8, crop"  # as the header of `ddpm train` calls it
    assert rows["mirrored"] == "never"
    code, out, _ = cli("info", finished_run, "--json")
    found = json.loads(out)
    assert found["schema"] == 1
    assert found["trained"]["train"]["batch_size"] == 4
    assert found["weights"] == ["diffusion_pytorch_model.safetensors"]
    assert found["weight_bytes"] > 4 * found["parameters"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"), "the velocity, v"),
        (ScheduleConfig(beta_schedule="squaredcos_cap_v2"), "1000 steps, cosine\n"),
        (ScheduleConfig(2, trained_betas=(0.1, 0.2)), "2 steps, a list of betas\n"),
        (ScheduleConfig(20, trained_betas=jsd_betas(20)), "20 steps, beta_t = 1 / (T - t + 1)\n"),
        (ScheduleConfig(beta_start=0.02), "1000 steps, constant, beta 0.02\n"),
        (ScheduleConfig(prediction_type="mean"), "the mean of x_{t-1}, mu~_t\n"),
        (ScheduleConfig(thresholding=True), "dynamic thresholding"),
        (ScheduleConfig(clip_sample=False), "not limited"),
    ],
)
def test_info_of_other_models(cli, tmp_path, schedule, expected):
    assert expected in cli("info", write_model(tmp_path / "model", SMALL, schedule))[1]


def test_info_of_a_model_on_the_hub_downloads_no_weights(cli, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server.serve() as server:
        server.add("org/small", small_model)
        server.repos["org/small"].files["README.md"] = THEIRS.encode()
        code, out, _ = cli("info", "org/small")
        assert code == 0
        assert "diffusion_pytorch_model.safetensors, 0.1 MB, not downloaded, so not checked" in out
        assert "mixed_precision   fp16" in out
        assert not any("safetensors" in name for name in server.downloaded())


def test_cards_of_other_programs(tmp_path):
    (tmp_path / CARD).write_text(THEIRS)
    recipe, card = read_recipe(tmp_path), read_card(tmp_path)
    assert recipe is None
    assert card == {
        "license": "apache-2.0",
        "datasets": "huggan/smithsonian_butterflies_subset",
        "learning_rate": "0.0001",
        "train_batch_size": "16",
        "optimizer": "AdamW with betas=(0.95, 0.999), weight_decay=1e-06 and epsilon=1e-08",
        "mixed_precision": "fp16",
    }
    large = '{"train": {"lr_decay": 1%s}, "images": {}}' % ("0" * 400)
    for junk in ("[]", "{", '{"train": 1}', '{"train": {"lr": null}, "images": "none"}', large):
        (tmp_path / RECIPE).write_text(junk)  # another program's file of that name must not stop `info`
        from ddpm_cli.models.recipe import recipe_in_words

        recipe_in_words(read_recipe(tmp_path) or {})


def test_every_checkpoint_is_a_model_page(finished_run, digits):
    """The Hub's metadata, the newest preview, the recipe, and no path of this machine."""
    newest = finished_run / "checkpoints" / "step-00000004"
    card = ModelCard.load(newest / CARD)
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "ddpm" in card.data.tags
    assert f"![Samples]({PREVIEW})" in card.text
    assert (newest / PREVIEW).read_bytes() == (finished_run / "samples" / "step-00000004.png").read_bytes()
    assert "| data | 60 images, digits |" in card.text
    assert "| learning rate | 0.002, linear warm-up over 100 steps |" in card.text
    for name in (CARD, RECIPE):
        assert str(digits.parent) not in (newest / name).read_text()
    earlier = finished_run / "checkpoints" / "step-00000002"  # before there was any preview
    assert not (earlier / PREVIEW).exists()
    assert PREVIEW not in (earlier / CARD).read_text()


def test_a_card_names_its_address_and_its_base():
    model = facts(SMALL, ScheduleConfig())
    recipe = {"base": "google/ddpm-cat-256@1a2b3c4", "images": {"name": "a|b", "count": 3}, "train": {}}
    text = model_card(model, recipe, preview=False, address="me/cats")
    assert ModelCard(text).data.base_model == "google/ddpm-cat-256"
    assert "# cats\n" in text
    assert "ddpm sample -m me/cats" in text
    assert r"3 images, a\|b" in text
    local = model_card(model, recipe | {"base": "cats, step-00010000"}, preview=False)
    assert ModelCard(local).data.base_model is None
    assert "| started from | cats, step-00010000 |" in local


def test_save_pretrained_keeps_how_it_was_trained(finished_run, tmp_path):
    DDPM.from_pretrained(finished_run).save_pretrained(tmp_path / "copy")
    assert read_recipe(tmp_path / "copy") == read_recipe(finished_run / "checkpoints" / "step-00000004")


def test_untrusted_cards_and_recipes_are_safe(cli, small_model, tmp_path):
    """A card is untrusted text: it replaces no fact, and its control codes are escaped."""
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    (model / CARD).write_text("## Hyperparameters\n- variance: none at all\n- note: \x1b]0;owned\x07 hello\n")
    out = cli("info", model)[1]
    assert "variance   fixed, the small one" in out
    assert "none at all" not in out
    assert "\x1b" not in out
    for junk in ('{"train": {}}', '{"train": {}, "images": {"flip": []}}'):
        (model / RECIPE).write_text(junk)
        assert cli("info", model)[0] == 0
        DDPM.from_pretrained(model).save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("odd", ["\x1b[31m", "\x9b", "\ud800", "a\n\n# b", "\u202e", "\r\x85"])
def test_a_card_is_printable_whatever_its_recipe_holds(odd):
    images, train = {"name": odd, "count": odd, "fit": odd, "size": odd}, {"seed": odd, "lr": odd, "lr_warmup": odd}
    recipe = {"base": f"{odd}/{odd}", "step": 1, "version": odd, "images": images, "train": train}
    text = model_card(facts(SMALL, ScheduleConfig()), recipe, preview=False)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\n# b" not in text
    assert is_generated(text)


def test_an_edited_card_does_not_count_as_generated():
    text = model_card(facts(SMALL, ScheduleConfig()), None, preview=False)
    assert is_generated(text)
    assert not is_generated(text.replace("gray", "grey"))
    assert not is_generated("mine")


def test_info_checks_local_weights(cli, small_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    assert cli("info", "-m", model)[1] == cli("info", model)[1]
    weights.write_bytes(weights.read_bytes()[:-4])
    code, out, err = cli("info", model)
    assert (code, out) == (1, "")
    assert "cannot be read" in err
    weights.unlink()
    assert "has no weights next to unet/config.json" in cli("info", model)[2]
