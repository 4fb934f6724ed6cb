"""`ddpm compress` and `ddpm decompress`: two processes, whole and cut files, damage."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import SMALL, picture, write_model
from ddpm_cli.compression.bits import BitReader, BitWriter
from ddpm_cli.compression.codec import Plan, receive, send
from ddpm_cli.compression.compress import compress, decompress
from ddpm_cli.compression.container import Container
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.data import images
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.errors import DataError
from ddpm_cli.models.ddpm import DDPM


@pytest.fixture(scope="module")
def model(small_model):
    return DDPM.from_pretrained(small_model, "cpu", "fp32")


@pytest.fixture
def digit(digits):
    with Image.open(next(digits.rglob("*.png"))) as image:
        image.resize((8, 8)).save("digit.png")
    return Path("digit.png")


def pixels(path):
    return images.from_pil(picture(path))


def gaussian(variance):
    """The ideal denoiser for independent pixels from N(0, variance): E[x_0 | x_t]."""
    config = ScheduleConfig(prediction_type="sample", clip_sample=False)

    def network(x_t, t):
        abar = float(denoiser.schedule.alphas_cumprod[int(t)])
        return x_t * math.sqrt(abar) * variance / (abar * variance + 1 - abar)

    denoiser = Denoiser.from_config(network, config)
    return denoiser


def test_another_process_decodes_the_image(ddpm, small_model, digit):
    sent = ddpm("compress", digit, "-m", small_model, "--t", 1, "-o", "x.ddpm", "--json")
    assert sent.returncode == 0, sent.stderr
    about = json.loads(sent.stdout)
    assert about["bytes"] == Path("x.ddpm").stat().st_size == about["header_bytes"] + -(-about["bits"] // 8)
    assert (about["t"], about["header_bytes"]) == (1, 20)
    assert about["ideal_bits"] > 0
    received = ddpm("decompress", "x.ddpm", "-m", small_model, "-o", "x.png")
    assert (received.returncode, received.stdout) == (0, b"x.png\n"), received.stderr
    error = (pixels("x.png").double() - pixels(digit).double()).square().mean().sqrt()
    assert float(error) == pytest.approx(about["rmse"], abs=1e-3)  # what the sender said


def test_pipes(ddpm, small_model, digit):
    sent = ddpm("compress", "-", "-m", small_model, stdin=digit.read_bytes())
    assert sent.stdout.startswith(b"ddpm\x01")
    received = ddpm("decompress", "-", "-m", small_model, stdin=sent.stdout)
    assert received.stdout.startswith(b"\x89PNG")


def test_the_receiver_gets_every_state_of_the_sender(model, digit):
    x_0 = images.to_float(pixels(digit))[None]
    plan = Plan(10, 12, 0)
    stream = BitWriter()
    sent = list(send(model.denoiser, x_0, plan, stream))
    received = list(receive(model.denoiser, torch.zeros_like(x_0), plan, BitReader(stream.to_bytes())))
    assert [(s.t, s.bits) for s in sent] == [(s.t, s.bits) for s in received]
    assert all(ours.x_0.equal(theirs.x_0) for ours, theirs in zip(sent, received, strict=True))
    assert [s.t for s in sent] == sorted({s.t for s in sent}, reverse=True)
    assert sent[-1].t == 0


def test_the_ideal_denoiser_reaches_the_rate_and_the_distortion_of_a_gaussian():
    """Rate 1/2 log2(1 + SNR v) and distortion v / (1 + SNR v) per pixel, plus what few steps and blocks cost."""
    variance = 0.25
    denoiser = gaussian(variance)
    x_0 = variance**0.5 * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    stream = BitWriter()
    last = list(send(denoiser, x_0, Plan(12, 40, 29), stream))[-1]
    abar = float(denoiser.schedule.alphas_cumprod[29])
    gain = 1 + variance * abar / (1 - abar)
    rate, distortion = 0.5 * math.log2(gain) * 1024, variance / gain
    assert float((last.x_0 - x_0).square().mean()) == pytest.approx(distortion, rel=0.15)
    assert rate < last.ideal < 1.25 * rate  # a step's KL counts as if x_0 stayed as uncertain as at its start
    assert 1.1 * last.ideal < last.bits < 1.5 * last.ideal


def test_small_differences_between_machines_stay_small():
    """No size in the code depends on the network, so a receiver that rounds differently decodes nearly the same."""
    denoiser = gaussian(0.25)
    other = Denoiser(lambda x, t: denoiser.network(x, t) * (1 + 1e-4), denoiser.schedule, denoiser.config)
    x_0 = 0.5 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plan, stream = Plan(8, 20, 9), BitWriter()
    sent = list(send(denoiser, x_0, plan, stream))
    received = list(receive(other, torch.zeros_like(x_0), plan, BitReader(stream.to_bytes())))
    assert [s.bits for s in sent] == [s.bits for s in received]
    torch.testing.assert_close(received[-1].x_0, sent[-1].x_0, rtol=0, atol=2e-3)


def test_an_image_without_anything_in_it():
    denoiser, plan, stream = gaussian(0.25), Plan(8, 20, 9), BitWriter()
    x_0 = torch.zeros(1, 1, 8, 8)
    sent = list(send(denoiser, x_0, plan, stream))
    received = list(receive(denoiser, x_0, plan, BitReader(stream.to_bytes())))
    assert [(s.t, s.bits) for s in sent] == [(s.t, s.bits) for s in received]
    assert float(sent[-1].x_0.abs().mean()) < 0.1


def test_a_cut_file_is_a_coarser_image_at_every_byte(model, digit):
    whole = compress(model, pixels(digit), t=4, block_bits=6, steps=8)
    length = len(whole.data) - len(Container.from_bytes(whole.data, "x").stream)
    full = list(decompress(model, Container.from_bytes(whole.data, "x"), "x"))
    assert full[-1][1].equal(whole.image)
    for cut in range(len(whole.data)):
        if 8 * (cut - length) < full[0][0].bits:
            with pytest.raises(DataError, match=r"ends within its header|ends before its first step|not made by"):
                list(decompress(model, Container.from_bytes(whole.data[:cut], "x"), "x"))
            continue
        file = Container.from_bytes(whole.data[:cut], "x")
        assert file.missing == len(whole.data) - cut
        begun = list(decompress(model, file, "x"))
        assert all(ours[1].equal(theirs[1]) for ours, theirs in zip(begun, full, strict=False))
        assert begun[-1][0].bits <= 8 * (cut - length)


def test_every_damaged_byte_is_found(model, digit):
    data = compress(model, pixels(digit), t=3).data
    for place in range(len(data)):
        with pytest.raises(DataError, match=r"^x: (is damaged|was not made|has version|ends within its header)"):
            Container.from_bytes(data[:place] + bytes([data[place] ^ 0x21]) + data[place + 1 :], "x")
    with pytest.raises(DataError, match="2 bytes too many"):
        Container.from_bytes(data + b"ab", "x")


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_of_anything_is_an_image_or_an_error(model, seed):
    """Streams whose checksum is right, as an attacker would write them."""
    noise = torch.randint(256, (40,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    for plan in (Plan(1, 5, 0), Plan(12, 20, 19), Plan(8, 20, 20), Plan(8, 10**10, 0)):
        file = Container.from_bytes(Container(model.fingerprint(), plan, bytes(noise.tolist())).to_bytes(), "x")
        with contextlib.suppress(DataError):
            assert list(decompress(model, file, "x"))


def test_sizes_in_a_header_are_bounded(model):
    for plan in (Plan(17, 5, 0), Plan(0, 5, 0), Plan(8, 0, 0)):
        with pytest.raises(DataError, match="damaged"):
            Container.from_bytes(Container(model.fingerprint(), plan, b"").to_bytes(), "x")


def test_another_model_is_refused(cli, small_model, digit, tmp_path):
    other = write_model(tmp_path / "other", replace(SMALL, layers_per_block=2), ScheduleConfig(num_train_timesteps=20))
    assert cli("compress", digit, "-m", small_model, "-o", "x.ddpm")[0] == 0
    code, _, err = cli("decompress", "x.ddpm", "-m", other, "-o", "x.png")
    assert code == 1
    assert "x.ddpm: was made with another model: its fingerprint is" in err
    assert not Path("x.png").exists()


def test_a_newer_version_decodes_the_file(small_model, digit, monkeypatch):
    """What a version writes into the configurations of its models is not in the fingerprint."""
    file = Container.from_bytes(compress(DDPM.from_pretrained(small_model, "cpu", "fp32"), pixels(digit)).data, "x")
    monkeypatch.setattr("ddpm_cli.config.model.DIFFUSERS_VERSION", "1.0.0")
    assert list(decompress(DDPM.from_pretrained(small_model, "cpu", "fp32"), file, "x"))


def test_a_file_has_at_most_the_bytes_that_it_may(cli, small_model, model, digit):
    whole = compress(model, pixels(digit), t=1)
    for most in (25, 40, len(whole.data)):
        assert len(compress(model, pixels(digit), t=1, most_bytes=most).data) <= most
    assert compress(model, pixels(digit), t=1, most_bytes=10**15).data == whole.data
    code, _, err = cli("compress", digit, "-m", small_model, "--bytes", 19, "-o", "x.ddpm")
    assert (code, "--bytes 19: too few" in err) == (1, True)


def test_depths_and_strips(cli, small_model, digit):
    assert cli("compress", digit, "-m", small_model, "-o", "x.ddpm", "--t", 2)[0] == 0
    code, out, _ = cli("decompress", "x.ddpm", "-m", small_model, "--t", 10, "-o", "x.png", "--json")
    found = json.loads(out)
    assert (code, found["t"], found["missing_bytes"]) == (0, 10, 0)
    assert cli("decompress", "x.ddpm", "-m", small_model, "--frames", 4, "-o", "strip.png")[0] == 0
    assert picture("strip.png").size == (4 * 120 + 24, 32 + 120 + 24)
    Path("cut.ddpm").write_bytes(Path("x.ddpm").read_bytes()[:-3])
    code, _, err = cli("decompress", "cut.ddpm", "-m", small_model, "-o", "cut.png")
    assert (code, "cut.ddpm: is cut" in err) == (0, True)


def test_invalid_input_is_refused(cli, small_model, digit):
    assert cli("compress", digit, "-m", small_model, "-o", "good.ddpm")[0] == 0
    Path("x.ddpm").write_bytes(b"nothing")
    for args, expected, names in [
        (("compress", digit, "-m", small_model, "--t", 21, "-o", "a.ddpm"), 2, "--t 21"),
        (("compress", digit, "-m", small_model, "-o", "a.png"), 2, ".ddpm"),
        (("decompress", "good.ddpm", "-m", small_model, "--t", 21, "-o", "a.png"), 2, "--t 21"),
        (("compress", "x.ddpm", "-m", small_model, "-o", "a.ddpm"), 1, "x.ddpm: not an image"),
        (("decompress", "x.ddpm", "-m", small_model, "-o", "a.png"), 1, "x.ddpm: was not made by ddpm compress"),
        (("decompress", "none.ddpm", "-m", small_model, "-o", "a.png"), 1, "no such file"),
    ]:
        code, _, err = cli(*args)
        assert (code, names in err) == (expected, True), err


def test_a_photo_is_fitted_to_the_model(cli, small_model, photo):
    code, _, err = cli("compress", photo, "-m", small_model, "-o", "x.ddpm")
    assert (code, "fitted from 96x64 to the model's 8x8" in err) == (0, True)
