"""The parts of VTP: trunk with bottleneck, pixel decoder, and what compares images with texts."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.nn.dinov3_vit import BlocksConfig, RotaryBlocks, RotaryViT, TokenFeatures
from tokenizers_lab.nn.patch import to_grid
from tokenizers_lab.nn.vit import init_linear

from .config import ModelConfig


class Trunk(RotaryViT):
    """The vision transformer, and the bottleneck that makes latents of its normed tokens."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.trunk, cfg.patch)
        self.ae_only = cfg.bottleneck_ae_only
        same = cfg.latent_channels == cfg.trunk.width
        self.bottleneck = nn.Identity() if same else nn.Linear(cfg.trunk.width, cfg.latent_channels, bias=False)
        self.bottleneck.apply(init_linear)

    @staticmethod
    def semantic_width(cfg: ModelConfig) -> int:
        """Channels of `semantic`."""
        return cfg.trunk.width if cfg.bottleneck_ae_only else cfg.latent_channels

    def semantic(self, pixels: Tensor, mask: Tensor | None = None, kept: Tensor | None = None) -> TokenFeatures:
        """Class and patch tokens for contrast and self-distillation: as `forward`, through the bottleneck unless `ae_only`."""
        found = self(pixels, mask, kept)
        return found if self.ae_only else self.narrow(found)

    def narrow(self, found: TokenFeatures) -> TokenFeatures:
        """Both kinds of tokens through the bottleneck."""
        return TokenFeatures(self.bottleneck(found.class_token), self.bottleneck(found.patch_tokens))

    def latents(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """Latents (B, N, C), not normalised, of normalised pixels (B, 3, H, W). kept: see `forward`."""
        return self.bottleneck(self(pixels, kept=kept).patch_tokens)


class PixelDecoder(RotaryBlocks):
    """Latents to pixels."""

    def __init__(self, cfg: BlocksConfig, channels: int, patch: int):
        super().__init__(cfg)
        self.patch = patch
        self.embed = nn.Linear(channels, cfg.width)
        self.pixels = nn.Linear(cfg.width, 3 * patch**2)
        self.apply(init_linear)

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normalised pixels (B, 3, H, W) from latents (B, N, C), not normalised, of a grid of (rows, columns)."""
        tokens = self.norm(self.outputs(self.embed(latents.to(self.embed.weight.dtype)), grid)[0])
        return F.pixel_shuffle(to_grid(self.pixels(tokens), *grid), self.patch)


class Contrast(nn.Module):
    """Brings images into the space of texts, and compares them there at a learned temperature."""

    def __init__(self, cfg: ModelConfig, width: int, width_out: int):
        super().__init__()
        shape = (1,) if cfg.nonscalar_logit_scale else ()
        self.projection = nn.Linear(width, width_out, bias=False)
        self.logit_scale = nn.Parameter(torch.full(shape, math.log(1 / cfg.temperature)))
        self.logit_bias = None if cfg.logit_bias is None else nn.Parameter(torch.full(shape, cfg.logit_bias))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Logits (images, texts) of embeddings (images, W) and (texts, W) of length 1."""
        logits = self.logit_scale.exp() * images @ texts.T
        return logits if self.logit_bias is None else logits + self.logit_bias
