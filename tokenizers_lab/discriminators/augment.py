"""Differentiable augmentation in front of a discriminator (Zhao et al. 2020): colour, translation, cutout."""

import torch
from torch import Tensor

from tokenizers_lab.draw import Draw

TRANSLATION, CUTOUT = 0.125, 0.2      # shares of a side


def augment(images: Tensor, draw: Draw, purpose: str = "augment") -> Tensor:
    """Images (B, 3, H, W), about [−1, 1], each with its own brightness, saturation, contrast, shift (zeros enter) and square
    that is set to 0. Differentiable to the images."""
    one = (len(images), 1, 1, 1)
    x = images + (draw.uniform(f"{purpose}.brightness", one) - 0.5)
    x = towards(x, x.mean(1, keepdim=True), 2 * draw.uniform(f"{purpose}.saturation", one))
    x = towards(x, x.mean((1, 2, 3), keepdim=True), draw.uniform(f"{purpose}.contrast", one) + 0.5)
    limits = [int(side * TRANSLATION + 0.5) for side in x.shape[2:]]
    shifts = [draw.integers(f"{purpose}.shift{axis}", -limit, limit + 1, (len(x),)) for axis, limit in enumerate(limits)]
    x = translate(x, shifts[0], shifts[1])
    sizes = [int(side * CUTOUT + 0.5) for side in x.shape[2:]]
    centres = [draw.integers(f"{purpose}.cut{axis}", 0, side + 1 - size % 2, (len(x),))
               for axis, (side, size) in enumerate(zip(x.shape[2:], sizes))]
    return cut(x, centres[0], centres[1], sizes[0], sizes[1])


def towards(x: Tensor, mean: Tensor, share: Tensor) -> Tensor:
    """(x − mean) · share + mean."""
    return (x - mean) * share + mean


def translate(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """out[y, x] = in[y + down, x + right] for each item, 0 outside. x: (B, C, H, W); down, right: (B,) integers."""
    for axis, shift in ((2, down), (3, right)):
        size = x.shape[axis]
        position = torch.arange(size, device=x.device) + shift[:, None]                   # (B, size)
        shape = [len(x), 1, 1, 1]
        shape[axis] = size
        inside = ((position >= 0) & (position < size)).view(shape)
        index = position.clamp(0, size - 1).view(shape).expand_as(x)
        x = x.gather(axis, index) * inside
    return x


def cut(x: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """A rectangle about a centre (row, column), (B,) each, set to 0. One beyond the edge still blanks the edge line."""
    kept = []
    for centre, extent, size in ((row, height, x.shape[2]), (column, width, x.shape[3])):
        first = centre - extent // 2
        low, high = first.clamp(0, size - 1), (first + extent - 1).clamp(0, size - 1)
        position = torch.arange(size, device=x.device)
        kept.append((position >= low[:, None]) & (position <= high[:, None]) & (extent > 0))
    inside = kept[0][:, None, :, None] & kept[1][:, None, None, :]
    return x * ~inside
