"""The noise that a diffusion decoder starts from."""

import math

import torch
from torch import Tensor


def start_noise(shape: tuple[int, ...], device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 1) of shape (B, ...), float32.

    generator: drawn for the whole batch, on the generator's device. None: every item gets the same values (`fixed_noise`), so
    that decoding is deterministic, an item of a batch comes out as if alone, and the noise of a clip (T, ...) begins as that of
    a longer one.
    """
    if generator is not None:
        return torch.randn(shape, generator=generator, device=generator.device).to(device)
    return fixed_noise(math.prod(shape[1:]), device).reshape(shape[1:]).expand(shape)


def fixed_noise(count: int, device: torch.device | str) -> Tensor:
    """The first `count` values of one sequence of N(0, 1), float32 (count,): Box and Muller's of hashed numbers.

    The same on every device, to rounding, and with every version of PyTorch; an exported program can compute it.
    """
    radius, angle = (uniform_hash(torch.arange(count, device=device) * 2 + odd) for odd in (0, 1))
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


def uniform_hash(numbers: Tensor) -> Tensor:
    """Numbers, int64 in [0, 2^32), to U(0, 1), float32 and never 0: the last steps of MurmurHash3 (Appleby, public domain)."""
    x = numbers
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x // 2**shift)) * factor) & 0xFFFFFFFF      # the product wraps around 2^64, which leaves these bits right
    x = x ^ (x // 2**16)
    return (x.float() + 0.5) * 2.0**-32
