"""Every sampler on every kind of model."""

from dataclasses import replace

import pytest
import torch

from conftest import SMALL, write_model
from ddpm_cli import DDPM
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.samplers import SAMPLERS
from ddpm_cli.rng import ImageNoise

KINDS = {
    "eps": ScheduleConfig(20),
    "x_0": ScheduleConfig(20, prediction_type="sample"),
    "v": ScheduleConfig(20, prediction_type="v_prediction"),
    "large variance": ScheduleConfig(20, variance_type="fixed_large"),
    "learned variance": ScheduleConfig(20, variance_type="learned"),
    "learned logarithm": ScheduleConfig(20, variance_type="learned_log"),
    "the mean": ScheduleConfig(20, prediction_type="mean"),
    "learned range": ScheduleConfig(20, variance_type="learned_range"),
    "cosine": ScheduleConfig(30, beta_schedule="squaredcos_cap_v2"),
    "trained betas": ScheduleConfig(5, trained_betas=(1e-5, 0.4, 0.01, 0.9, 0.5)),
    "one step": ScheduleConfig(1, beta_start=0.5, beta_end=0.5),
    "many steps": ScheduleConfig(2000),
    "no clipping": ScheduleConfig(20, clip_sample=False),
    "thresholding": ScheduleConfig(20, thresholding=True, sample_max_value=2.0),
}


@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "RGB"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_draws_from_every_model(tmp_path, kind, channels):
    schedule = KINDS[kind]
    out = channels * (2 if schedule.learns_variance else 1)
    folder = write_model(tmp_path / "model", replace(SMALL, in_channels=channels, out_channels=out), schedule)
    model = DDPM.from_pretrained(folder, precision="fp32")
    start = ImageNoise(0, range(2), model.shape)()
    for sampler in SAMPLERS:
        steps = min(4, schedule.num_train_timesteps)
        *path, last = model.sample_loop(start, sampler, steps)
        assert [step.t for step in path] == sorted((step.t for step in path), reverse=True)
        assert len(path) == model.sampling(sampler, steps).evaluations
        assert all(step.x_t.shape == step.x_0.shape == start.shape for step in path)
        assert last.t == -1
        assert last.x_t.isfinite().all()
        if kind != "no clipping":
            assert last.x_t.abs().max() <= 1 + 1e-6
        assert not torch.equal(last.x_t[0], last.x_t[1])


def test_the_fingerprint_does_not_depend_on_the_memory_format(tmp_path):
    """A model that was not loaded from files has the weights of its network, which on CUDA are in channels_last."""
    model = DDPM.from_pretrained(write_model(tmp_path / "model", SMALL, ScheduleConfig(20)), "cpu", "fp32")
    placed = DDPM(model.unet.to(memory_format=torch.channels_last), model.schedule_config)
    assert placed.fingerprint() == model.fingerprint()


def test_a_compiled_network_sees_one_batch_size(tmp_path, monkeypatch):
    """Each size would be compiled anew. Here the network is not really compiled, so the images are the same."""
    folder = write_model(tmp_path / "model", SMALL, ScheduleConfig(20))
    plain, compiled = (DDPM.from_pretrained(folder, "cpu", "fp32") for _ in range(2))
    monkeypatch.setattr(compiled.unet, "compile", lambda **options: None)
    compiled.compile()
    sizes = []
    compiled.unet.conv_in.register_forward_hook(lambda layer, inputs, output: sizes.append(len(inputs[0])))
    drawn = compiled.sample(7, steps=4, batch_size=4)
    assert set(sizes) == {4}
    assert torch.equal(drawn, plain.sample(7, steps=4, batch_size=4))
    t = torch.tensor([3, 1, 2])  # of each image
    x_t = torch.rand(3, 1, 8, 8)
    assert torch.equal(compiled.denoiser(x_t, t).output, plain.denoiser(x_t, t).output)
    assert set(sizes) == {4}


@pytest.mark.long
def test_a_compiled_network_draws_the_same(tmp_path):
    folder = write_model(tmp_path / "model", SMALL, ScheduleConfig(20))
    plain, compiled = (DDPM.from_pretrained(folder, "cpu", "fp32") for _ in range(2))
    compiled.compile()
    difference = compiled.sample(7, batch_size=4).int() - plain.sample(7, batch_size=4).int()
    assert difference.abs().max() <= 1  # rounding
