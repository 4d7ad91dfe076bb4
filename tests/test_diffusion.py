"""Flow matching against closed forms: data N(μ, s²), whose velocity and flow map are known exactly."""

import math
import sys
from itertools import pairwise

import diffusers
import pytest
import torch
from scipy import stats

from tokenizers_lab.diffusion import flow, samplers
from tokenizers_lab.diffusion.flow import FlowPath, TimeConfig, draw_times, flow_loss, frame_mask, mirrored
from tokenizers_lab.diffusion.schedulers import scheduler_sampler
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError, InputError

MEAN, STD = 1.5, 0.4
CLOCKS = {f"{clock} {sigma_min}": FlowPath(clock, sigma_min) for clock in ("data", "noise") for sigma_min in (0.0, 0.05)}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian_velocity(path):
    """E[dx/dt | x_t = x] for data N(μ, s²) and noise N(0, 1): the regression of one Gaussian on another."""
    def towards_data(x, tau):
        rest = 1 - (1 - path.sigma_min) * tau
        variance = tau**2 * STD**2 + rest**2
        return MEAN + (tau * STD**2 - (1 - path.sigma_min) * rest) / variance * (x - tau * MEAN)

    def velocity(x, time):
        assert time.shape == (len(x),)
        time = flow.per_item(time, x)
        return towards_data(x, time) if path.clock == "data" else -towards_data(x, 1 - time)

    return velocity


def gaussian_map(path, noise):
    """Where the exact flow takes that noise: x_1 = μ + √(s² + σ_min²) · noise."""
    return MEAN + math.hypot(STD, path.sigma_min) * noise


@pytest.mark.parametrize("path", CLOCKS.values(), ids=CLOCKS)
def test_the_path_ends_at_noise_and_data_and_its_velocity_is_its_derivative(path):
    data, noise = normal(3, 4, 2), normal(3, 4, 2, seed=1)
    begin, end = (torch.full((3,), t, dtype=torch.float64) for t in path.times(1).tolist())
    torch.testing.assert_close(path.at(data, noise, begin), noise)
    torch.testing.assert_close(path.at(data, noise, end), data + path.sigma_min * noise)
    time = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    slope = (path.at(data, noise, time + 0.1) - path.at(data, noise, time)) / 0.1
    torch.testing.assert_close(path.velocity(data, noise), slope)
    x, v = path.at(data, noise, time), path.velocity(data, noise)
    torch.testing.assert_close(path.data_of(x, v, time), data)
    torch.testing.assert_close(path.noise_of(x, v, time), noise)
    torch.testing.assert_close(path.at(data, noise, time), path.at(data, noise, time[:, None, None]))


def test_the_clocks_mirror_each_other_and_rectoks_interpolation_is_the_noise_clocks():
    data, noise, time = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    by_data, by_noise = FlowPath("data", 0.05), FlowPath("noise", 0.05)
    torch.testing.assert_close(by_data.at(data, noise, 1 - time), by_noise.at(data, noise, time))
    torch.testing.assert_close(mirrored(gaussian_velocity(by_data))(data, time), gaussian_velocity(by_noise)(data, time))
    torch.testing.assert_close(flow.interpolate(data, noise, time[:, None]), FlowPath("noise").at(data, noise, time))
    with pytest.raises(ConfigError, match="clock 'datum'"):
        FlowPath("datum")


def test_the_regression_of_the_target_is_the_exact_velocity():
    """Ties path and target to the closed form that the samplers are tested with."""
    path, time = FlowPath("data", 0.05), torch.tensor(0.7, dtype=torch.float64)
    data, noise = MEAN + STD * normal(400_000), normal(400_000, seed=1)
    x, v = path.at(data, noise, time), path.velocity(data, noise)
    slope = torch.cov(torch.stack([x, v]))[0, 1] / x.var()
    points = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    found = v.mean() + slope * (points - x.mean())
    torch.testing.assert_close(found, gaussian_velocity(path)(points, time.expand(3)), rtol=0, atol=0.01)


