"""Finite scalar quantization (arXiv 2309.15505) between two 1 × 1 projections."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .factorised import Level


class ProjectedFSQ(nn.Module):
    """Each of a few channels is bounded and rounded to its number of levels; a code numbers the combination. No codebook."""

    widths: Tensor
    bases: Tensor

    def __init__(self, width: int, levels: Sequence[int]):
        """Raises ValueError unless there are levels, each of at least 2 values."""
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ needs at least one level, each of 2 values or more, not {list(levels)}")
        self.size = prod(levels)
        self.in_proj = weight_norm(nn.Conv1d(width, len(levels), 1))
        self.out_proj = weight_norm(nn.Conv1d(len(levels), width, 1))
        bases = [prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("widths", torch.tensor(levels)[:, None], persistent=False)      # (d, 1)
        self.register_buffer("bases", torch.tensor(bases)[:, None], persistent=False)

    def round(self, projected: Tensor) -> Tensor:
        """Bounded and rounded to integers −⌊l / 2⌋ … , straight through. projected: (B, d, T); float32."""
        widths = self.widths.float()
        half = (widths - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.widths % 2 == 0, 0.5, 0.0)
        bounded = (projected.float() + (offset / half).atanh()).tanh() * half - offset
        return bounded + (bounded.round() - bounded).detach()

    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, T) of latents (B, width, T)."""
        return self.number(self.round(self.in_proj(latents)))

    def number(self, rounded: Tensor) -> Tensor:
        """The code (B, T) of each combination of integers (B, d, T)."""
        digits = rounded.detach().round().long() + self.widths // 2
        return (digits * self.bases).sum(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents (B, width, T) of codes (B, T)."""
        digits = codes[:, None] // self.bases % self.widths
        half = self.widths // 2
        return self.out_proj(((digits - half) / half).to(self.out_proj.bias))

    def forward(self, latents: Tensor) -> Level:
        """latents: (B, width, T). FSQ has no losses: they are 0."""
        projected = self.in_proj(latents)
        rounded = self.round(projected)
        quantized = self.out_proj((rounded / (self.widths // 2)).to(latents))
        nothing = rounded.new_zeros(len(latents))
        return Level(quantized, self.number(rounded), projected, nothing, nothing)
