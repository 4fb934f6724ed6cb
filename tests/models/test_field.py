"""Diffusers pipelines: each kind of model on the Hub, written by diffusers with random weights, and read by ddpm.

The network output is the same, and with the same noise so are the images of each step.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from conftest import SMALL as TINY
from conftest import randomize, write_model
from ddpm_cli import DDPM
from ddpm_cli.config import ScheduleConfig, UNetConfig
from ddpm_cli.errors import ModelError

WEIGHTS = "diffusion_pytorch_model"


def blocks(kinds: str, way: str) -> tuple[str, ...]:
    """DDA -> plain, plain and attention blocks; R means residual resampling."""
    resample = {"Down": "ResnetDownsampleBlock2D", "Up": "ResnetUpsampleBlock2D"}[way]
    return tuple({"D": f"{way}Block2D", "A": f"Attn{way}Block2D", "R": resample}[kind] for kind in kinds)


def unet(size: int, channels: tuple[int, ...], kinds: str, **settings) -> dict:
    down, up = blocks(kinds, "Down"), blocks(kinds[::-1], "Up")
    return {
        "sample_size": size,
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
    } | settings


# google/ddpm-*: a port of the authors' weights.
GOOGLE = {
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
COURSE = unet(32, (64, 128, 128, 256), "DDAA")
SMALL = {"norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
LEARNED = {"variance_type": "learned_range"}


@dataclass(frozen=True)
class Model:
    unet: dict
    scheduler: dict = field(default_factory=dict)
    layout: str = "nested"  # or in one folder
    steps: int = 10  # the number of sampler steps that are compared, from the first
    batch: int = 2


# Large models get smaller images, and the largest half the channels, to save time. test_unet.py has a whole one.
MODELS = {
    "google/ddpm-cifar10-32": Model(
        unet(16, (128, 256, 256, 256), "DADD", **GOOGLE), {"variance_type": "fixed_large"}, "flat", steps=1
    ),
    "google/ddpm-celebahq-256": Model(
        unet(64, (64, 64, 128, 128, 256, 256), "DDDDAD", **GOOGLE), layout="flat", steps=1, batch=1
    ),
    "anton-l/ddpm-butterflies-128": Model(unet(64, (64, 64, 128, 128, 256, 256), "DDDDAD"), steps=1, batch=1),
    "sd-class-butterflies-32": Model(COURSE, layout="flat", steps=3),
    "squaredcos": Model(unet(16, (8, 16), "DA", **SMALL), {"beta_schedule": "squaredcos_cap_v2"}),
    "scaled_linear": Model(unet(16, (8, 16), "DA", **SMALL), {"beta_schedule": "scaled_linear"}),
    "sigmoid": Model(unet(16, (8, 16), "DA", **SMALL), {"beta_schedule": "sigmoid"}),
    "trained betas": Model(
        unet(16, (8, 16), "DA", **SMALL),
        {"num_train_timesteps": 20, "trained_betas": [0.01, 0.2, 0.5, 0.1] * 5},
        steps=20,
    ),
    "v_prediction": Model(unet(16, (8, 16), "DA", **SMALL), {"prediction_type": "v_prediction"}),
    "sample": Model(unet(16, (8, 16), "DA", **SMALL), {"prediction_type": "sample"}),
    "T=200": Model(unet(16, (8, 16), "DA", **SMALL), {"num_train_timesteps": 200}),
    "T=2000": Model(unet(16, (8, 16), "DA", **SMALL), {"num_train_timesteps": 2000}),
    "scale_shift": Model(unet(16, (8, 16), "DA", **SMALL, resnet_time_scale_shift="scale_shift")),
    "scale_shift with a norm": Model(
        unet(16, (8, 16), "DA", **SMALL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4)
    ),
    "residual resampling": Model(unet(16, (8, 16, 16), "RRD", **SMALL)),
    "residual resampling with attention": Model(
        unet(16, (8, 16, 16), "AAA", **SMALL, downsample_type="resnet", upsample_type="resnet")
    ),
    "no attention in the middle": Model(unet(16, (8, 16), "DD", **SMALL, add_attention=False)),
    "heads that leave channels over": Model(unet(16, (12, 20), "AA", **SMALL | {"attention_head_dim": 8})),
    "a table of times": Model(
        unet(16, (8, 16), "DA", **SMALL, time_embedding_type="learned", num_train_timesteps=1000)
    ),
    "a wide time embedding": Model(unet(16, (8, 16), "DA", **SMALL, time_embedding_dim=48)),
    "gray": Model(unet(16, (8, 16), "DA", **SMALL, in_channels=1, out_channels=1)),
    "learned_range": Model(unet(16, (8, 16), "DA", **SMALL, out_channels=6), LEARNED),
    "learned_range of x_0": Model(
        unet(16, (8, 16), "DA", **SMALL, out_channels=6), LEARNED | {"prediction_type": "sample"}
    ),
    "fixed_small_log": Model(unet(16, (8, 16), "DA", **SMALL), {"variance_type": "fixed_small_log"}),
    "no clipping": Model(unet(16, (8, 16), "DA", **SMALL), {"clip_sample": False}),
    "a wider range": Model(unet(16, (8, 16), "DA", **SMALL), {"clip_sample_range": 2.5}),
    "thresholding": Model(unet(16, (8, 16), "DA", **SMALL), {"thresholding": True, "sample_max_value": 1.7}),
}


def written_by_diffusers(model: Model, folder: Path) -> DDPMPipeline:
    network = UNet2DModel(**model.unet).eval()
    randomize(network)
    pipeline = DDPMPipeline(network, DDPMScheduler(**model.scheduler))
    if model.layout == "flat":
        network.save_pretrained(folder)
        pipeline.scheduler.save_pretrained(folder)
    else:
        pipeline.save_pretrained(folder)
    return pipeline


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def noise_of(t: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What diffusers draws at step t from a generator of that seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_diffusers(name, tmp_path):
    """Every step starts from our state, so that errors of earlier steps do not matter."""
    model = MODELS[name]
    theirs = written_by_diffusers(model, tmp_path)
    ours = DDPM.from_pretrained(tmp_path, device="cpu", precision="fp32")
    T = ours.schedule.T
    assert theirs.scheduler.config.num_train_timesteps == T
    theirs.scheduler.set_timesteps(T)
    x_T = noise_of(T, (model.batch, *ours.shape))
    ts = iter(range(T - 1, 0, -1))
    states = ours.sample_loop(x_T, "ddpm", noise=lambda: noise_of(next(ts), x_T.shape))
    step = next(states)
    for t in range(T - 1, T - 1 - min(model.steps, T), -1):
        assert step.t == t
        with torch.no_grad():
            output, expected = ours.unet(step.x_t, torch.tensor([t])), theirs.unet(step.x_t, t).sample
        assert expected.std() > 0.1  # the weights are large enough to show a difference
        assert ((output - expected).norm() / expected.norm()).item() < 1e-5
        after = theirs.scheduler.step(expected, t, step.x_t, generator=torch.Generator().manual_seed(t))
        close(step.x_0, after.pred_original_sample)
        step = next(states)
        close(step.x_t, after.prev_sample)
    assert model.steps < T or step.t == -1


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as their float32 schedule is to the float64 one: 1 - abar_0 differs by 1.7e-4."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


# --- layouts and names ---


@pytest.fixture
def course(tmp_path) -> Path:
    """A small nested pipeline with attention and resampling of both kinds."""
    folder = tmp_path / "course"
    written_by_diffusers(MODELS["squaredcos"], folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / f"{WEIGHTS}.safetensors")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flat(folder: Path) -> Path:
    """The same model with everything in one folder."""
    for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
        path.rename(folder / path.name)
    return folder


def sample(address: Path) -> torch.Tensor:
    return DDPM.from_pretrained(address, device="cpu", precision="fp32").sample(2, steps=3, sampler="ddpm")


def sharded(folder: Path, suffix: str = "safetensors", write=save_file) -> Path:
    tensors = tensors_of(folder)
    names = sorted(tensors)
    shards = [f"{WEIGHTS}-{i:05d}-of-00003.{suffix}" for i in (1, 2, 3)]
    for i, shard in enumerate(shards):
        write({name: tensors[name] for name in names[i::3]}, folder / "unet" / shard)
    index = {"metadata": {}, "weight_map": {name: shards[i % 3] for i, name in enumerate(names)}}
    (folder / "unet" / f"{WEIGHTS}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "unet" / f"{WEIGHTS}.safetensors").unlink()
    return folder


def pickled(folder: Path) -> Path:
    torch.save(tensors_of(folder), folder / "unet" / f"{WEIGHTS}.bin")
    (folder / "unet" / f"{WEIGHTS}.safetensors").unlink()
    return folder


def renamed(folder: Path) -> Path:
    """The names of the first releases, in the weights and in both configurations."""
    layers = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    parts = {"mid_block": "mid", "down_blocks": "downsample_blocks", "up_blocks": "upsample_blocks"}
    found = {}
    for name, value in tensors_of(folder).items():
        part, _, rest = name.partition(".")
        for new, old in layers.items():
            rest = rest.replace(f".{new}.", f".{old}.")
        if part == "down_blocks" and "downsamplers" in rest:
            found[f"{parts[part]}.{rest.replace('.conv.', '.op.')}"] = value.clone()
        found[f"{parts.get(part, part)}.{rest}"] = value
    save_file(found, folder / "unet" / f"{WEIGHTS}.safetensors")
    config = json.loads((folder / "unet" / "config.json").read_text())
    keys = {
        "sample_size": "image_size",
        "layers_per_block": "num_res_blocks",
        "block_out_channels": "block_channels",
        "down_block_types": "down_blocks",
        "up_block_types": "up_blocks",
        "freq_shift": "downscale_freq_shift",
        "norm_num_groups": "resnet_num_groups",
        "act_fn": "resnet_act_fn",
        "norm_eps": "resnet_eps",
        "attention_head_dim": "num_head_channels",
    }
    old = {keys.get(key, key): value for key, value in config.items()}
    old["down_blocks"] = [f"UNetRes{kind}" for kind in old["down_blocks"]]
    old["up_blocks"] = [f"UNetRes{kind}" for kind in old["up_blocks"]]
    for key in ("add_attention", "dropout", "num_train_timesteps", "mid_block_type", "attn_norm_num_groups"):
        del old[key]  # newer than these files
    (folder / "unet" / "config.json").write_text(json.dumps(old | {"_class_name": "UNetUnconditionalModel"}))
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text())
    scheduler["timesteps"] = scheduler.pop("num_train_timesteps")
    path.write_text(json.dumps(scheduler | {"timestep_values": None, "tensor_format": "pt"}))
    return folder


def without_class_name(folder: Path) -> Path:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("_")} | {"sample_size": [16, 16]}))
    return folder


def ddim(folder: Path) -> Path:
    """An index and a scheduler of another sampler."""
    DDIMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", _class_name="DDIMPipeline", scheduler=["diffusers", "DDIMScheduler"])
    return folder


def averaged(folder: Path) -> Path:
    """As EMAModel.save_pretrained writes it."""
    edit(folder / "unet" / "config.json", decay=0.9999, inv_gamma=1.0, power=0.75, optimization_step=100)
    edit(folder / "unet" / "config.json", min_decay=0.0, update_after_step=0, use_ema_warmup=True)
    return folder


def solver(folder: Path) -> Path:
    DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "scheduler")
    return folder


LAYOUTS = {
    "flat": flat,
    "the unet folder": lambda folder: folder / "unet",
    "a file": lambda folder: folder / "unet" / f"{WEIGHTS}.safetensors",
    "a file in a flat folder": lambda folder: flat(folder) / f"{WEIGHTS}.safetensors",
    "a file of another name": lambda folder: (folder / "unet" / f"{WEIGHTS}.safetensors").rename(
        folder / "unet" / "mine.safetensors"
    ),
    "sharded": sharded,
    "sharded pickles": lambda folder: sharded(folder, "bin", torch.save),
    "a pickle": pickled,
    "old names": renamed,
    "flat old names": lambda folder: flat(renamed(folder)),
    "no class name": without_class_name,
    "DDIM": ddim,
    "averaged by diffusers": averaged,
    "DPM-Solver": solver,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(course, layout):
    before = sample(course)
    assert torch.equal(sample(LAYOUTS[layout](course)), before)


def test_half_precision_weights_are_read_if_there_are_no_others(course):
    single = course / "unet" / f"{WEIGHTS}.safetensors"
    half = {name: value.half() for name, value in tensors_of(course).items()}
    save_file(half, single.with_suffix(".fp16.safetensors"))
    before = sample(course)
    save_file({name: value.float() for name, value in half.items()}, single)
    rounded = sample(course)
    assert not torch.equal(before, rounded)
    single.unlink()
    assert torch.equal(sample(course), rounded)


def test_predict_epsilon_false_means_x_0():
    assert ScheduleConfig.from_dict({"predict_epsilon": False}).prediction_type == "sample"
    assert ScheduleConfig.from_dict({"predict_epsilon": True}).prediction_type == "epsilon"
    later = {"predict_epsilon": False, "prediction_type": "epsilon"}  # a key that newer versions kept
    assert ScheduleConfig.from_dict(later).prediction_type == "epsilon"


# --- what is refused, and why ---


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        DDPM.from_pretrained(folder)
    return f"{caught.value.message} / {caught.value.hint}"


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class-conditional"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "generates images from text"),
        ("unet/config.json", {"_class_name": "Transformer2DModel"}, "not a UNet2DModel"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "score-based SDE"),
        ("unet/config.json", {"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"]}, "score-based SDE"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "from text"),
        ("unet/config.json", {"in_channels": 4, "out_channels": 4}, "in_channels=4"),
        ("unet/config.json", {"out_channels": 9}, "from 3 to 9 channels"),
        ("unet/config.json", {"out_channels": 6}, "needs twice the channels"),
        ("unet/config.json", {"sample_size": [16, 32]}, "sample_size=[16, 32]"),
        ("unet/config.json", {"mid_block_type": None}, "mid_block_type=None"),
        ("unet/config.json", {"attention_head_dim": 64}, "heads of 64 channels"),
        ("unet/config.json", {"time_embedding_type": "learned", "num_train_timesteps": 500}, "has 500 steps"),
        ("scheduler/scheduler_config.json", {"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}, "needs twice the channels"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000 steps"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "exp"}, "beta_schedule='exp'"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "generates latents"),
        ("model_index.json", {"text_encoder": ["transformers", "CLIPTextModel"]}, "from text"),
    ],
)
def test_other_models_are_refused_with_the_reason(course, file, values, expected):
    edit(course / file, **values)
    assert expected in refusal(course)
    assert file.split("/")[-1] in refusal(course) or str(course) in refusal(course)


def test_a_pipeline_without_an_optional_part_is_read(course):
    edit(course / "model_index.json", vae=[None, None])
    sample(course)


def test_parameters_that_do_not_fit_are_named(course):
    weights = course / "unet" / f"{WEIGHTS}.safetensors"
    tensors = tensors_of(course)
    lacking = {name: value for name, value in tensors.items() if not name.startswith("mid_block.resnets")}
    save_file(lacking, weights)
    assert "lacks 20 of the U-Net's" in refusal(course)
    first = (
        "mid_block.resnets.0.conv1.bias, mid_block.resnets.0.conv1.weight, mid_block.resnets.0.conv2.bias and 17 more"
    )
    assert first in refusal(course)
    save_file(tensors | {"extra.weight": torch.zeros(1), "class_embedding.weight": torch.zeros(1)}, weights)
    assert "has 2 parameters that the U-Net does not have: class_embedding.weight, extra.weight" in refusal(course)
    save_file(tensors | {"conv_in.weight": torch.zeros(8, 3, 1, 9)}, weights)  # as many numbers, in another shape
    assert "conv_in.weight is (8, 3, 1, 9), not (8, 3, 3, 3)" in refusal(course)


def test_a_missing_shard_is_named(course):
    sharded(course)
    (course / "unet" / f"{WEIGHTS}-00002-of-00003.safetensors").unlink()
    assert "lacks shard 2 of 3" in refusal(course)


class Evil:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


@pytest.mark.parametrize("content", [{"conv_in.weight": Evil()}, Evil(), [1, 2], {"a": "text"}, UNetConfig()])
def test_a_pickle_of_more_than_tensors_is_refused(course, content):
    pickled(course)
    torch.save(content, course / "unet" / f"{WEIGHTS}.bin")
    assert f"{WEIGHTS}.bin: holds" in refusal(course)
    assert not Path("owned").exists()


def test_a_cut_pickle_is_damaged(course):
    pickled(course)
    path = course / "unet" / f"{WEIGHTS}.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{WEIGHTS}.bin: cannot be read" in refusal(course)


def test_a_folder_without_a_model_lists_its_files(tmp_path):
    assert "holds no model" in refusal(tmp_path)
    (tmp_path / "holiday.jpg").touch()
    assert "holds no model: no config.json among holiday.jpg" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights next to config.json" in refusal(tmp_path)


def test_weights_that_are_not_finite_are_refused(course):
    tensors = tensors_of(course)
    for value in (float("nan"), float("inf")):
        tensors["conv_in.bias"][3] = value
        save_file(tensors, course / "unet" / f"{WEIGHTS}.safetensors")
        assert "conv_in.bias hold values that are not finite" in refusal(course)


def test_other_things_instead_of_weights_are_named(course, tmp_path):
    weights = course / "unet" / f"{WEIGHTS}.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    message = refusal(course)
    assert "a pointer of Git LFS" in message
    assert "git lfs pull" in message
    edit(course / "scheduler" / "scheduler_config.json", beta_schedule="linear", beta_end=2.0)
    assert "scheduler_config.json: beta_end=2.0: must be between 0 and 1" in refusal(course)


def test_one_shard_means_all(course):
    before = sample(course)
    sharded(course)
    assert torch.equal(sample(course / "unet" / f"{WEIGHTS}-00002-of-00003.safetensors"), before)


OURS = {
    "mean": ScheduleConfig(20, prediction_type="mean"),
    "learned_log": ScheduleConfig(20, variance_type="learned_log"),
    "both": ScheduleConfig(20, prediction_type="mean", variance_type="learned_log"),
}


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "RGB"])
@pytest.mark.parametrize("kind", OURS)
def test_diffusers_refuses_what_it_does_not_have(tmp_path, kind, channels):
    """Its pipeline does not load the model, and its scheduler alone does not sample it: no other images come out."""
    schedule = OURS[kind]
    config = replace(TINY, in_channels=channels, out_channels=channels * (2 if schedule.learns_variance else 1))
    folder = write_model(tmp_path / "model", config, schedule)
    assert DDPM.from_pretrained(folder).schedule_config == schedule
    with pytest.raises(ValueError, match="`ddpm_cli` has no class `NoiseSchedule`"):
        DDPMPipeline.from_pretrained(folder)
    network = UNet2DModel.from_pretrained(folder, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(2)
    x_t = torch.randn(1, channels, 8, 8)

    def loop(x_t):
        for t in scheduler.timesteps:
            x_t = scheduler.step(network(x_t, t).sample, t, x_t).prev_sample

    with pytest.raises((ValueError, RuntimeError), match=r"prediction_type given as mean|channels|match the size"):
        loop(x_t)
    assert "diffusers" not in (folder / "README.md").read_text()
