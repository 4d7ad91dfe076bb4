"""Guidance: wrappers that make one velocity of two. By either clock; samplers need not know.

  sample = guided(conditioned(network, codes), conditioned(network, torch.zeros_like(codes)), scale=2.0, rescale=0.75)
  x = euler(sample, noise, path.times(32))
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.diffusion.flow import Velocity, per_item
from tokenizers_lab.errors import InputError

SMALLEST_STD = 1e-6      # below, rescaling would divide by nothing (TaDiCodec's value)


def conditioned(network: Callable[..., Tensor], *condition: Any, **named: Any) -> Velocity:
    """The velocity of network(x, t, *condition, **named) under a fixed condition."""
    return lambda x, time: network(x, time, *condition, **named)


def guided(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float,
    interval: tuple[float, float] = (float("-inf"), float("inf")),
    rescale: float = 0.0,
    together: bool = False,
    mask: Tensor | None = None,
    channels: int | None = None,
) -> Velocity:
    """v_u + scale · (v_c − v_u) (Ho and Salimans 2022, counted so that 1 is the conditional and 0 the unconditional velocity).

    interval: times, both ends inclusive and each item by its own, in which to guide; outside, the conditional velocity
        (Kynkäänniemi et al. 2024). rescale, together, mask: see `rescaled`; 0 leaves the result as it is.
    channels: guide only the first so many of axis 1, the rest stay conditional (LightningDiT: 3).
    v_u is not evaluated where it does not count: scale 1, or no item inside the interval.
    Raises InputError on an interval that is empty or a rescale outside [0, 1].
    """
    low, high = interval
    if low > high or not 0 <= rescale <= 1:
        raise InputError(f"guidance needs an interval (low, high) and a rescale in [0, 1], got {interval} and {rescale}")
    if scale == 1:
        return conditional
    always = low == float("-inf") and high == float("inf")      # then no look at the times, which would wait for the device

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        v_c = conditional(x, time)
        inside = (time >= low) & (time <= high)
        if not always and not inside.any():
            return v_c
        v_u = unconditional(x, time)
        v = v_u + scale * (v_c - v_u)
        if channels is not None:
            v = torch.cat([v[:, :channels], v_c[:, channels:]], dim=1)
        if rescale > 0:
            v = rescaled(v, v_c, rescale, together, mask)
        return v if always else torch.where(per_item(inside, v), v, v_c)

    return velocity


def zero_guided(network: Callable[..., Tensor], condition: Tensor, scale: float, **options: Any) -> Velocity:
    """`guided` of network(x, t, condition) against the same network under a condition of zeros. options: those of `guided`."""
    return guided(conditioned(network, condition), conditioned(network, torch.zeros_like(condition)), scale, **options)


def autoguided(main: Velocity, weak: Velocity, scale: float, interval: tuple[float, float] | None = None) -> Velocity:
    """v_weak + scale · (v − v_weak): away from a smaller or less trained model of the same condition (Karras et al. 2024)."""
    return guided(main, weak, scale) if interval is None else guided(main, weak, scale, interval)


def rescaled(v: Tensor, conditional: Tensor, share: float, together: bool = False, mask: Tensor | None = None) -> Tensor:
    """share · v · std(v_c) / std(v) + (1 − share) · v: a guided v with the conditional's deviation (Lin et al. 2024, sec. 3.4).

    v, conditional: (B, ...). The deviation is each item's own, over the places of mask (bool over the first axes, such
    as (B, T)) if given, so that an item of a padded batch comes out as if alone; together: one over the whole batch, as in
    TaDiCodec's code. Where v has none, it stays as it is.
    """
    wanted, found = _deviation(conditional, together, mask), _deviation(v, together, mask)
    ratio = torch.where(found > SMALLEST_STD, wanted / found.clamp(min=SMALLEST_STD), 1.0)
    return (v * (share * ratio + (1 - share))).to(v.dtype)


def _deviation(v: Tensor, together: bool, mask: Tensor | None) -> Tensor:
    """Standard deviation over all axes but the first (over that too if together), to broadcast against v. Only ratios of it
    count, so n does as well as n − 1."""
    axes = tuple(range(0 if together else 1, v.dim()))
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    if mask is None:
        inside = torch.ones_like(v, dtype=torch.bool)
    else:
        inside = mask.bool().reshape(*mask.shape, *[1] * (v.dim() - mask.dim())).expand(v.shape)
    count = inside.sum(axes, keepdim=True)
    mean = torch.where(inside, v, 0).sum(axes, keepdim=True) / count.clamp(min=1)
    squares = torch.where(inside, v - mean, 0).square().sum(axes, keepdim=True)
    return (squares / count.clamp(min=1)).sqrt()
