"""The stochastic sampler against closed forms: data N(μ, s²), whose velocity and marginals are known exactly."""

import math

import pytest
import torch

from tokenizers_lab.diffusion.guidance import guided
from tokenizers_lab.diffusion.samplers import SAMPLERS, euler, euler_maruyama, sde_times
from tokenizers_lab.errors import InputError

MEAN, STD = 1.5, 0.4


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def velocity(x, time):
    """E[noise − data | x_t = x] for data N(μ, s²): the regression of one Gaussian on another."""
    time = time.reshape(-1, *[1] * (x.dim() - 1))
    variance = (1 - time) ** 2 * STD**2 + time**2
    return -MEAN + (time - (1 - time) * STD**2) / variance * (x - (1 - time) * MEAN)


def seeded(*shape):
    return lambda step: normal(*shape, seed=1000 + step)


@pytest.mark.parametrize("diffusion", [0.5, 2.0, 4.0])
def test_the_end_has_the_datas_mean_and_variance(diffusion):
    """Whatever g² is: the drift makes up for it. Steps so fine that only the sampling error is left."""
    items = 20_000
    found = euler_maruyama(velocity, normal(items, 1), sde_times(1000, last=0.001), seeded(items, 1), diffusion)
    assert abs(float(found.mean()) - MEAN) < 3.5 * STD / math.sqrt(items)
    assert abs(float(found.var()) / STD**2 - 1) < 3.5 * math.sqrt(2 / items)
    skew = ((found - found.mean()) ** 3).mean() / found.std() ** 3
    assert abs(float(skew)) < 3.5 * math.sqrt(6 / items)


def test_the_marginals_on_the_way_are_the_paths():
    items, half = 20_000, sde_times(1000, last=0.001)[:500]
    found, time = euler_maruyama(velocity, normal(items, 1), half, seeded(items, 1)), float(half[-1])
    std = math.hypot((1 - time) * STD, time)
    assert abs(float(found.mean()) - (1 - time) * MEAN) < 3.5 * std / math.sqrt(items)
    assert abs(float(found.var()) / std**2 - 1) < 3.5 * math.sqrt(2 / items)


def test_regs_steps_are_near_the_data_too():
    items = 20_000
    found = euler_maruyama(velocity, normal(items, 1), sde_times(250), seeded(items, 1))
    assert abs(float(found.mean()) - MEAN) < 0.02 and abs(float(found.std()) / STD - 1) < 0.02


def test_one_step_and_the_last_by_hand():
    """From t = 0.5: score −(2 + 0.5 · 3)/0.5 = −7, g² = 1, drift 3 + 3.5, Δt −0.25, noise √(1 · 0.25) · n."""
    x, n = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[0.8]], dtype=torch.float64)
    asked = []
    constant = lambda x, t: torch.full_like(x, 3.0)      # noqa: E731
    found = euler_maruyama(constant, x, [0.5, 0.25, 0.0], lambda step: asked.append(step) or n)
    middle = 2 - 6.5 * 0.25 + 0.5 * 0.8
    last = middle - 0.25 * (3 + 0.25 * (middle + 0.75 * 3) / 0.25)
    torch.testing.assert_close(found, torch.tensor([[last]], dtype=torch.float64))
    assert asked == [0]


def test_without_diffusion_it_is_euler_on_the_flow():
    noise, times = normal(5, 3), sde_times(20)
    assert torch.equal(euler_maruyama(velocity, noise, times, forbidden, diffusion=0.0), euler(velocity, noise, times))


def forbidden(step):
    raise AssertionError("noise drawn in vain")


def test_without_noise_it_follows_the_drift():
    """Euler on x + (2 − t) · v: what the drift v − t · score is."""
    noise, times = normal(5, 3), sde_times(20)
    drift = lambda x, t: x + (2 - t)[:, None] * velocity(x, t)      # noqa: E731
    found = euler_maruyama(velocity, noise, times, lambda step: torch.zeros(5, 3))
    torch.testing.assert_close(found, euler(drift, noise, times))


