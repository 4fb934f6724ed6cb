"""The deterministic samplers: against diffusers, float64 derivations and the exact flow of Gaussian data."""

import inspect
import itertools
import math
import textwrap

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.diffusion.samplers.ancestral import ancestral
from ddpm_cli.diffusion.samplers.ddim import ddim
from ddpm_cli.diffusion.samplers.dpm_solver import advance, dpm_solver
from ddpm_cli.diffusion.schedule import NoiseSchedule

STEPS = [5, 7, 10, 20, 50]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
LOOPS = [(ddim, {"eta": 0}), (dpm_solver, {"order": 2, "eta": 0})]
T1000 = NoiseSchedule.from_config(ScheduleConfig())


def draw(seed: int, n: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 4, dtype=torch.float64, generator=generator)


def no_noise() -> torch.Tensor:
    raise AssertionError("this sampler draws no noise")


def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A fixed nonlinear function of x_t and t, of about the size of each kind of output."""
    return torch.tanh(x_t * (0.5 + int(t) / 2000) + 0.3 * draw(7, 1)) + 0.2 * torch.sin(3 * x_t)


def denoiser(chosen: list[int], prediction: str, clip: bool, net=network) -> Denoiser:
    config = ScheduleConfig(prediction_type=prediction, clip_sample=clip)
    return Denoiser(net, T1000.subsequence(chosen), config)


def states(
    loop, chosen: list[int], prediction: str, clip: bool = True, noise=no_noise, **settings
) -> list[torch.Tensor]:
    return [step.x_t for step in loop(denoiser(chosen, prediction, clip), draw(0), noise, **settings)]


def theirs(scheduler, chosen: list[int], alphas_cumprod: bool = True) -> list[torch.Tensor]:
    """The states of a scheduler of diffusers, with the same steps, noise and network."""
    x = draw(0)
    found = [x]
    for t in chosen[::-1]:
        x = scheduler.step(network(x, torch.tensor([t])), t, x).prev_sample
        found.append(x)
    return found


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_is_that_of_diffusers(prediction, n, clip):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=clip)
    scheduler.alphas_cumprod = T1000.alphas_cumprod  # theirs are float32
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(n)
    chosen = scheduler.timesteps.tolist()[::-1]
    x, expected = draw(0), [draw(0)]
    for t in chosen[::-1]:
        x = scheduler.step(network(x, torch.tensor([t])), t, x, use_clipped_model_output=True).prev_sample
        expected.append(x)
    # From pure noise their steps begin at another t, but the step itself is the same at every t.
    for ours, other in zip(states(ddim, chosen, prediction, clip, eta=0), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [20, 7])
def test_ddim_with_eta_1_is_ancestral_sampling(n):
    chosen = spaced(T1000, n)
    noises = [draw(100 + i) for i in range(n)]
    one, other = iter(noises), iter(noises)
    with_eta = states(ddim, chosen, "epsilon", noise=lambda: next(one), eta=1.0)
    exact = states(ancestral, chosen, "epsilon", noise=lambda: next(other))
    for a, b in zip(with_eta, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr"])
def test_dpm_solver_of_order_1_is_ddim(spacing, eta):
    chosen = spaced(T1000, 11, spacing=spacing)
    noises = [draw(100 + i) for i in range(11)]
    one, other = iter(noises), iter(noises)
    solved = states(dpm_solver, chosen, "v_prediction", noise=lambda: next(one), order=1, eta=eta)
    for a, b in zip(solved, states(ddim, chosen, "v_prediction", noise=lambda: next(other), eta=eta), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def mended() -> type:
    """Their solver with the factor of 2 in its second derivative, which their order 3 lacks.

    (A parabola through three points has the second derivative 2 f[a, b, c], and they take f[a, b, c].)
    """
    method = DPMSolverMultistepScheduler.multistep_dpm_solver_third_order_update
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count("(1.0 / (r0 + r1)) * (D1_0 - D1_1)") == 1
    space = vars(scheduling_dpmsolver_multistep).copy()
    exec(source.replace("(1.0 / (r0 + r1)) * (D1_0", "(2.0 / (r0 + r1)) * (D1_0"), space)
    return type("Mended", (DPMSolverMultistepScheduler,), {method.__name__: space[method.__name__]})


def exact_tables(scheduler, chosen: list[int]) -> None:
    """Our float64 noise levels instead of their float32 ones."""
    sigmas = (1 / T1000.alphas_cumprod[chosen[::-1]] - 1).sqrt()
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    scheduler.timesteps = torch.tensor(chosen[::-1])
    scheduler.num_inference_steps = len(chosen)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr"])
def test_dpm_solver_is_that_of_diffusers(prediction, n, order, spacing):
    chosen = spaced(T1000, n, spacing=spacing)
    scheduler = (mended() if order == 3 else DPMSolverMultistepScheduler)(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction,
        solver_order=order,
        thresholding=True,  # to sample_max_value=1: this is clipping to [-1, 1]
    )
    scheduler.set_timesteps(timesteps=chosen[::-1])
    exact_tables(scheduler, chosen)
    for ours, other in zip(
        states(dpm_solver, chosen, prediction, order=order, eta=0), theirs(scheduler, chosen), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_with_noise_is_that_of_diffusers(n, order):
    chosen = spaced(T1000, n, spacing="logsnr")
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type="sde-dpmsolver++",
        solver_order=order,
        thresholding=True,
    )
    scheduler.set_timesteps(timesteps=chosen[::-1])
    exact_tables(scheduler, chosen)
    x, noises = draw(0), [draw(100 + i) for i in range(n)]
    expected = []
    for t, noise in zip(chosen[::-1], noises, strict=True):
        x = scheduler.step(network(x, torch.tensor([t])), t, x, variance_noise=noise).prev_sample
        expected.append(x)
    each = iter(noises)
    ours = states(dpm_solver, chosen, "epsilon", noise=lambda: next(each), order=order, eta=1.0)[1:]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_weights_are_integrals_of_polynomials(order):
    """x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of e^lambda P(lambda), integrated numerically.

    Order 2 is "midpoint": the slope's integral is half of h times that of a constant, right up to the order.
    """
    schedule = T1000.subsequence([0, 40, 100, 300, 700])
    t = 1
    lambdas = schedule.lambdas.numpy()
    grid, weights = np.polynomial.legendre.leggauss(40)
    half = (lambdas[t - 1] - lambdas[t]) / 2
    at = (lambdas[t - 1] + lambdas[t]) / 2 + half * grid
    sigma = schedule.sqrt_one_minus_alphas_cumprod[t - 1].item()

    def integral(values: np.ndarray) -> float:
        return float(sigma * half * (weights * np.exp(at) * values).sum())

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    found = [float(advance(schedule, zero, t, [one if i == k else zero for i in range(order)])) for k in range(order)]
    nodes = lambdas[t : t + order]
    lagrange = [
        np.prod([(at - other) / (node - other) for other in nodes if other != node], axis=0) * np.ones_like(at)
        for node in nodes
    ]
    expected = [integral(values) for values in lagrange]
    if order == 2:
        slope = integral(np.ones_like(at)) / 2 * 2 * half / (nodes[0] - nodes[1])
        expected = [integral(np.ones_like(at)) + slope, -slope]
    assert found == pytest.approx(expected, rel=1e-9)
    assert float(advance(schedule, one, t, [zero] * order)) == pytest.approx(
        sigma / schedule.sqrt_one_minus_alphas_cumprod[t].item(), rel=1e-12
    )


def even_in_lambda(n: int) -> NoiseSchedule:
    """n + 1 steps from lambda = -4 to 3."""
    abar = torch.sigmoid(2 * torch.linspace(3, -4, n + 1, dtype=torch.float64))
    return NoiseSchedule(1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]]))


def flow_error(loop, n: int, **settings) -> float:
    """How far n steps end from the exact flow. It scales an image of N(mean, std^2) with the marginals' deviation."""
    mean, std = 0.3, 0.5
    schedule = even_in_lambda(n)

    def eps(x_t, t):
        abar = schedule.alphas_cumprod[int(t)].item()
        return math.sqrt(1 - abar) * (x_t - math.sqrt(abar) * mean) / (abar * std**2 + 1 - abar)

    ideal = Denoiser(eps, schedule, ScheduleConfig(clip_sample=False))
    x_T = draw(0)
    *_, found, _ = loop(ideal, x_T, no_noise, **settings)  # before the last step, which jumps to no noise
    last, first = schedule.alphas_cumprod[0].item(), schedule.alphas_cumprod[-1].item()
    gain = math.sqrt((last * std**2 + 1 - last) / (first * std**2 + 1 - first))
    exact = math.sqrt(last) * mean + gain * (x_T - math.sqrt(first) * mean)
    return float((found.x_t - exact).abs().max())