def orders(solve, exact):
    """Measured orders of convergence: log2 of the errors' ratios from 64 to 128 and from 128 to 256 steps."""
    errors = [(solve(steps) - exact).abs().max() for steps in (64, 128, 256)]
    return [math.log2(a / b) for a, b in pairwise(errors)]


# On this velocity, the logarithmic derivative of a square root of a quadratic, the mid-point method's local error of third order
# vanishes identically, so it gains an order
@pytest.mark.parametrize("path", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("euler_midpoint", 1), ("midpoint", 3), ("heun", 2)])
def test_samplers_converge_to_the_exact_flow_of_gaussian_data(name, order, path):
    noise, sample, velocity = normal(64), samplers.find_sampler(name), gaussian_velocity(path)
    found = orders(lambda steps: sample(velocity, noise, path.times(steps)), gaussian_map(path, noise))
    assert found == pytest.approx([order] * 2, abs=0.1)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("euler_midpoint", 1), ("midpoint", 2), ("heun", 2)])
def test_samplers_have_their_order_on_a_nonlinear_velocity(name, order):
    """dx/dt = −(1 + t) · x² has x = x₀ / (1 + x₀ · (t + t²/2))."""
    start, sample = 1 + normal(64).abs(), samplers.find_sampler(name)
    forth = orders(lambda steps: sample(lambda x, t: -(1 + t) * x**2, start, FlowPath().times(steps)), start / (1 + 1.5 * start))
    assert forth == pytest.approx([order] * 2, abs=0.1)
    end = 1 / (1 + start)      # back from time 1: falling times
    back = orders(lambda steps: sample(lambda x, t: -(1 + t) * x**2, end, FlowPath("noise").times(steps)), end / (1 - 1.5 * end))
    assert back == pytest.approx([order] * 2, abs=0.1)


def test_uneven_steps_and_samplers_know_the_whole_list():
    """With v = t², which no state enters, each step's contribution is known."""
    def square(x, time):
        return time**2 + 0 * x

    zero, times = torch.zeros(1, dtype=torch.float64), [0.0, 0.1, 0.6, 1.0]
    steps = list(pairwise(times))
    expected = {
        "euler": sum((b - a) * a**2 for a, b in steps),
        "euler_midpoint": sum((b - a) * ((a + b) / 2) ** 2 for a, b in steps),
        "midpoint": sum((b - a) * ((a + b) / 2) ** 2 for a, b in steps),
        "heun": sum((b - a) * (a**2 + b**2) / 2 for a, b in steps),
    }
    for name, value in expected.items():
        assert samplers.SAMPLERS[name](square, zero, times).item() == pytest.approx(value)
        assert samplers.SAMPLERS[name](square, zero, torch.tensor(times)).item() == pytest.approx(value, abs=1e-6)
    for wrong in ([0.0], [0.0, 0.5, 0.5], [0.0, 0.7, 0.2], []):
        with pytest.raises(InputError, match="rising or falling"):
            samplers.euler(square, zero, wrong)
    with pytest.raises(ConfigError, match="unknown sampler 'rk9'"):
        samplers.find_sampler("rk9")


@pytest.mark.parametrize("path", CLOCKS.values(), ids=CLOCKS)
def test_dormand_prince_reaches_the_exact_flow(path):
    pytest.importorskip("torchdiffeq")
    noise, velocity, calls = normal(64), gaussian_velocity(path), []
    found = samplers.dopri5(lambda x, t: calls.append(t) or velocity(x, t), noise, path.times(1), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found, gaussian_map(path, noise), rtol=0, atol=1e-6)
    assert 7 < len(calls) < 500
    assert samplers.dopri5(velocity, noise.bfloat16(), path.times(1)).dtype == torch.bfloat16


