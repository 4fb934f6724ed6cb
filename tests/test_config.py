"""Settings from files: every key, type and range is checked, and an error names the key."""

import json
from dataclasses import replace

import pytest

from conftest import SMALL
from ddpm_cli.config import DataConfig, RunConfig, ScheduleConfig, TrainConfig, UNetConfig
from ddpm_cli.errors import ModelError
from ddpm_cli.names import WITHOUT_VARIANCE

RUN = RunConfig(
    version="1",
    preset="tiny",
    data=DataConfig(images="digits.zip", size=8, channels=1),
    train=TrainConfig(steps=4, batch_size=4, lr=1e-3),
    unet=SMALL,
    schedule=ScheduleConfig(),
)
DEEP = json.loads("[" * 900 + "]" * 900)


def refusal(config, **values) -> str:
    with pytest.raises(ModelError) as caught:
        type(config).from_dict(config.to_dict() | values)
    return caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, attention_head_dim=4),
        replace(SMALL, attention_head_dim=(4, 4, 8)),
        ScheduleConfig(2, trained_betas=(0.1, 0.2)),
        RUN,
        replace(RUN, base="org/name@1", train=replace(RUN.train, keep_every=5)),
    ],
)
def test_settings_survive_a_round_trip(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("size", [0, -8, 1_000_000, 8.5, "8", None, True, [8], float("nan"), float("inf")]),
        ("channels", [0, 2, 4, "RGB"]),
        ("fit", ["x", 1, None]),
        ("background", ["", "no colour", "\x1b[31m", 5]),
        ("flip", ["yes", 1, None]),
        ("holdout", [-0.1, 1, 1.5, "0.1", None, True, float("nan"), float("inf")]),
        ("images", [5, None]),
    ],
)
def test_data(key, values):
    for value in values:
        assert f"data: {key}=" in refusal(RUN, data=RUN.data.to_dict() | {key: value})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("steps", [0, -1, 1.5, "x", None, 1e300, 10**400]),
        ("batch_size", [0, 1.5, None]),
        ("lr", [0, -1, float("nan"), float("inf"), "fast", None, 10**400]),
        ("accumulate", [0, -1]),
        ("lr_warmup", [-1]),
        ("ema_decay", [5, -0.1, float("nan")]),
        ("grad_clip", [0, -1, float("nan"), float("inf")]),
        ("seed", [-1, 0.5, float("inf")]),
        ("save_every", [0]),
        ("sample_every", [0]),
        ("log_every", [0]),
        ("keep", [0, -1]),
        ("keep_every", [0, "x"]),
    ],
)
def test_training(key, values):
    for value in values:
        assert f"train: {key}=" in refusal(RUN, train=RUN.train.to_dict() | {key: value})


def test_runs():
    assert "data: size=16: the network" in refusal(RUN, data=RUN.data.to_dict() | {"size": 16})
    assert "data: channels=3: the network" in refusal(RUN, data=RUN.data.to_dict() | {"channels": 3})
    assert "variance_type='learned'" in refusal(RUN, schedule={"variance_type": "learned"})
    assert "train: must be" not in refusal(RUN, train=[])
    assert "train=[]: must be an object" in refusal(RUN, train=[])
    assert "train: setting 'lr' is missing" in refusal(RUN, train={"steps": 1, "batch_size": 1})
    assert "train: unknown setting 'speed'" in refusal(RUN, train=RUN.train.to_dict() | {"speed": 1})
    assert "version=None: must be text" in refusal(RUN, version=None)
    assert "base=1: must be text or null" in refusal(RUN, base=1)
    assert RunConfig.from_dict(RUN.to_dict() | {"data": RUN.data.to_dict() | {"size": 8.0}}) == RUN


@pytest.mark.parametrize("loss", WITHOUT_VARIANCE)
def test_a_loss_that_would_not_train_the_variance_is_refused(loss):
    learned = {"schedule": {"variance_type": "learned_range"}, "unet": replace(SMALL, out_channels=2).to_dict()}
    message = refusal(RUN, **learned, train=RUN.train.to_dict() | {"loss": loss})
    assert f"train: loss='{loss}': does not fit variance_type='learned_range'" in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_train_timesteps": "10"}, "num_train_timesteps='10'"),
        ({"num_train_timesteps": -1}, "num_train_timesteps=-1"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000"),
        ({"beta_start": "0.1"}, "beta_start='0.1'"),
        ({"beta_start": -0.1}, "beta_start=-0.1"),
        ({"beta_end": float("nan")}, "beta_end=nan"),
        ({"clip_sample": 1}, "clip_sample=1"),
        ({"clip_sample_range": 0}, "clip_sample_range=0"),
        ({"sample_max_value": float("inf")}, "sample_max_value=inf"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas='x'"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000 steps"),
        ({"variance_type": "huge"}, "variance_type='huge': must be fixed_small, "),
        ({"beta_schedule": DEEP}, "beta_schedule=[[["),
        ({"variance_type": ["fixed_small"]}, "variance_type=['fixed_small']"),
        ({"_class_name": ["DDIMScheduler"]}, "its scheduler is a ['DDIMScheduler']"),
    ],
)
def test_schedules(values, expected):
    with pytest.raises(ModelError) as caught:
        ScheduleConfig.from_dict(values)
    assert expected in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("freq_shift", None),
        ("freq_shift", 7),
        ("mid_block_scale_factor", "2"),
        ("mid_block_scale_factor", 0),
        ("layers_per_block", 0),
        ("layers_per_block", 10**9),
        ("dropout", "a"),
        ("dropout", 2),
        ("sample_size", 0),
        ("sample_size", 10),  # two levels halve it to 5 and 2.5
        ("sample_size", 10**6),
        ("block_out_channels", [4, 8, 10**6]),
        ("block_out_channels", []),
        ("block_out_channels", [2, 8, 8]),
        ("attention_head_dim", -1),
        ("attention_head_dim", 16),
        ("attention_head_dim", [4]),
        ("norm_num_groups", 0),
        ("norm_num_groups", 3),
        ("attn_norm_num_groups", 3),
        ("downsample_padding", 5),
        ("time_embedding_dim", 0),
        ("time_embedding_type", "x"),
        ("in_channels", 2),
        ("in_channels", DEEP),
        ("down_block_types", 1),
        ("up_block_types", None),
        ("up_block_types", [1, 2, 3]),
        ("sample_size", []),
        ("sample_size", [[8], [8]]),
        ("sample_size", [8, 16]),
        ("_class_name", ["UNet2DModel"]),
        ("norm_eps", -1),
    ],
)
def test_networks(key, value):
    message = refusal(SMALL, **{key: value})
    expected = ("channels", "groups", "block type", "its network")
    assert key in message or any(words in message for words in expected), message


def test_numbers_may_be_written_in_other_ways():
    """Other programs write 50.0 for 50, and 1 for 1.0."""
    assert ScheduleConfig.from_dict({"num_train_timesteps": 50.0}).num_train_timesteps == 50
    assert UNetConfig.from_dict(SMALL.to_dict() | {"mid_block_scale_factor": 1}) == SMALL
