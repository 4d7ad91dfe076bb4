"""Flow matching along the straight path between data and noise. Time 0 is data, time 1 is noise."""

import math

from torch import Tensor

from tokenizers_lab.draw import Draw

BASE_DIMENSION = 4096      # numbers in a latent at which no shift is needed (32 × 32 × 4)


def interpolate(data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """(1 − t) · data + t · noise; time broadcasts against both."""
    return (1 - time) * data + time * noise


def resolution_shift(dimension: int, base: int = BASE_DIMENSION) -> float:
    """√(dimension / base): how much later in time a latent of that many numbers loses the same share of information
    (Esser et al. 2024, sec. 5.3.2, in the form of the RAE and RecTok codes)."""
    return math.sqrt(dimension / base)


def shift_time(uniform: Tensor, shift: float) -> Tensor:
    """s·u / (1 + (s − 1)·u): times in [0, 1] moved towards noise for s > 1, towards data for s < 1."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def lognorm_time(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(mean + std · n): logit-normal times from N(0, 1) (Esser et al. 2024, sec. 3.1)."""
    return (mean + std * normal).sigmoid()


def sample_time(draw: Draw, shape: tuple[int, ...], schedule: str, shift: float = 1.0, purpose: str = "time") -> Tensor:
    """Times of that shape: `shift` (shifted uniform), `lognorm` or `uniform`. Raises ValueError on another schedule."""
    if schedule == "lognorm":
        return lognorm_time(draw.normal(purpose, shape))
    if schedule == "shift":
        return shift_time(draw.uniform(purpose, shape), shift)
    if schedule == "uniform":
        return draw.uniform(purpose, shape)
    raise ValueError(f"unknown noise schedule '{schedule}'; known: shift, lognorm, uniform")
