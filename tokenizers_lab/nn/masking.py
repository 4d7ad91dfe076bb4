"""Token masks. Random ones (He et al. 2022, MAE): the visible tokens travel alone and in shuffled order, decoders put them back.
Block-wise ones (Bao et al. 2022, BEiT; Oquab et al. 2023, DINOv2): rectangles of tokens that a learned one replaces."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizers_lab.draw import Draw

BLOCK_ASPECTS = (0.3, 1 / 0.3)      # of a block, height by width
BLOCK_TOKENS = 4                    # smallest area that a block is drawn with
BLOCK_TRIES = 10                    # failed places in a row after which a mask stays smaller than wanted


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


def block_masks(items: int, grid: tuple[int, int], share: float, ratios: tuple[float, float], draw: Draw) -> Tensor:
    """Masks (items, N) bool, true where a token is hidden, on the draw's device.

    int(items · share) of them, at random places of the batch, hide something: their ratios are uniform in bins of equal width
    that make up `ratios`. grid: (rows, columns), N = rows · columns.
    """
    rng = random.Random(int(draw.integers("block_masks", 0, 2**62)))
    hidden = int(items * share)
    masks = torch.zeros(items, *grid, dtype=torch.bool)
    low, width = ratios[0], (ratios[1] - ratios[0]) / max(hidden, 1)
    for bin_number, item in enumerate(rng.sample(range(items), hidden)):
        ratio = low + width * (bin_number + rng.random())
        masks[item] = block_mask(grid, int(grid[0] * grid[1] * ratio), rng)
    return masks.flatten(1).to(draw.device)


def block_mask(grid: tuple[int, int], wanted: int, rng: random.Random) -> Tensor:
    """A mask (rows, columns) bool of `wanted` tokens, or somewhat fewer where no block fits: rectangles, one after the other."""
    mask = torch.zeros(grid, dtype=torch.bool)
    rows, columns = grid
    tries = 0
    while (left := wanted - int(mask.sum())) > 0 and tries < BLOCK_TRIES:
        tries += 1
        most = min(left, rows * columns // 2)
        area = rng.uniform(BLOCK_TOKENS, most)
        aspect = math.exp(rng.uniform(math.log(BLOCK_ASPECTS[0]), math.log(BLOCK_ASPECTS[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, side = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = mask[top : top + height, side : side + width]
        if 0 < int((~block).sum()) <= most:
            block.fill_(True)
            tries = 0
    return mask
