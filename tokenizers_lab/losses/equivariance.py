"""Equivariance regularisation (EQ-VAE, Kouzelis et al. 2025): latents or images are scaled and turned, and so is the target."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.draw import Draw

SCALES = (0.25, 0.5, 0.75, 1.0)


class Change(NamedTuple):
    """What happens to a whole batch."""

    scale: float = 1.0           # of the sides
    turns: int = 0               # quarter turns, clockwise on the screen
    of_latents: bool = False     # the latents, before they are decoded; else the images, before they are encoded


def draw_change(draw: Draw, latent_share: float, scale_share: float, sides: tuple[int, ...], smallest: float = 1) -> Change:
    """Latents change with chance `latent_share` (any scale, any turn); else the images shrink with chance `scale_share`.

    sides: of the latent grid; scales at which it would not stay whole, or fall below `smallest`, are left out.
    """
    whole = [s for s in SCALES if s == 1 or all(side * s == int(side * s) and side * s >= smallest for side in sides)]
    pick = float(draw.uniform("equivariance.scale"))
    if float(draw.uniform("equivariance.branch")) < latent_share:
        return Change(whole[int(pick * len(whole))], int(draw.integers("equivariance.turns", 0, 4)), True)
    smaller = [s for s in whole if s < 1]
    if smaller and float(draw.uniform("equivariance.shrink")) < scale_share:
        return Change(smaller[int(pick * len(smaller))])
    return Change()


def scale_and_turn(x: Tensor, scale: float, turns: int, interpolation: str = "bilinear", antialias: bool = False) -> Tensor:
    """Maps or images (B, C, H, W) scaled, then turned by `turns` quarters clockwise on the screen."""
    if scale != 1:
        x = F.interpolate(x, scale_factor=scale, mode=interpolation, align_corners=False, antialias=antialias)
    return torch.rot90(x, turns, (-1, -2)) if turns % 4 else x
