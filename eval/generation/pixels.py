"""Generated images as the 8-bit files that evaluators read."""

import torch
from torch import Tensor

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.eval.features import to_uint8 as as_file

RULES = ("truncate", "nearest", "half_up")


def to_uint8(images: Tensor, rule: str = "truncate") -> Tensor:
    """uint8 (B, 3, H, W) of images in [0, 1] (clamped).

    truncate: the whole part of 255 · x (VTP, RecTok, RAE); half_up: that of 255 · x + ½ (VA-VAE and LightningDiT, as
    127.5 · x + 128 of [−1, 1]); nearest: the nearest, halves to even. Published numbers are of the system's own rule: another
    moves the images by up to half a level. Raises InputError on other shapes, types or NaN, ConfigError on another rule.
    """
    if rule not in RULES:
        raise ConfigError(f"there is no rule '{rule}' for 8-bit images; known: {', '.join(RULES)}")
    written = as_file(images, "nearest" if rule == "nearest" else "truncate")      # raises what is to be raised
    if rule != "half_up" or not images.is_floating_point():
        return written
    return (images.float().clamp(0, 1) * 255 + 0.5).clamp(max=255).to(torch.uint8)