def test_a_guided_velocity_is_a_guided_drift():
    other = lambda x, t: velocity(x, t) * 0.5 + x.sin()      # noqa: E731
    noise, times = normal(5, 3), sde_times(20)
    found = euler_maruyama(guided(velocity, other, 2.3, (0.0, 0.85)), noise, times, seeded(5, 3))

    x = noise
    for i, (t, end) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        at = torch.full((5,), t, dtype=torch.float64)
        drifts = [v + t * (x + (1 - t) * v) / t for v in (velocity(x, at), other(x, at))]
        drift = drifts[1] + 2.3 * (drifts[0] - drifts[1]) if t <= 0.85 else drifts[0]
        x = x + drift * (end - t) + (math.sqrt(2 * t * (t - end)) * seeded(5, 3)(i) if i < 19 else 0)
    torch.testing.assert_close(found, x)


def test_the_state_is_float64_and_the_network_sees_float32():
    seen = []
    watched = lambda x, t: seen.append((x.dtype, t.dtype)) or velocity(x, t)      # noqa: E731
    single = euler_maruyama(watched, normal(4, 2).float(), sde_times(50), seeded(4, 2))
    assert single.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}
    assert euler_maruyama(velocity, normal(4, 2), sde_times(50), seeded(4, 2)).dtype == torch.float64

    # 100 noises of 1/8 each, which a float32 state of 2^23 would lose; the velocity takes away the score's drift
    at = torch.linspace(1, 1 - 100 / 128, 101, dtype=torch.float64)
    large = torch.full((1, 1), 2.0**23)
    moved = euler_maruyama(lambda x, t: -x / (2 - t[:, None]), large, at, lambda step: torch.ones(1, 1))
    walked = sum(math.sqrt(2 * float(t) / 128) for t in at[:-2])
    assert abs(float(moved - large) - walked) <= 4      # the network's float32 rounds, and the result


def test_an_item_does_not_depend_on_its_batch():
    noise = normal(6, 3).float()
    own = [lambda step, i=i: normal(1, 3, seed=100 * i + step) for i in range(6)]
    whole = euler_maruyama(velocity, noise, sde_times(10), lambda step: torch.cat([draw(step) for draw in own]))
    alone = torch.cat([euler_maruyama(velocity, noise[i : i + 1], sde_times(10), own[i]) for i in range(6)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-6)


def test_regs_times():
    times = sde_times(250)
    assert times.shape == (251,) and times.dtype == torch.float64
    assert times[0] == 1 and times[-1] == 0 and abs(float(times[-2]) - 0.04) < 1e-12
    torch.testing.assert_close(times[:-2] - times[1:-1], torch.full((249,), 0.96 / 249, dtype=torch.float64))
    shifted = sde_times(4, shift=3.0, stop=0.01)
    torch.testing.assert_close(shifted, 3 * sde_times(4, stop=0.01) / (1 + 2 * sde_times(4, stop=0.01)))
    assert sde_times(1).tolist() == [1.0, 0.0]


def test_wrong_input():
    x = torch.zeros(2, 3)
    for times in ([0.0, 0.5, 1.0], [1.5, 0.5, 0.0], [1.0, 0.5, -0.1]):
        with pytest.raises(InputError, match="fall from at most 1"):
            euler_maruyama(velocity, x, times, seeded(2, 3))
    with pytest.raises(InputError, match="diffusion"):
        euler_maruyama(velocity, x, [1.0, 0.0], seeded(2, 3), diffusion=-1.0)
    with pytest.raises(InputError, match=r"noise of step 0 is \(1, 3\)"):
        euler_maruyama(velocity, x, [1.0, 0.5, 0.0], seeded(1, 3))
    for wrong in ({"steps": 0}, {"steps": 5, "stop": 0.04}, {"steps": 5, "last": 1.0}, {"steps": 5, "shift": 0.0}):
        with pytest.raises(InputError, match="SDE's times"):
            sde_times(**wrong)
    assert "euler_maruyama" not in SAMPLERS      # it takes one argument more
