"""What every discrete quantizer returns."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class QuantizerResult:
    """Result of a quantizer on vectors (B, D, T) with K codebooks."""

    quantized: Tensor                                          # (B, D, T), with the straight-through gradient in training
    codes: Tensor                                              # (B, K, T) int64
    losses: dict[str, Tensor] = field(default_factory=dict)    # name: scalar with gradient, averaged or summed as the paper does
    layers: list[Tensor] = field(default_factory=list)         # K times (B, D, T): what each codebook adds to `quantized`
    layer_losses: dict[str, Tensor] = field(default_factory=dict)   # name: (K,), the same of each codebook
    health: dict[str, Tensor] = field(default_factory=dict)    # scalars to log: usage, perplexity, dead; see `codebook_health`


@torch.no_grad()
def codebook_health(codes: Tensor, size: int) -> dict[str, Tensor]:
    """How well codes (B, K, T) fill codebooks of `size` entries, as means over the K codebooks.

    usage: share of the entries that occur; perplexity: exp of the entropy of their frequencies, in [1, size].
    """
    books = codes.shape[1]
    offset = torch.arange(books, device=codes.device)[None, :, None] * size
    counts = torch.zeros(books * size, device=codes.device)
    ones = torch.ones((), device=codes.device).expand(codes.numel())
    counts = counts.index_add(0, (codes + offset).flatten(), ones).view(books, size)      # exact: whole numbers
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    entropy = -torch.special.xlogy(shares, shares).sum(1)
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp().mean()}
