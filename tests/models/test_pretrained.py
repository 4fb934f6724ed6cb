"""Models on disk, written and read by ddpm and by diffusers, and their samples."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from conftest import SMALL, write_model
from ddpm_cli import DDPM
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.samplers import SAMPLERS
from ddpm_cli.errors import DataError, ModelError, UsageError
from ddpm_cli.rng import ImageNoise
from ddpm_cli.training.presets import PRESETS


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# --- one format ---


def test_diffusers_loads_what_we_write(small_model):
    ours = DDPM.from_pretrained(small_model, precision="fp32")
    theirs = DDPMPipeline.from_pretrained(small_model)
    x_t = draw(2, 1, 8, 8)
    with torch.no_grad():
        expected = theirs.unet(x_t, 7).sample
        torch.testing.assert_close(ours.unet(x_t, torch.tensor([7])), expected, rtol=1e-5, atol=1e-5)
    assert theirs.scheduler.config.num_train_timesteps == 20
    assert theirs.scheduler.config.variance_type == "fixed_small"


def test_diffusers_samples_what_we_sample(small_model):
    """All steps, with our noise in their loop."""
    ours = DDPM.from_pretrained(small_model, precision="fp32")
    theirs = DDPMPipeline.from_pretrained(small_model)
    noise = ImageNoise(5, [0, 1], ours.shape)
    x = noise()
    theirs.scheduler.set_timesteps(20)
    for t in theirs.scheduler.timesteps:
        with torch.no_grad():
            eps = theirs.unet(x, t).sample
        mean_only = theirs.scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        if t > 0:  # replace their noise by ours
            sigma = theirs.scheduler._get_variance(t) ** 0.5
            mean_only = mean_only - sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            x = mean_only + sigma * noise()
        else:
            x = mean_only
    *_, last = ours.sample_loop(
        ImageNoise(5, [0, 1], ours.shape)(), noise=_skip_first(ImageNoise(5, [0, 1], ours.shape))
    )
    torch.testing.assert_close(last.x_t, x, rtol=0, atol=2e-3)


def _skip_first(noise):
    noise()
    return noise


def test_we_load_what_diffusers_writes(tmp_path):
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "theirs")
    ours = DDPM.from_pretrained(tmp_path / "theirs", precision="fp32")
    assert ours.shape == (3, 16, 16)
    assert ours.schedule_config.beta_schedule == "squaredcos_cap_v2"
    x_t = draw(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.unet(x_t, torch.tensor([7])), unet.eval()(x_t, 7).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_flat_directories_with_old_names_are_read(small_model, tmp_path, kind):
    """Like google/ddpm-*: all files in the root, and attention layers named query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(small_model / "unet" / "diffusion_pytorch_model.safetensors")
    renamed = {}
    for name, value in weights.items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        renamed[name] = value
    flat = tmp_path / "flat"
    flat.mkdir()
    config = json.loads((small_model / "unet" / "config.json").read_text())
    for key in ("add_attention", "dropout", "class_embed_type", "_class_name"):  # newer keys
        config.pop(key)
    (flat / "config.json").write_text(json.dumps(config))
    scheduler = json.loads((small_model / "scheduler" / "scheduler_config.json").read_text())
    (flat / "scheduler_config.json").write_text(json.dumps(scheduler))
    if kind == "bin":
        torch.save(renamed, flat / "diffusion_pytorch_model.bin")
    else:
        save_file(renamed, flat / "diffusion_pytorch_model.safetensors")
    assert torch.equal(DDPM.from_pretrained(flat).sample(2), DDPM.from_pretrained(small_model).sample(2))


def test_save_pretrained_survives_a_round_trip(small_model, tmp_path):
    model = DDPM.from_pretrained(small_model, precision="fp32")
    model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")  # also over an existing model
    assert torch.equal(DDPM.from_pretrained(tmp_path / "copy", precision="fp32").sample(1), model.sample(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_save_pretrained_loses_nothing(small_model, tmp_path):
    """It keeps float32 weights even if the network runs in bf16, and does not delete other files."""
    DDPM.from_pretrained(small_model, precision="bf16").save_pretrained(tmp_path / "copy")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "copy" / weights).read_bytes() == (small_model / weights).read_bytes()
    (tmp_path / "copy" / "thesis.txt").touch()
    with pytest.raises(ModelError, match="not just a model"):
        DDPM.from_pretrained(small_model).save_pretrained(tmp_path / "copy")


def test_errors_of_a_model_are_named(small_model, tmp_path):
    import shutil

    def broken(change) -> str:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(small_model, folder)
        change(folder)
        with pytest.raises(ModelError) as caught:
            DDPM.from_pretrained(folder)
        return caught.value.message

    weights = "unet/diffusion_pytorch_model.safetensors"

    def edit(file, **values):
        return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))

    def drop_parameter(folder):
        tensors = load_file(folder / weights)
        del tensors["conv_in.bias"]
        save_file(tensors, folder / weights)

    assert "conv_in.bias" in broken(drop_parameter)
    assert weights in broken(lambda folder: (folder / weights).write_bytes(b"12345678"))
    assert "scheduler_config.json: missing" in broken(
        lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink()
    )
    assert "unet/config.json: sample_size" in broken(lambda folder: (folder / "unet/config.json").write_text("{}"))
    assert "unet/config.json: cannot be read" in broken(lambda folder: (folder / "unet/config.json").write_text("{"))
    assert "act_fn='gelu'" in broken(edit("unet/config.json", act_fn="gelu"))
    assert "'surprise'" in broken(edit("unet/config.json", surprise=1))
    assert "'flow_prediction'" in broken(edit("scheduler/scheduler_config.json", prediction_type="flow_prediction"))
    assert "does not fit a U-Net" in broken(edit("scheduler/scheduler_config.json", variance_type="learned_range"))
    assert "conv_in.weight is" in broken(edit("unet/config.json", in_channels=3, out_channels=3))