def test_a_missing_torchdiffeq_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ConfigError, match="pip install torchdiffeq"):
        samplers.dopri5(gaussian_velocity(FlowPath()), normal(4), [0.0, 1.0])


def test_step_lists_are_those_of_the_codes():
    tau = torch.linspace(0, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(FlowPath().times(5), tau)                                                    # UniFlow, linear
    torch.testing.assert_close(FlowPath().times(5, shift=1 / 0.3), 0.3 * tau / (1 + (0.3 - 1) * tau))       # LightningDiT
    torch.testing.assert_close(FlowPath().times(5, shift=8**0.5), tau / (8**0.5 - (8**0.5 - 1) * tau))      # RecTok's generator
    left = 1 - torch.linspace(0, 0.999, 6, dtype=torch.float64)
    torch.testing.assert_close(FlowPath("noise").times(5, shift=6.93, stop=0.001), 6.93 * left / (1 + 5.93 * left))     # RAE
    power = [1 - (k / 4) ** (1 / 0.25) for k in (4, 3, 2, 1, 0)]
    assert FlowPath().times(4, power=0.25).tolist() == pytest.approx(power)                                 # UniFlow, pow_0.25
    with pytest.raises(InputError, match="steps ≥ 1"):
        FlowPath().times(0)


@pytest.mark.parametrize("path", [FlowPath("data"), FlowPath("noise")], ids=str)
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"stop": 0.02}], ids=str)
def test_diffusers_schedulers_take_the_same_steps(path, options):
    velocity, noise, times = gaussian_velocity(path), normal(8, 3, dtype=torch.float32), path.times(7, **options)
    euler = scheduler_sampler(diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0))
    torch.testing.assert_close(euler(velocity, noise, times), samplers.euler(velocity, noise, times), rtol=0, atol=1e-5)
    heun = scheduler_sampler(diffusers.FlowMatchHeunDiscreteScheduler())
    ours = samplers.euler(velocity, samplers.heun(velocity, noise, times[:-1]), times[-2:])     # theirs ends with Euler
    torch.testing.assert_close(heun(velocity, noise, times), ours, rtol=0, atol=1e-5)
    assert torch.equal(heun(velocity, noise, times), heun(velocity, noise, times))


def test_a_scheduler_may_space_its_own_steps_and_is_left_as_it_was():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    velocity, noise = gaussian_velocity(FlowPath("noise")), normal(8, 3, dtype=torch.float32)
    before = scheduler.sigmas.clone()
    found = scheduler_sampler(scheduler, own_times=True)(velocity, noise, [1.0, 0.5, 0.2, 0.0])
    mirror = scheduler_sampler(scheduler, own_times=True)(gaussian_velocity(FlowPath("data")), noise, [0.0, 0.5, 0.6, 1.0])
    torch.testing.assert_close(found, mirror)
    assert torch.equal(scheduler.sigmas, before)
    scheduler.set_timesteps(3)
    torch.testing.assert_close(found, samplers.euler(velocity, noise, scheduler.sigmas), rtol=0, atol=1e-5)
    stochastic = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    seeded = (scheduler_sampler(stochastic, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    first, again, other = (sample(velocity, noise, [1.0, 0.5, 0.2]) for sample in seeded)
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(InputError, match="got DDIMScheduler"):
        scheduler_sampler(diffusers.DDIMScheduler())
    with pytest.raises(InputError, match="invert_sigmas"):
        scheduler_sampler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), own_times=True)


