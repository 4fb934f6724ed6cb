"""The bound against closed forms, against a re-derivation on the same weights, and against sums over its own parts."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from conftest import SMALL, picture, randomize
from ddpm_cli import DDPM
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.data.plots import draw, svg
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.errors import ModelError
from ddpm_cli.evaluation.bound import Bound, charts, measure, merge, to_csv
from ddpm_cli.evaluation.term_sampling import chances, term_sizes
from ddpm_cli.nn.unet import UNet

VARIANCE = 0.25
SCHEDULE = ScheduleConfig(num_train_timesteps=100, beta_end=0.2, prediction_type="sample", clip_sample=False)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bound_of(denoiser, images, **options):
    return merge(measure(denoiser, images, range(len(images)), **options))


def ideal(config=SCHEDULE):
    """E[x_0 | x_t] of independent pixels from N(0, 1/4)."""

    def network(x_t, t):
        abar = schedule.alphas_cumprod[t].to(x_t).view(-1, 1, 1, 1)
        return x_t * abar.sqrt() * VARIANCE / (abar * VARIANCE + 1 - abar)

    denoiser = Denoiser.from_config(network, config)
    schedule = denoiser.schedule
    return denoiser


@pytest.fixture(scope="module")
def measured():
    denoiser = ideal()
    x_0 = VARIANCE**0.5 * normals(8, 1, 32, 32)
    return denoiser, x_0, bound_of(denoiser, x_0)


def snr_of(schedule):
    return schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)


def test_distortion_and_rate_are_those_of_a_gaussian(measured):
    """mse = v / (1 + v SNR), and the terms are 1/2 (SNR_{t-1} - SNR_t) mse_t (Kingma et al. 2021, Eq. 14)."""
    denoiser, x_0, bound = measured
    depths = bound.depths()
    assert [depth.t for depth in depths] == list(range(99, -1, -1))
    snr = snr_of(denoiser.schedule)
    mse = VARIANCE / (1 + VARIANCE * snr)
    terms = 0.5 * (snr[:-1] - snr[1:]) * mse[1:]
    power = float(x_0.double().square().mean())
    abar = float(denoiser.schedule.alphas_cumprod[-1])
    prior = 0.5 * (-abar + abar * power - math.log(1 - abar))
    rate = prior
    for depth in depths:
        assert depth.mse == pytest.approx(float(mse[depth.t]), rel=0.08)
        assert depth.rate == pytest.approx(rate / math.log(2), rel=0.05)
        rate += float(terms[depth.t - 1])
    assert depths[0].rate == pytest.approx(prior / math.log(2), rel=1e-9)


def test_each_term_is_its_weight_times_the_error(measured):
    """The same identity for the draws themselves, which leaves no room for chance."""
    denoiser, _, bound = measured
    snr = snr_of(denoiser.schedule)
    expected = 0.5 * (snr[:-1] - snr[1:]) * bound.errors[1:] / math.log(2)
    torch.testing.assert_close(bound.terms[1:], expected, rtol=1e-5, atol=1e-9)


def test_the_decoder_is_its_integral():
    """L_0 of the 256 values, by quadrature over the noise of x_1."""
    denoiser = ideal()
    images = (127.5 * (1 + VARIANCE**0.5 * normals(8, 1, 64, 64))).round().clamp(0, 255).to(torch.uint8)
    schedule, values = denoiser.schedule, torch.arange(256).double() / 127.5 - 1
    abar, sigma = float(schedule.alphas_cumprod[0]), float(schedule.posterior_variance[1]) ** 0.5
    eps = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    x_1 = abar**0.5 * values[:, None] + (1 - abar) ** 0.5 * eps
    mean = x_1 * abar**0.5 * VARIANCE / (abar * VARIANCE + 1 - abar)
    edges = torch.cat([torch.tensor([-math.inf]), (values[1:] + values[:-1]) / 2, torch.tensor([math.inf])])
    mass = Normal(mean, sigma).cdf(edges[1:, None]) - Normal(mean, sigma).cdf(edges[:-1, None])
    weight = (-(eps**2) / 2).exp()
    each = -(mass.clamp(min=1e-300).log2() * weight).sum(1) / weight.sum()
    expected = float(each[images.long()].mean())
    found = bound_of(denoiser, images)
    assert found.distortion == pytest.approx(expected, rel=0.01)
    assert found.distortion == pytest.approx(expected, abs=4 * float(found.decoder.std()) / 8**0.5)


def test_the_rate_of_an_ideal_model_is_the_entropy():
    """Pixels that are one of four values with equal probability have 2 bits, and the ideal denoiser is known.

    At t = 0 it knows the values, so the decoder loses what its variance puts into the neighbours' intervals.
    """
    levels = torch.tensor([0, 85, 170, 255])
    images = levels[torch.randint(4, (8, 1, 16, 16), generator=torch.Generator().manual_seed(0))].to(torch.uint8)
    config = ScheduleConfig(num_train_timesteps=1000, prediction_type="sample")

    def network(x_t, t):
        abar = denoiser.schedule.alphas_cumprod[t].to(x_t).view(-1, 1, 1, 1)
        clean = levels.to(x_t) / 127.5 - 1
        odds = -((x_t[..., None] - abar.sqrt()[..., None] * clean) ** 2) / (2 * (1 - abar))[..., None]
        return (odds.softmax(-1) * clean).sum(-1)

    denoiser = Denoiser.from_config(network, config)
    found = bound_of(denoiser, images)
    chance = 3 * found.standard_error
    assert 2 - chance < found.rate < 2.03 + chance  # 1000 steps lose little
    assert chance < 0.05
    inner = Normal(0.0, float(denoiser.schedule.posterior_variance[1]) ** 0.5)
    half = inner.cdf(torch.tensor(1 / 255))
    edge = ((images == 0) | (images == 255)).double()
    expected = -(edge * half.log2() + (1 - edge) * (2 * half - 1).log2()).mean()
    assert found.distortion == pytest.approx(float(expected), rel=1e-4)


def _rederived(network, config, images, noise):
    """The loop of improved-diffusion's calc_bpd_loop, written from its description: bits per dimension, (B, T).

    In float32 for the network, else float64; with the exact distribution function where they approximate it.
    """
    betas = torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    clipped_log_variance = torch.cat([variance[1:2], variance[1:]]).log()
    x_0 = images.double() / 127.5 - 1
    channels, columns = images.shape[1], []
    for t, eps in zip(reversed(range(len(betas))), noise, strict=True):
        x_t = abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * eps
        with torch.no_grad():
            output = network(x_t.float(), torch.full((len(x_t),), t)).double()
        predicted = ((x_t - (1 - abar[t]).sqrt() * output[:, :channels]) / abar[t].sqrt()).clamp(-1, 1)
        c_0, c_t = before[t].sqrt() * betas[t] / (1 - abar[t]), (1 - betas[t]).sqrt() * (1 - before[t]) / (1 - abar[t])
        if config.variance_type == "learned_range":
            fraction = (output[:, channels:] + 1) / 2
            log_variance = fraction * betas[t].log() + (1 - fraction) * clipped_log_variance[t]
        else:
            large = torch.cat([variance[1:2], betas[1:]]).log()
            log_variance = (large if config.variance_type == "fixed_large" else clipped_log_variance)[t].expand_as(x_0)
        model = Normal(c_0 * predicted + c_t * x_t, (log_variance / 2).exp())
        if t == 0:
            high = model.cdf(x_0 + 1 / 255).masked_fill(x_0 > 0.999, 1)
            low = model.cdf(x_0 - 1 / 255).masked_fill(x_0 < -0.999, 0)
            term = -(high - low).clamp(min=1e-12).log()
        else:
            posterior = Normal(c_0 * x_0 + c_t * x_t, (clipped_log_variance[t] / 2).exp())
            term = kl_divergence(posterior, model)
        columns.insert(0, term.flatten(1).mean(1) / math.log(2))
    final = Normal(abar[-1].sqrt() * x_0, (1 - abar[-1]).sqrt())
    prior = kl_divergence(final, Normal(0.0, 1.0)).flatten(1).mean(1) / math.log(2)
    return torch.stack(columns, 1), prior


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_terms_are_those_of_calc_bpd_loop(variance_type, monkeypatch):
    config = ScheduleConfig(num_train_timesteps=50, variance_type=variance_type)
    unet = UNet(replace(SMALL, out_channels=2 if variance_type == "learned_range" else 1))
    randomize(unet)
    images = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    noise = normals(50, 4, 1, 8, 8)
    left = list(noise)
    monkeypatch.setattr("ddpm_cli.evaluation.bound.ImageNoise", lambda *args: lambda: left.pop(0))
    found = bound_of(Denoiser.from_config(unet, config), images)
    terms, prior = _rederived(unet, config, images, noise)
    # Random weights are about one sigma off at t = 0, where a smallest mass of 1e-12 has no effect.
    torch.testing.assert_close(found.terms / 4, terms.mean(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.each, terms.sum(1) + prior, rtol=1e-5, atol=1e-4)


def test_the_parts_sum_to_the_whole(measured):
    _, _, bound = measured
    assert len(bound) == 8
    assert (bound.counts == 8).all()
    summary, rows = bound.summary(), bound.rows()
    assert summary["bits_per_dim"] == pytest.approx(summary["rate"] + summary["distortion"], rel=1e-12)
    assert summary["bits_per_dim"] == pytest.approx(summary["prior"] + sum(row["bits"] for row in rows), rel=1e-12)
    assert rows[-1]["rate"] == pytest.approx(summary["rate"], rel=1e-12)
    assert rows[0]["rate"] == pytest.approx(summary["prior"], rel=1e-12)
    assert (summary["images"], summary["steps"], summary["terms"]) == (8, 100, 100)
    assert ([row["t"] for row in rows], {row["images"] for row in rows}) == (list(range(100, 0, -1)), {8})
    assert summary["rmse"] == rows[-1]["rmse"] == bound.rmse
    spread = sum((value - bound.total) ** 2 for value in bound.each.tolist()) / 7
    assert bound.interval == pytest.approx([bound.total + z * math.sqrt(spread / 8) for z in (-1.96, 1.96)])
    assert json.loads(json.dumps([summary, rows])) == [summary, rows]
    terms, rate = shown = charts(to_csv({"a, b": bound, '"': bound}))
    assert terms.curves == {name: [row["bits"] for row in rows] for name in ("a, b", '"')}
    assert rate.curves["a, b"] == [row["rate"] for row in rows]
    assert terms.steps == rate.steps == [row["t"] for row in rows]
    assert draw(shown, "the bound").size == (1280, 36 + 360)


TABLE = b"set,t,bits,rate\na,2,0.1,0.2\na,1,,0.3\n"


def test_a_damaged_table_is_named():
    assert charts(TABLE)[0].curves == {"a": [0.1, None]}
    for old, new in ((b"0.1", b"x"), (b"a,1", b"a"), (b"a,1", b"a,0"), (b"a,1", b"b,1"), (b"2", b"9" * 400)):
        with pytest.raises(ValueError, match="not a table of the bound"):
            charts(TABLE.replace(old, new))
    for table in (b"", b"set,t\n", b"\xff", b'"' + b"a" * 200_000, TABLE.replace(b"bits", b"x"), b"\x00,t\n"):
        with pytest.raises(ValueError, match="not a table of the bound"):
            charts(table)


@pytest.mark.parametrize("odd", ["nan", "inf", "1e308", "5e-324", "-1", "0"])
def test_odd_values_in_a_table_are_drawn(odd):
    for chart in charts(TABLE.replace(b"0.1", odd.encode()).replace(b"0.3", odd.encode())):
        svg(chart)


def test_one_image_has_no_interval(measured):
    denoiser, x_0, bound = measured
    one = bound_of(denoiser, x_0[:1])
    assert (one.interval, one.summary()["interval"], one.summary()["standard_error"]) == (None, None, None)
    assert one.total == pytest.approx(float(bound.each[0]), rel=1e-6)


def test_it_does_not_depend_on_batches_processes_or_order(measured):
    denoiser, x_0, bound = measured
    done: list[int] = []
    parts = list(measure(denoiser, x_0, range(8), batch_size=3, progress=done.append))
    assert (len(parts), done[-1]) == (3, 8 * 100)
    two = [*measure(denoiser, x_0, [6, 1]), *measure(denoiser, x_0, [7, 0, 2, 3, 5, 4])]
    for pieces in (parts, reversed(parts), two):
        again = merge(pieces)
        assert again.numbers.tolist() == list(range(8))
        for name, value in vars(bound).items():
            torch.testing.assert_close(getattr(again, name), value, rtol=1e-6, atol=1e-9)
    stored = [Bound(**vars(part)) for part in parts]
    assert torch.equal(merge(stored).each, merge(reversed(parts)).each)
    assert merge(stored).total == merge(reversed(parts)).total


def test_parts_that_do_not_belong_together_are_refused(measured):
    denoiser, x_0, bound = measured
    with pytest.raises(ValueError, match="an image is in two parts"):
        merge([bound, *measure(denoiser, x_0, [3])])
    for other in (denoiser.subsequence(range(1, 100)), denoiser.subsequence(range(99))):
        with pytest.raises(ValueError, match="different steps or chances"):
            merge([bound, *measure(other, x_0, [3])])
    with pytest.raises(ValueError, match="different steps or chances"):
        merge([bound, replace(bound, numbers=bound.numbers + 8, chances=bound.chances / 2)])
    with pytest.raises(ValueError, match="no parts"):
        merge([])


def test_uint8_and_float_images_are_the_same():
    denoiser = ideal()
    images = torch.randint(256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    exact, rounded = bound_of(denoiser, images), bound_of(denoiser, images.float() / 127.5 - 1)
    torch.testing.assert_close(exact.each, rounded.each, rtol=1e-5, atol=0)


def test_a_bound_that_is_not_finite_names_its_step():
    """A variance of exp(-1000) beta_t at one step."""

    def network(x_t, t):
        log = torch.where(t == 30, 1000.0, 0.0).view(-1, 1, 1, 1)
        return torch.cat([torch.zeros_like(x_t), -log.expand_as(x_t)], 1)

    denoiser = Denoiser.from_config(network, replace(SCHEDULE, variance_type="learned_log"))
    x_0 = normals(2, 1, 8, 8)
    with pytest.raises(ModelError, match="no finite bound: its term at t=31 overflows"):
        bound_of(denoiser, x_0)
    with pytest.raises(ModelError, match="no finite bound: its term at t=31 overflows"):
        bound_of(denoiser, x_0, chances=chances(torch.ones(100), 99))
    few = denoiser.subsequence(range(10, 100, 10))
    few = Denoiser(few.network, few.schedule, denoiser.config, few.trained)
    with pytest.raises(ModelError, match="no finite bound: its term at t=31 overflows"):
        bound_of(few, x_0)


def test_a_pilot_that_is_not_finite_names_its_step():
    def network(x_t, t):
        return torch.cat([x_t, torch.full_like(x_t, -1000)], 1)

    denoiser = Denoiser.from_config(network, replace(SCHEDULE, variance_type="learned_log"))
    with pytest.raises(ModelError, match="no finite bound"):
        term_sizes(denoiser, normals(2, 1, 8, 8))


def test_one_function_has_one_bound_whatever_it_predicts(measured):
    denoiser, x_0, bound = measured
    for kind in ("epsilon", "v_prediction"):

        def network(x_t, t, kind=kind):
            clean = denoiser.network(x_t.double(), t)
            abar = denoiser.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
            eps = (x_t - abar.sqrt() * clean) / (1 - abar).sqrt()
            return (eps if kind == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * clean).float()

        other = Denoiser.from_config(network, replace(SCHEDULE, prediction_type=kind))
        torch.testing.assert_close(bound_of(other, x_0).each, bound.each, rtol=1e-4, atol=0)


def test_x_0_is_clipped_as_the_model_says():
    images = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    config = replace(SCHEDULE, num_train_timesteps=10)
    errors = []
    for clip in (True, False):
        denoiser = Denoiser.from_config(lambda x_t, t: 3 * torch.ones_like(x_t), replace(config, clip_sample=clip))
        errors.append(bound_of(denoiser, images).rmse)
    assert errors == pytest.approx([0, 255])


def test_fewer_steps_have_a_higher_bound(measured):
    denoiser, x_0, bound = measured
    fewer = bound_of(denoiser.subsequence([0, *spaced(denoiser.schedule, 9)]), x_0)
    assert [depth.t for depth in fewer.depths()] == [*spaced(denoiser.schedule, 9)[::-1], 0]
    assert fewer.rate > bound.rate
    assert fewer.rmse == pytest.approx(bound.rmse, rel=0.05)


def test_a_sample_of_the_terms_has_no_bias_for_any_chances():
    """The mean of many images, each with its own sample, against all terms; chances that fit are more precise."""
    denoiser = ideal(replace(SCHEDULE, num_train_timesteps=60))
    x_0 = VARIANCE**0.5 * normals(1500, 1, 4, 4)
    full = bound_of(denoiser, x_0, batch_size=500)
    spreads = []
    for sizes in (full.terms, torch.ones(60).double(), full.terms.flip(0)):
        found = bound_of(denoiser, x_0, batch_size=500, chances=chances(sizes, 8), seed=1)
        off = (found.each - full.each).mean()
        assert abs(off) < 3.5 * (found.each - full.each).std() / 1500**0.5
        assert int(found.counts.sum()) == 8 * 1500
        assert found.depths()[-1].rate == pytest.approx(found.rate, rel=1e-9)
        assert int(found.counts.min()) < 400
        spreads.append(float(found.each.std()))
    assert spreads[0] < spreads[1] < spreads[2]
    assert spreads[0] < 1.5 * float(full.each.std())


def test_a_sample_of_all_terms_is_the_exact_loop(measured):
    denoiser, x_0, bound = measured
    for k in (100, 1000):
        again = bound_of(denoiser, x_0, chances=chances(bound.terms, k))
        assert torch.equal(again.each, bound.each)


def test_a_sample_of_the_terms_of_a_model(small_model):
    """An image has its result in any batch, though each has other t."""
    model = DDPM.from_pretrained(str(small_model), device="cpu")
    images = torch.randint(256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    some = chances(term_sizes(model.denoiser, images), 6)
    together, alone = (bound_of(model.denoiser, images, chances=some, batch_size=n) for n in (5, 1))
    assert torch.equal(together.counts, alone.counts)
    torch.testing.assert_close(together.each, alone.each, rtol=1e-5, atol=0)


def test_a_step_that_no_image_has_is_missing_in_the_rows():
    denoiser = ideal()
    found = bound_of(denoiser, VARIANCE**0.5 * normals(2, 1, 4, 4), chances=chances(torch.ones(100).double(), 5))
    missing = [row for row in found.rows() if not row["images"]]
    assert len(missing) >= 91
    assert all(row["bits"] is row["rmse"] is None for row in missing)
    assert draw(charts(to_csv({"train": found})), "few").size[0] == 1280


def test_the_command(cli, small_model, color_model, digits, photo):
    code, out, err = cli("rate-distortion", digits, "-m", small_model, "-n", 5, "-o", "rd.png", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["n"], found["steps"], len(found["rows"])) == (5, 20, 20)
    assert [row["reverse_steps"] for row in found["rows"]] == list(range(1, 21))
    assert [row["t"] for row in found["rows"]] == list(range(20, 0, -1))
    rates = [row["rate"] for row in found["rows"]]
    assert rates == sorted(rates)
    assert len([line for line in err.splitlines() if line.startswith("  ")]) == 11
    assert picture("rd.png").size == (1280, 36 + 2 * 360)
    code, out, _ = cli("rate-distortion", photo, "-m", color_model, "--steps", 7, "-o", "one.png", "--json")
    assert (code, json.loads(out)["n"], len(json.loads(out)["rows"])) == (0, 1, 7)


def test_images_that_cannot_be_used_are_named(cli, small_model, digits, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.png").write_bytes(b"nothing")
    code, _, err = cli("rate-distortion", "mixed", "-m", small_model, "-o", "rd.png")
    assert (code, "mixed: none of 1 image files can be decoded, for example a.png: not an image" in err) == (1, True)
    (tmp_path / "mixed" / "b.png").write_bytes(next(digits.rglob("*.png")).read_bytes())
    code, _, err = cli("rate-distortion", "mixed", "-m", small_model, "-o", "rd.png")
    assert (code, "left out 1 image that cannot be used, for example a.png: not an image" in err) == (0, True)
