"""Guidance: identities, and against formulas written out."""

import pytest
import torch

from tokenizers_lab.diffusion import samplers
from tokenizers_lab.diffusion.guidance import autoguided, conditioned, guided, rescaled, zero_guided
from tokenizers_lab.errors import InputError

X, TIME = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.8])
CODES = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def network(x, time, condition, gain=1.0):
    return gain * (x * time[:, None, None] + condition.sin() + 0.5 * condition.abs().sqrt() * x)


def forbidden(x, time):
    raise AssertionError("evaluated in vain")


conditional, unconditional = conditioned(network, CODES), conditioned(network, torch.zeros_like(CODES))
V_C, V_U = conditional(X, TIME), unconditional(X, TIME)


def test_scales_one_zero_and_between():
    assert torch.equal(guided(conditional, forbidden, 1.0, rescale=0.7)(X, TIME), V_C)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0)(X, TIME), V_U)
    torch.testing.assert_close(guided(conditional, unconditional, 2.5)(X, TIME), 2.5 * V_C - 1.5 * V_U)
    assert torch.equal(zero_guided(network, CODES, 2.5)(X, TIME), guided(conditional, unconditional, 2.5)(X, TIME))
    torch.testing.assert_close(conditioned(network, condition=CODES, gain=2.0)(X, TIME), 2 * V_C)


def test_outside_the_interval_is_the_conditional_velocity():
    inside = guided(conditional, unconditional, 2.5)(X, TIME)
    found = guided(conditional, unconditional, 2.5, interval=(0.5, 0.8))(X, TIME)      # both ends count; each item for itself
    assert torch.equal(found[0], V_C[0]) and torch.equal(found[1:], inside[1:])
    assert torch.equal(guided(conditional, forbidden, 2.5, interval=(0.85, 1.0))(X, TIME), V_C)
    with pytest.raises(InputError, match="interval"):
        guided(conditional, unconditional, 2.0, interval=(0.6, 0.5))


def test_rescaled_guidance_has_the_conditionals_deviation():
    g = 2.5 * V_C - 1.5 * V_U
    full = guided(conditional, unconditional, 2.5, rescale=1.0)(X, TIME)
    torch.testing.assert_close(full.std((1, 2)), V_C.std((1, 2)))
    found = guided(conditional, unconditional, 2.5, rescale=0.75, together=True)(X, TIME)
    torch.testing.assert_close(found, 0.75 * g * V_C.std() / g.std() + 0.25 * g)          # TaDiCodec's code: one for the batch
    torch.testing.assert_close(guided(conditional, unconditional, 2.5, rescale=0.0)(X, TIME), g)
    constant = torch.ones(2, 3)
    assert torch.equal(rescaled(constant, constant * 7, 1.0), constant)                   # no deviation to divide by
    with pytest.raises(InputError, match="rescale"):
        guided(conditional, unconditional, 2.0, rescale=1.5)


def test_a_padded_item_is_rescaled_as_if_alone():
    g, mask = 2.5 * V_C - 1.5 * V_U, torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    noisy = torch.where(mask[..., None], g, float("nan"))
    found = rescaled(noisy, V_C, 0.75, mask=mask)
    torch.testing.assert_close(found[1:2, :3], rescaled(g[1:2, :3], V_C[1:2, :3], 0.75))
    whole = guided(conditional, unconditional, 2.5, rescale=0.75, mask=mask)(X, TIME)
    torch.testing.assert_close(whole[mask], found[mask])


def test_guidance_of_the_first_channels_only():
    found = guided(conditional, unconditional, 2.5, channels=3)(X, TIME)
    torch.testing.assert_close(found[:, :3], (2.5 * V_C - 1.5 * V_U)[:, :3])
    assert torch.equal(found[:, 3:], V_C[:, 3:])


def test_autoguidance_moves_away_from_the_weak_model():
    weak = conditioned(network, CODES, gain=0.5)
    torch.testing.assert_close(autoguided(conditional, weak, 1.5)(X, TIME), 1.5 * V_C - 0.5 * weak(X, TIME))
    assert torch.equal(autoguided(conditional, forbidden, 1.5, interval=(0.0, 0.1))(X, TIME), V_C)
    torch.testing.assert_close(autoguided(conditional, conditional, 3.0)(X, TIME), V_C)      # nothing to move away from


def test_samplers_take_guided_velocities():
    sample = zero_guided(network, CODES, 2.0, interval=(0.25, 1.0), rescale=0.5)
    first, again = (samplers.euler_midpoint(sample, X, [0.0, 0.25, 0.5, 1.0]) for _ in range(2))
    plain = samplers.euler_midpoint(conditional, X, [0.0, 0.25, 0.5, 1.0])
    assert torch.equal(first, again) and not torch.allclose(first, plain)
    early = samplers.euler_midpoint(sample, X, [0.0, 0.25])                 # asked at 0.125, outside
    assert torch.equal(early, samplers.euler_midpoint(conditional, X, [0.0, 0.25]))
