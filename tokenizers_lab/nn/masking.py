"""Random token masks (He et al. 2022, MAE): the visible tokens travel alone and in shuffled order, decoders put them back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TokenMask:
    """Which tokens of each item are visible. Sequences of visible tokens are in the order of `keep`."""

    keep: Tensor         # (B, n) int64: places of the visible tokens, shuffled
    masked: Tensor       # (B, N − n) int64: places of the masked ones
    restore: Tensor      # (B, N) int64: where each place's token stands in (visible, masked)


def random_mask(noise: Tensor, ratio: float) -> TokenMask:
    """Hide a share of the tokens: those with the largest noise. ceil(N · (1 − ratio)) stay visible.

    noise: (B, N), e.g. U(0, 1). ratio 0 hides nothing, but still shuffles.
    """
    shuffled = noise.argsort(dim=1)
    visible = math.ceil(noise.shape[1] * (1 - ratio))
    return TokenMask(keep=shuffled[:, :visible], masked=shuffled[:, visible:], restore=shuffled.argsort(dim=1))


def gather_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """tokens: (B, N, C), places: (B, n) int64. Returns the tokens at those places, (B, n, C)."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def restore_tokens(visible: Tensor, filler: Tensor, mask: TokenMask) -> Tensor:
    """visible: (B, n, C) in the order of `mask.keep`; filler: (1, 1, C). Returns all tokens in image order, (B, N, C)."""
    missing = filler.to(visible.dtype).expand(len(visible), mask.masked.shape[1], -1)
    return gather_tokens(torch.cat([visible, missing], dim=1), mask.restore)
