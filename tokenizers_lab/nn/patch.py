"""Images to tokens and back."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches to tokens by one linear map: (B, channels, H, W) → (B, H/patch · W/patch, width), row by row."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__(channels, width, patch, stride=patch)

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, channels, H, W), H and W multiples of the patch."""
        return super().forward(input).flatten(2).transpose(1, 2)


def depth_to_space(tokens: Tensor, rows: int, cols: int, patch: int) -> Tensor:
    """Tokens whose channels are pixels, to images: (B, rows·cols, patch·patch·c) → (B, c, rows·patch, cols·patch).

    A token's channels go through its rows, then its columns, then the colours (colour fastest; not PixelShuffle's order).
    """
    pixels = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, cols))      # (B, rows, cols, patch, patch, c)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def resize_positions(positions: Tensor, rows: int, cols: int) -> Tensor:
    """Learned embeddings of a square grid, (1, n², width), for a rows × cols grid (bicubic): (1, rows·cols, width)."""
    side = round(positions.shape[1] ** 0.5)
    if (rows, cols) == (side, side):
        return positions
    grid = positions.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, cols), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


def to_grid(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """(B, rows·cols, C) → (B, C, rows, cols)."""
    return tokens.transpose(1, 2).unflatten(2, (rows, cols))


def to_tokens(grid: Tensor) -> Tensor:
    """(B, C, rows, cols) → (B, rows·cols, C)."""
    return grid.flatten(2).transpose(1, 2)


def init_positions(count: int, width: int) -> nn.Parameter:
    """Learned position embeddings (1, count, width), normal with standard deviation width^−½."""
    return nn.Parameter(torch.randn(1, count, width) * width**-0.5)


def sincos_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of a square grid, (1, side², width), width a multiple of 4: the column's half first, then the row's.

    width/4 frequencies 10000^(−j/(width/4)); each half is sines, then cosines. The device is the default one.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies               # (side, quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                                 # (side, 2 · quarter)
    cols, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([cols, rows], dim=-1).reshape(1, side**2, width).float()
