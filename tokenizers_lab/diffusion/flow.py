"""Flow matching along straight paths between data and noise: points, targets, times, loss.

Time runs by one of two clocks, named after what stands at time 1; a velocity is always the derivative of x by its clock's time.
  "data":  0 is noise, 1 is data,  v = data − noise   UniFlow, TaDiCodec, LightningDiT, VTP, RecTok's generator
  "noise": 0 is data,  1 is noise, v = noise − data   RecTok's noising, RAE, REG, diffusers' sigmas
`FlowPath` holds the clock; `mirrored` reads a velocity by the other one. The plain functions say nothing about the clock, but for
`interpolate`, which is the noise clock's path.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import ConfigError, InputError

Velocity = Callable[[Tensor, Tensor], Tensor]      # (x (B, ...), times (B,)) → dx/dt (B, ...)

BASE_DIMENSION = 4096      # numbers in a latent at which no shift is needed (32 × 32 × 4)
CLOCKS = ("data", "noise")
DISTRIBUTIONS = ("uniform", "lognorm", "fat_lognorm")
NORMS = ("l1", "l2")


def interpolate(data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """(1 − t) · data + t · noise; time broadcasts against both."""
    return (1 - time) * data + time * noise


@dataclass(frozen=True)
class FlowPath:
    """The straight path between noise and data (Lipman et al. 2023, eq. 22; Liu et al. 2023), read by a clock.

    With τ the time since noise (t of the data clock, 1 − t of the noise clock): x = τ · data + (1 − (1 − σ_min) · τ) · noise.
    So σ_min · noise is left on the data. Times are () or (B,), one an item, or broadcast against x as they are.
    """

    clock: str = "data"         # what stands at time 1: data or noise
    sigma_min: float = 0.0      # share of the noise that is left at the data's end

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise ConfigError(f"unknown clock '{self.clock}'; known: {', '.join(CLOCKS)}")

    def since_noise(self, time: Tensor, x: Tensor) -> Tensor:
        """τ of those times, shaped to broadcast against x."""
        time = per_item(time, x)
        return time if self.clock == "data" else 1 - time

    def at(self, data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The point of the path at those times, like data and noise (B, ...)."""
        tau = self.since_noise(time, data)
        return tau * data + (1 - (1 - self.sigma_min) * tau) * noise

    def velocity(self, data: Tensor, noise: Tensor) -> Tensor:
        """The derivative of `at` by time, which a network learns: the same at all times."""
        towards_data = data - (1 - self.sigma_min) * noise
        return towards_data if self.clock == "data" else -towards_data

    def data_of(self, x: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
        """The data that x and its velocity point at: the one-step estimate."""
        tau, towards_data = self.since_noise(time, x), velocity if self.clock == "data" else -velocity
        return (1 - self.sigma_min) * x + (1 - (1 - self.sigma_min) * tau) * towards_data

    def noise_of(self, x: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
        """The noise that x and its velocity come from."""
        return x - self.since_noise(time, x) * (velocity if self.clock == "data" else -velocity)

    def times(self, steps: int, shift: float = 1.0, power: float = 1.0, stop: float = 0.0) -> Tensor:
        """The steps + 1 times of a sampler from noise to data, float64: (1 … stop)^(1/power), shifted, by this clock.

        shift: as in `shift_time` on the noise clock, s > 1 puts more steps near noise (LightningDiT's timestep_shift is 1/s).
        power: UniFlow's schedule pow_q, q = power; 1 is linear.
        stop: time of the noise clock before the shift, to end short of the data (RAE: 0.001).
        Codes that speak of n grid points take n − 1 steps. Raises InputError on values out of range.
        """
        if steps < 1 or shift <= 0 or power <= 0 or not 0 <= stop < 1:
            given = f"{steps}, {shift}, {power}, {stop}"
            raise InputError(f"sampling needs steps ≥ 1, shift > 0, power > 0 and 0 ≤ stop < 1, got {given}")
        noise_time = shift_time(torch.linspace(1, stop, steps + 1, dtype=torch.float64) ** (1 / power), shift)
        return 1 - noise_time if self.clock == "data" else noise_time


def per_item(time: Tensor, x: Tensor) -> Tensor:
    """Times (B,) as (B, 1, …) to broadcast against x (B, ...); others as they are."""
    return time.reshape(-1, *[1] * (x.dim() - 1)) if time.dim() == 1 else time


def mirrored(velocity: Velocity) -> Velocity:
    """The same flow by the other clock: (x, t) → −v(x, 1 − t)."""
    return lambda x, time: -velocity(x, 1 - time)


def resolution_shift(dimension: int, base: int = BASE_DIMENSION) -> float:
    """√(dimension / base): how much later in time a latent of that many numbers loses the same share of information
    (Esser et al. 2024, sec. 5.3.2, in the form of the RAE and RecTok codes)."""
    return math.sqrt(dimension / base)


def shift_time(uniform: Tensor, shift: float) -> Tensor:
    """s·u / (1 + (s − 1)·u): times in [0, 1] moved towards 1 for s > 1, towards 0 for s < 1. Mirrored: 1/s from the other end."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def lognorm_time(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(mean + std · n): logit-normal times from N(0, 1) (Esser et al. 2024, sec. 3.1)."""
    return (mean + std * normal).sigmoid()


def lognorm_time_below(uniform: Tensor, high: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Logit-normal times cut off at `high` in (0, 1): the inverse distribution function at U(0, 1), in float64 inside (RAE)."""
    limit = torch.tensor((math.log(high / (1 - high)) - mean) / std, dtype=torch.float64, device=uniform.device)
    normal = torch.special.ndtri(uniform.double() * torch.special.ndtr(limit))
    return lognorm_time(normal, mean, std).to(uniform.dtype)


@dataclass
class TimeConfig:
    """The distribution of a training step's times. The clock is the path's: these are numbers in [0, 1]."""

    distribution: str = "uniform"    # uniform, lognorm (logit-normal) or fat_lognorm (logit-normal mixed with uniform)
    mean: float = 0.0                # of the normal behind lognorm and fat_lognorm
    std: float = 1.0                 # its standard deviation
    uniform_share: float = 0.1       # share of fat_lognorm's times that are uniform (FlowMo's value)
    high: float = 1.0                # uniform and lognorm times stay below
    shift: float = 1.0               # s·t / (1 + (s − 1)·t) of the times drawn: s > 1 moves them towards 1
    mirror: bool = False             # 1 − t at last: a shift towards 0 (RecTok's generator: uniform, shift √8, mirrored)


def draw_times(cfg: TimeConfig, draw: Draw, shape: tuple[int, ...], purpose: str = "time") -> Tensor:
    """Times in [0, 1] of that shape, float32. fat_lognorm draws also under `purpose` + "_uniform" and "_mixture".

    Raises ConfigError on an unknown distribution or values out of range.
    """
    if cfg.std <= 0 or cfg.shift <= 0 or not 0 <= cfg.uniform_share <= 1 or not 0 < cfg.high <= 1:
        raise ConfigError(f"times need std > 0, shift > 0, uniform_share in [0, 1] and high in (0, 1]: {cfg}")
    if cfg.distribution == "uniform":
        times = draw.uniform(purpose, shape) * cfg.high
    elif cfg.distribution == "lognorm" and cfg.high < 1:
        times = lognorm_time_below(draw.uniform(purpose, shape), cfg.high, cfg.mean, cfg.std)
    elif cfg.distribution == "lognorm":
        times = lognorm_time(draw.normal(purpose, shape), cfg.mean, cfg.std)
    elif cfg.distribution == "fat_lognorm":
        uniform = draw.uniform(f"{purpose}_mixture", shape) < cfg.uniform_share
        times = torch.where(
            uniform, draw.uniform(f"{purpose}_uniform", shape), lognorm_time(draw.normal(purpose, shape), cfg.mean, cfg.std)
        )
    else:
        raise ConfigError(f"unknown distribution of times '{cfg.distribution}'; known: {', '.join(DISTRIBUTIONS)}")
    times = shift_time(times, cfg.shift)
    return 1 - times if cfg.mirror else times


def sample_time(draw: Draw, shape: tuple[int, ...], schedule: str, shift: float = 1.0, purpose: str = "time") -> Tensor:
    """Times of that shape: `shift` (shifted uniform), `lognorm` or `uniform`. Raises ValueError on another schedule."""
    known = {"shift": TimeConfig(shift=shift), "lognorm": TimeConfig("lognorm"), "uniform": TimeConfig()}
    if schedule not in known:
        raise ValueError(f"unknown noise schedule '{schedule}'; known: {', '.join(known)}")
    return draw_times(known[schedule], draw, shape, purpose)


def frame_mask(lengths: Tensor, frames: int, starts: Tensor | None = None) -> Tensor:
    """(B, frames) bool: frames from `starts` (0 if not given; a prompt's length) to `lengths`, both (B,) integers."""
    index = torch.arange(frames, device=lengths.device)
    inside = index < lengths[:, None]
    return inside if starts is None else inside & (index >= starts[:, None])


def flow_loss(predicted: Tensor, target: Tensor, norm: str = "l2", mask: Tensor | None = None) -> Tensor:
    """Mean |v̂ − v| (l1) or (v̂ − v)² (l2), a scalar, in float32 at least.

    predicted, target: (B, ...), of one shape. mask: bool or 0/1 over their first axes, (B, T) for frames (B, T, bands): only
    those places count, each place once, so long items weigh more; without any, the loss is 0 and keeps its graph.
    Raises InputError on shapes that do not fit, ConfigError on another norm.
    """
    if norm not in NORMS:
        raise ConfigError(f"unknown norm of the flow loss '{norm}'; known: {', '.join(NORMS)}")
    if predicted.shape != target.shape or (mask is not None and mask.shape != target.shape[: mask.dim()]):
        shapes = [tuple(t.shape) for t in (predicted, target, mask) if t is not None]
        raise InputError(f"predicted, target and mask of a flow loss must fit, got {', '.join(map(str, shapes))}")
    wide = torch.promote_types(predicted.dtype, torch.float32)
    difference = predicted.to(wide) - target.to(wide)
    error = difference.abs() if norm == "l1" else difference.square()
    if mask is None:
        return error.mean()
    # where, not a product: what a network says of padding may be infinite
    inside = mask.bool()
    kept = torch.where(inside.reshape(*mask.shape, *[1] * (error.dim() - mask.dim())), error, 0)
    return kept.sum() / (inside.sum().clamp(min=1) * (error.numel() // mask.numel()))