# --- one image, one seed ---


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(tmp_path, sampler):
    """Image i of seed s is the same bytes at batch size 1, 3 and 12: the tiny preset, as `ddpm train` makes it."""
    folder = write_model(tmp_path / "tiny", PRESETS["tiny"].unet(28, 1), ScheduleConfig())
    model = DDPM.from_pretrained(folder)
    settings = {"eta": 0.5} if sampler == "ddim" else {"updates": 1} if sampler == "langevin" else {}

    def sample(n, seed=11, batch_size=64):
        return model.sample(n, seed, 3, batch_size, sampler, **settings)

    sampled = {size: sample(12 if size == 12 else 7, batch_size=size) for size in (1, 3, 12)}
    assert torch.equal(sampled[1], sampled[12][:7])
    assert torch.equal(sampled[3], sampled[12][:7])
    assert len({image.numpy().tobytes() for image in sampled[12]}) == 12
    assert not torch.equal(sample(1, seed=12), sampled[1][:1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 28), (3, 32)])
def test_a_prediction_is_the_same_bits_in_every_batch(tmp_path, precision, shape):
    folder = write_model(tmp_path / "tiny", PRESETS["tiny"].unet(shape[1], shape[0]), ScheduleConfig())
    model = DDPM.from_pretrained(folder, precision=precision)
    x_t, t = draw(19, *model.shape), torch.arange(19)
    with torch.inference_mode():
        # A t for one image is one for all, which is computed once.
        for many, sizes in ((torch.tensor([500]), (1, 3, 7, 18)), (t, (3, 7, 18))):
            whole = model.denoiser.network(x_t, many)
            for size in sizes:
                found = model.denoiser.network(x_t[:size], many[:size])
                assert torch.equal(found, whole[:size]), (size, len(many))


def test_noise_is_a_function_of_seed_image_and_use():
    one = ImageNoise(3, [5], (1, 4, 4))
    many = ImageNoise(3, range(10), (1, 4, 4))
    for _ in range(3):
        assert torch.equal(one()[0], many()[5])
    assert not torch.equal(ImageNoise(3, [6], (1, 4, 4))(), ImageNoise(4, [5], (1, 4, 4))())
    assert not torch.equal(ImageNoise(3, [5], (1, 4, 4), "forward")(), ImageNoise(3, [5], (1, 4, 4))())


def test_steps_and_start(small_model):
    model = DDPM.from_pretrained(small_model)
    x = draw(1, 1, 8, 8)
    assert [step.t for step in model.sample_loop(x)] == [*range(19, -1, -1), -1]
    assert [step.t for step in model.sample_loop(x, "ddpm", steps=4)] == [19, 14, 9, 4, -1]
    assert [step.t for step in model.sample_loop(x, steps=4, spacing="quadratic")] == [19, 10, 4, 0, -1]
    assert [step.t for step in model.sample_loop(x, steps=2, start=5)] == [5, 1, -1]
    with pytest.raises(ValueError, match="between 1 and 20"):
        model.sample_loop(x, steps=21)


def test_fewer_steps_use_the_small_variance(tmp_path):
    """All steps use the variance of the model."""
    folders = [
        write_model(tmp_path / kind, SMALL, ScheduleConfig(20, variance_type=kind))
        for kind in ("fixed_small", "fixed_large")
    ]
    small, large = (DDPM.from_pretrained(folder, precision="fp32") for folder in folders)
    assert torch.equal(small.sample(1, steps=5, sampler="ddpm"), large.sample(1, steps=5, sampler="ddpm"))
    assert not torch.equal(small.sample(1, sampler="ddpm"), large.sample(1, sampler="ddpm"))


def test_devices_and_precisions_are_checked(small_model):
    for device in ("tpu", "cuda:99", "meta"):
        with pytest.raises(UsageError, match=device):
            DDPM.from_pretrained(small_model, device=device)
    with pytest.raises(UsageError, match="fp8"):
        DDPM.from_pretrained(small_model, precision="fp8")


# --- what is on disk is whole ---


def test_only_checkpoints_have_raw_weights(small_model):
    with pytest.raises(ModelError, match="no raw weights"):
        DDPM.from_pretrained(small_model, weights="raw")


def test_other_folders_are_not_replaced(small_model, tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    model = DDPM.from_pretrained(small_model)
    with pytest.raises(ModelError, match="not just a model"):
        model.save_pretrained(tmp_path / "notes")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="the folder you are in"):
        model.save_pretrained(".")