@pytest.mark.parametrize(
    ("loop", "settings", "order"),
    [
        (ddim, {"eta": 0}, 1),
        (dpm_solver, {"order": 1, "eta": 0}, 1),
        (dpm_solver, {"order": 2, "eta": 0}, 2),
        (dpm_solver, {"order": 3, "eta": 0}, 3),
    ],
)
def test_solvers_converge_to_the_exact_flow_at_their_order(loop, settings, order):
    errors = [flow_error(loop, n, **settings) for n in (20, 40, 80)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(slopes) > order - 0.2
    assert order == 3 or max(slopes) < order + 0.35


@pytest.mark.parametrize(("loop", "settings"), LOOPS)
def test_the_last_state_is_the_last_prediction(loop, settings):
    *_, before, last = loop(denoiser([0, 10, 500], "epsilon", True), draw(0), no_noise, **settings)
    assert (before.t, last.t) == (0, -1)
    assert torch.equal(last.x_t, before.x_0)
    assert last.x_t.abs().max() <= 1


@pytest.mark.parametrize(("loop", "settings"), LOOPS)
def test_one_step_is_enough_for_an_image(loop, settings):
    first, last = loop(denoiser([999], "v_prediction", True), draw(0), no_noise, **settings)
    assert (first.t, last.t) == (999, -1)
    assert torch.equal(last.x_t, first.x_0)
