"""Samplers of a flow: free functions sample(velocity, noise, times) → x that integrate dx/dt = velocity(x, t).

velocity: (x (B, ...), t (B,)) → (B, ...). The times go to the network as a vector, one an item, in float32 (float64 where x is).
noise: (B, ...) the state at the first time, drawn by the caller; give it in float32 to add up in float32 under autocast.
times: (n + 1,) strictly rising or falling, a tensor or numbers: any list of steps, by either clock (`FlowPath.times`).
They keep gradients (decoders call them under no_grad) and take any guidance: it wraps the velocity. All are deterministic but
`euler_maruyama`, which is no `Sampler`: it is given a noise for each step too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from tokenizers_lab.diffusion.flow import Velocity, shift_time
from tokenizers_lab.errors import ConfigError, InputError

Times = Tensor | Sequence[float]


class Sampler(Protocol):
    """What all deterministic samplers are."""

    def __call__(self, velocity: Velocity, noise: Tensor, times: Times) -> Tensor:
        """The state at the last of the times, of the noise's shape."""
        ...


def euler(velocity: Velocity, noise: Tensor, times: Times) -> Tensor:
    """Euler: the velocity at each step's beginning. One evaluation a step, first order."""
    x = noise
    for start, end in steps_of(times):
        x = x + (end - start) * velocity(x, at_time(start, x))
    return x


def euler_midpoint(velocity: Velocity, noise: Tensor, times: Times) -> Tensor:
    """Euler with the network told the step's middle: v(x_start, t_middle), as TaDiCodec samples.

    One evaluation a step. Only the time is taken at the middle, not the state: first order in general, second where v does not
    depend on x. `midpoint` is the second-order method.
    """
    x = noise
    for start, end in steps_of(times):
        x = x + (end - start) * velocity(x, at_time((start + end) / 2, x))
    return x


def midpoint(velocity: Velocity, noise: Tensor, times: Times) -> Tensor:
    """The mid-point method: half a step of Euler, then the velocity there for the whole step. Two evaluations, second order."""
    x = noise
    for start, end in steps_of(times):
        half = x + (end - start) / 2 * velocity(x, at_time(start, x))
        x = x + (end - start) * velocity(half, at_time((start + end) / 2, x))
    return x


def heun(velocity: Velocity, noise: Tensor, times: Times) -> Tensor:
    """Heun: the mean of the velocities at both ends of an Euler step. Two evaluations a step (the last too), second order."""
    x = noise
    for start, end in steps_of(times):
        first = velocity(x, at_time(start, x))
        second = velocity(x + (end - start) * first, at_time(end, x))
        x = x + (end - start) / 2 * (first + second)
    return x


def dopri5(velocity: Velocity, noise: Tensor, times: Times, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Dormand–Prince 5(4) with adaptive steps, by torchdiffeq; of the times only the ends count.

    rtol, atol: LightningDiT's. The step control looks at the whole batch: items are not exactly as if alone.
    Raises ConfigError where torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ConfigError("the sampler 'dopri5' needs a package: pip install torchdiffeq") from None
    steps = list(steps_of(times))
    wide = torch.promote_types(noise.dtype, torch.float32)      # steps that bfloat16 cannot resolve would never end
    ends = torch.tensor([steps[0][0], steps[-1][1]], dtype=wide, device=noise.device)

    def derivative(time: Tensor, x: Tensor) -> Tensor:
        return velocity(x, time.expand(len(x))).to(wide)

    return odeint(derivative, noise.to(wide), ends, method="dopri5", rtol=rtol, atol=atol)[-1].to(noise.dtype)


def euler_maruyama(
    velocity: Velocity, noise: Tensor, times: Times, step_noise: Callable[[int], Tensor], diffusion: float = 2.0
) -> Tensor:
    """Euler–Maruyama of the reverse-time SDE that has the flow's marginals (SiT, Ma et al. 2024; REG samples by it).

    By the noise clock of the path without σ_min, x_t = (1 − t) · data + t · N(0, 1):
    x += (v − ½ g² · score) · Δt + √(g² · |Δt|) · n, with g² = diffusion · t and score = −(x + (1 − t) · v) / t; no noise in the
    last step. The score is affine in v, so a guided v is the same as a guided drift.
    times: falling, within [0, 1]; REG's are `sde_times(250)`. step_noise: step 0, 1, … → N(0, 1) of the noise's shape, the
    caller's, so that each item can have a seed of its own; not asked for at the last step. diffusion: 0 is `euler`.
    The state is float64; the network is given float32 (float64 where noise is), and that is what comes back.
    Raises InputError on times by the other clock or outside [0, 1], a negative diffusion, or a step's noise of another shape.
    """
    steps = list(steps_of(times))
    if not 1 >= steps[0][0] > steps[-1][1] >= 0 or diffusion < 0:
        given = f"{steps[0][0]:g} to {steps[-1][1]:g} and {diffusion:g}"
        raise InputError(f"euler_maruyama needs times that fall from at most 1 to at least 0 and a diffusion ≥ 0, got {given}")
    wide = torch.promote_types(noise.dtype, torch.float32)
    x = noise.double()
    for i, (start, end) in enumerate(steps):
        seen = x.to(wide)
        v = velocity(seen, at_time(start, seen)).double()
        score = -(x + (1 - start) * v) / start
        x = x + (v - 0.5 * diffusion * start * score) * (end - start)
        if i < len(steps) - 1 and diffusion > 0:
            n = step_noise(i)
            if n.shape != x.shape:
                raise InputError(f"the noise of step {i} is {tuple(n.shape)}, the state {tuple(x.shape)}")
            x = x + math.sqrt(diffusion * start * (start - end)) * n.to(x)
    return x.to(wide)


def sde_times(steps: int, last: float = 0.04, shift: float = 1.0, stop: float = 0.0) -> Tensor:
    """The steps + 1 times of `euler_maruyama`, float64: linspace(1, last, steps), then stop; shifted as `FlowPath.times` does.

    last: where the last step, which adds no noise, begins (REG and SiT: 0.04). Raises InputError on values out of range.
    """
    if steps < 1 or shift <= 0 or not 0 <= stop < last < 1:
        given = f"{steps}, {last}, {stop} and {shift}"
        raise InputError(f"an SDE's times need steps ≥ 1, last in (0, 1), stop in [0, last) and shift > 0, got {given}")
    return shift_time(torch.cat([torch.linspace(1, last, steps, dtype=torch.float64), torch.tensor([stop]).double()]), shift)


SAMPLERS: dict[str, Sampler] = {
    "euler": euler, "euler_midpoint": euler_midpoint, "midpoint": midpoint, "heun": heun, "dopri5": dopri5,
}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises ConfigError on another."""
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler '{name}'; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def steps_of(times: Times) -> Iterator[tuple[float, float]]:
    """(start, end) of each step, in float64. Raises InputError unless the times are at least two and strictly monotone."""
    values = [float(t) for t in (times.tolist() if isinstance(times, Tensor) else times)]
    pairs = list(pairwise(values))
    if not pairs or not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise InputError(f"a sampler needs two or more times, strictly rising or falling, got {values[:8]}")
    return iter(pairs)


def at_time(time: float, x: Tensor) -> Tensor:
    """(B,) of that time, for a network that gets x (B, ...): float32, or float64 where x is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.full((x.shape[0],), time, dtype=dtype, device=x.device)      # len() would fix it in an export
