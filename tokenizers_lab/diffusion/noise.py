"""The noise that a diffusion decoder starts from."""

from math import prod

import torch
from torch import Tensor

SEED = 0      # of the noise that a decoder starts from where no generator is given


def start_noise(shape: tuple[int, ...], device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 1) of shape (B, ...), float32.

    generator: drawn for the whole batch, on the generator's device. None: every item gets the same values, from a fixed seed
    on the CPU, row by row, so that decoding is deterministic, an item of a batch comes out as if alone, and an item (T, ...)
    begins as a longer one does.
    """
    if generator is None:
        count = prod(shape[1:])
        fixed = torch.randn(-(-count // 16) * 16, generator=torch.Generator().manual_seed(SEED))      # PyTorch draws 16 at a time
        return fixed[:count].reshape(shape[1:]).to(device).expand(shape).clone()
    return torch.randn(shape, generator=generator, device=generator.device).to(device)