TIMES = {
    "uniform": (TimeConfig(), lambda t: t),
    "below": (TimeConfig(high=0.7), lambda t: (t / 0.7).clamp(max=1)),
    "lognorm": (TimeConfig("lognorm", -0.75, 1.25), lambda t: logit_normal(t, -0.75, 1.25)),
    "lognorm below": (TimeConfig("lognorm", 0.5, high=0.9), lambda t: logit_normal(t, 0.5, 1) / logit_normal(0.9, 0.5, 1)),
    "fat_lognorm": (TimeConfig("fat_lognorm", uniform_share=0.3), lambda t: 0.3 * t + 0.7 * logit_normal(t, 0, 1)),
    "shifted": (TimeConfig(shift=3.0), lambda t: t / (3 - 2 * t)),
    "rectok": (TimeConfig(shift=3.0, mirror=True), lambda t: 1 - (1 - t) / (3 - 2 * (1 - t))),
    "lognorm shifted": (TimeConfig("lognorm", shift=3.0), lambda t: logit_normal(t / (3 - 2 * t), 0, 1)),
}


def logit_normal(t, mean, std):
    return torch.special.ndtr((torch.as_tensor(t).double().logit() - mean) / std)


@pytest.mark.parametrize(("cfg", "cdf"), TIMES.values(), ids=TIMES)
def test_times_have_their_distribution(cfg, cdf):
    times = draw_times(cfg, Draw(3), (20_000,))
    assert times.dtype == torch.float32 and times.min() >= 0 and times.max() <= 1
    distance = stats.kstest(times.double().numpy(), lambda t: cdf(torch.from_numpy(t)).numpy()).statistic
    assert distance < 0.0138      # a right sampler is above in one seed of a thousand (1.95 / √20,000); this seed is not
    assert torch.equal(times, draw_times(cfg, Draw(3), (20_000,))) and not torch.equal(times, draw_times(cfg, Draw(4), (20_000,)))


def test_wrong_times_are_refused():
    for wrong in ({"distribution": "cosine"}, {"std": 0.0}, {"uniform_share": 2.0}, {"high": 0.0}, {"shift": -1.0}):
        with pytest.raises(ConfigError, match="times"):
            draw_times(TimeConfig(**wrong), Draw(0), (2,))


def test_losses_count_what_the_mask_keeps():
    predicted, target = normal(2, 5, 3), normal(2, 5, 3, seed=1)
    difference = predicted - target
    torch.testing.assert_close(flow_loss(predicted, target), difference.square().mean())
    torch.testing.assert_close(flow_loss(predicted, target, "l1"), difference.abs().mean())
    mask = frame_mask(torch.tensor([4, 5]), 5, torch.tensor([1, 3]))
    kept = torch.cat([difference[0, 1:4], difference[1, 3:5]])           # a mean over frames: the longer item weighs more
    predicted[0, 4] = float("nan")        # what is said of padding does not matter
    predicted.requires_grad_()
    loss = flow_loss(predicted, target, "l1", mask)
    torch.testing.assert_close(loss, kept.abs().mean())
    loss.backward()
    assert torch.equal(predicted.grad.abs().sum(-1) > 0, mask)
    assert flow_loss(predicted, target, "l2", torch.zeros_like(mask)).item() == 0
    assert flow_loss(predicted.bfloat16(), target.bfloat16(), mask=mask).dtype == torch.float32
    with pytest.raises(InputError, match="must fit"):
        flow_loss(predicted, target[:, :4])
    with pytest.raises(InputError, match="must fit"):
        flow_loss(predicted, target, mask=mask[:, :3])
    with pytest.raises(ConfigError, match="'huber'"):
        flow_loss(predicted, target, "huber")


def test_one_step_gives_the_mean_and_networks_see_float32_times():
    """One Euler step from noise lands on the data's mean: what UniFlow's released decoder does."""
    noise, seen = normal(8, 3, dtype=torch.float32), []
    velocity = gaussian_velocity(FlowPath())
    found = samplers.euler(lambda x, t: seen.append(t) or velocity(x, t), noise, FlowPath().times(1))
    torch.testing.assert_close(found, torch.full_like(found, MEAN))
    samplers.euler(lambda x, t: seen.append(t) or x, noise.bfloat16(), [0.0, 1.0])
    assert [t.dtype for t in seen] == [torch.float32] * 2
