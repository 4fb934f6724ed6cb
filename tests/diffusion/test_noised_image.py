"""Noised images as files: what is written is read again, and anything else is refused with the reason."""

import json

import pytest
import torch
from safetensors.torch import save

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.noised_image import Noised
from ddpm_cli.errors import DataError

ABOUT = {"t": 10, "seed": 0, "schedule": ScheduleConfig().to_dict()}


def packed(x_t=None, **changes) -> bytes:
    x_t = torch.zeros(1, 1, 8, 8) if x_t is None else x_t
    return save({"x_t": x_t}, metadata={"ddpm": json.dumps(ABOUT | changes)})


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_again(channels):
    noised = Noised(torch.randn(1, channels, 5, 7), 300, 4, ScheduleConfig(beta_end=0.03))
    again = Noised.from_bytes(noised.to_bytes(), "a.safetensors")
    assert torch.equal(again.x_t, noised.x_t)
    assert (again.t, again.seed, again.schedule) == (300, 4, noised.schedule)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 4, 8, 8), (1, 0, 8, 8), (1, 1, 0, 8), (2, 1, 8, 8), (8, 8)])
def test_a_tensor_that_is_no_image_is_refused(shape):
    with pytest.raises(DataError, match=r"^a\.safetensors: .*x_t is torch.float32 \("):
        Noised.from_bytes(packed(torch.zeros(shape)), "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_must_be_finite(value):
    x_t = torch.zeros(1, 1, 8, 8)
    x_t[0, 0, 3, 3] = value
    with pytest.raises(DataError, match=r"^a\.safetensors: .*x_t has values that are not finite"):
        Noised.from_bytes(packed(x_t), "a.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t": "10"}, "t='10': must be a whole number"),
        ({"t": 10.9}, r"t=10\.9: must be a whole number"),
        ({"t": True}, "t=True: must be a whole number"),
        ({"t": -1}, "t=-1: must be 0 or more"),
        ({"t": 1001}, "t=1001: must be between 0 and 1000"),
        ({"seed": None}, "seed=None: must be a whole number"),
        ({"schedule": []}, r"schedule=\[\]: must be an object"),
        ({"schedule": {"beta_end": "x"}}, "schedule: beta_end='x': must be a number"),
        ({"schedule": {"beta_start": 1.0}}, "betas must be"),
        ({"colour": "red"}, "unknown setting 'colour'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(changes, words):
    with pytest.raises(DataError, match=rf"^a\.safetensors: .*{words}"):
        Noised.from_bytes(packed(**changes), "a.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"ddpm": "[]"}, {"ddpm": "{}"}, {"ddpm": "[" * 100_000}])
def test_another_safetensors_file_is_refused(metadata):
    with pytest.raises(DataError, match=r"^a\.safetensors: not a noised image"):
        Noised.from_bytes(save({"x_t": torch.zeros(1, 1, 8, 8)}, metadata=metadata), "a.safetensors")


def test_a_file_without_x_t_is_refused():
    with pytest.raises(DataError, match="no tensor x_t"):
        Noised.from_bytes(save({"x": torch.zeros(1)}, metadata={"ddpm": json.dumps(ABOUT)}), "a.safetensors")
