"""Factorised vector quantization (Improved VQGAN, arXiv 2110.04627; Descript audio codec, arXiv 2306.06546, sec. 3.2).

Latents are projected to a few channels, looked up by cosine, and projected back. Numerically as in the released codecs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tokenizers_lab.draw import Draw

from .codebook import full_precision
from .result import QuantizerResult


@dataclass
class Level:
    """What one codebook makes of a batch."""

    quantized: Tensor      # (B, width, T)
    codes: Tensor          # (B, T) int64
    projected: Tensor      # (B, dim, T), the latents that were looked up
    commitment: Tensor     # (B,) loss that draws the latents to their rows
    codebook: Tensor       # (B,) loss that draws the rows to their latents


class FactorisedVQ(nn.Module):
    """One codebook of `size` rows of `dim` channels between two 1 × 1 projections."""

    def __init__(self, width: int, size: int, dim: int):
        super().__init__()
        self.size = size
        self.in_proj = weight_norm(nn.Conv1d(width, dim, 1))
        self.codebook = nn.Embedding(size, dim)
        self.out_proj = weight_norm(nn.Conv1d(dim, width, 1))

    def lookup(self, projected: Tensor) -> Tensor:
        """Codes (B, T) of projected latents (B, dim, T): the row of the largest cosine, the first on a tie; in float32."""
        with torch.no_grad(), full_precision(projected):
            rows = F.normalize(self.codebook.weight.float(), dim=1)
            directions = F.normalize(projected.float().transpose(1, 2), dim=2)               # (B, T, dim)
            return (directions @ rows.T).argmax(-1)

    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, T) of latents (B, width, T)."""
        return self.lookup(self.in_proj(latents))

    def decode(self, codes: Tensor) -> Tensor:
        """Latents (B, width, T) of codes (B, T)."""
        return self.out_proj(self.codebook(codes).transpose(1, 2))

    def forward(self, latents: Tensor) -> Level:
        """latents: (B, width, T). The gradient passes straight through the look-up, then through both projections."""
        projected = self.in_proj(latents)                                                    # (B, dim, T)
        codes = self.lookup(projected)
        rows = self.codebook(codes).transpose(1, 2)
        commitment = (projected.float() - rows.detach().float()).square().mean((1, 2))
        codebook = (projected.detach().float() - rows.float()).square().mean((1, 2))
        quantized = self.out_proj(projected + (rows - projected).detach())
        return Level(quantized, codes, projected, commitment, codebook)


class FactorisedRVQ(nn.Module):
    """Several factorised codebooks, each on what those before it left over. Gradients flow along the whole chain."""

    def __init__(self, width: int, codebooks: int, size: int, dim: int):
        super().__init__()
        self.levels: Any = nn.ModuleList(FactorisedVQ(width, size, dim) for _ in range(codebooks))      # of FactorisedVQ

    @property
    def codebooks(self) -> int:
        """How many codebooks there are."""
        return len(self.levels)

    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, K, T) of latents (B, width, T)."""
        codes = []
        for i, level in enumerate(self.levels):
            codes.append(level.encode(latents))
            if i + 1 < len(self.levels):
                latents = latents - level.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents (B, width, T) from codes (B, k, T) of the first k codebooks, k from 1 on."""
        latents = self.levels[0].decode(codes[:, 0])
        for i, level in enumerate(self.levels[1 : codes.shape[1]], start=1):
            latents = latents + level.decode(codes[:, i])
        return latents

    def forward(self, latents: Tensor, used: Tensor | None = None) -> QuantizerResult:
        """latents: (B, width, T). used: (B,) codebooks that count for each item (quantizer dropout); none: all.

        Dropout takes an item's later levels out of the output and the losses; all codes are computed, also those.
        Losses are means over the batch, summed over the levels: a level that is dropped counts as 0 and still divides.
        """
        return combine(self.chain(latents), used)

    def chain(self, latents: Tensor) -> list[Level]:
        """What every level makes of latents (B, width, T) and of what is left of them."""
        levels: list[Level] = []
        for level in self.levels:
            levels.append(level(latents))
            latents = latents - levels[-1].quantized
        return levels


def combine(levels: list[Level], used: Tensor | None = None) -> QuantizerResult:
    """The result of several levels, of which the first `used` (B,) count for each item; none: all."""
    counts = [torch.ones_like(level.commitment) if used is None else (i < used).to(level.commitment)      # (B,)
              for i, level in enumerate(levels)]
    layers = [level.quantized * count[:, None, None].to(level.quantized) for level, count in zip(levels, counts)]
    quantized = layers[0]
    for layer in layers[1:]:
        quantized = quantized + layer
    layer_losses = {
        "commitment": torch.stack([(level.commitment * count).mean() for level, count in zip(levels, counts)]),
        "codebook": torch.stack([(level.codebook * count).mean() for level, count in zip(levels, counts)]),
    }
    losses = {name: values.sum() for name, values in layer_losses.items()}
    return QuantizerResult(quantized, torch.stack([level.codes for level in levels], dim=1), losses, layers, layer_losses)


def dropout_levels(draw: Draw, purpose: str, items: int, codebooks: int, share: float) -> Tensor:
    """Quantizer dropout: how many codebooks count for each of `items`. The first int(items · share) get a uniform draw from
    1 … codebooks, the others all of them."""
    drawn = draw.integers(purpose, 1, codebooks + 1, (items,))
    return torch.where(torch.arange(items, device=drawn.device) < int(items * share), drawn, codebooks)
