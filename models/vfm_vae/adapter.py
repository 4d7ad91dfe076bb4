"""Between features and latents of VFM-VAE: multi-scale latent fusion on the way in, decompression on the way out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.nn.attn_projection import AttnProjection
from tokenizers_lab.nn.patch import to_grid, to_tokens

from .config import ModelConfig

CONV_GAIN = 0.5      # of Xavier's normal initialisation


def build_projection(kind: str, width: int, width_out: int, layers: int) -> Any:
    """An attention projection of tokens, or what a 1 × 1 convolution does to them. Raises ConfigError if widths do not divide."""
    if kind == "conv":
        linear = nn.Linear(width, width_out)
        nn.init.xavier_normal_(linear.weight, CONV_GAIN)
        nn.init.zeros_(linear.bias)
        return linear
    try:
        return AttnProjection(width, width_out, layers)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


class Compressor(nn.Module):
    """Maps of several layers to one map of latent moments: each is projected and folded to the latent grid, all are fused."""

    def __init__(self, cfg: ModelConfig, widths: Sequence[int], strides: Sequence[float]):
        """widths, strides: of the layers' maps, strides in pixels. Raises ConfigError if they do not fit the latent grid."""
        super().__init__()
        self.folds = [self.fold(cfg.downsample, stride) for stride in strides]
        self.layers = nn.ModuleList(
            build_projection(cfg.compress, width, out, cfg.compress_layers) for width, out in zip(widths, cfg.widths))
        fused = sum(out * fold**2 for out, fold in zip(cfg.widths, self.folds))
        outputs = cfg.latent_channels * (2 if cfg.latent == "gaussian" else 1)
        self.fuse = build_projection(cfg.compress, fused, outputs, cfg.compress_layers)
        if cfg.latent == "gaussian":
            last = self.fuse if isinstance(self.fuse, nn.Linear) else self.fuse.blocks[-1].proj
            nn.init.constant_(last.bias[cfg.latent_channels :], cfg.logvar_bias)

    @staticmethod
    def fold(downsample: int, stride: float) -> int:
        """Positions of a layer along a side of one latent position. Raises ConfigError unless it is a whole number."""
        ratio = downsample / stride
        if ratio < 1 or ratio != int(ratio):
            raise ConfigError(f"a layer of model.vfm has {ratio:g} positions a side of a latent one, which must be whole: change "
                              "model.vfm.scale, model.vfm.layers or model.downsample")
        return int(ratio)

    def compress(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Each layer's tokens (B, h·w, width · fold²) on the latent grid."""
        found = []
        for layer, fold, grid in zip(self.layers, self.folds, maps):
            tokens = layer(to_tokens(grid))
            folded = F.pixel_unshuffle(to_grid(tokens, grid.shape[2], grid.shape[3]), fold)
            found.append(to_tokens(folded))
        return found

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C, h, w) of each layer. Returns (B, 2C, h, w), mean and log-variance, or (B, C, h, w) of discrete latents."""
        grid = {(m.shape[2] / fold, m.shape[3] / fold) for m, fold in zip(maps, self.folds)}
        if len(grid) != 1 or any(side != int(side) for side in next(iter(grid))):
            raise InputError(f"the layers' maps do not fit one latent grid: {[tuple(m.shape[2:]) for m in maps]}")
        rows, cols = next(iter(grid))
        fused = self.fuse(torch.cat(self.compress(maps), dim=2))
        return to_grid(fused, int(rows), int(cols))


class Decompressor(nn.Module):
    """Latents to wider ones, by an attention projection over all positions of any grid."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        wide = cfg.latent_channels * cfg.expansion
        self.project = build_projection(cfg.decompress, cfg.latent_channels, wide, cfg.decompress_layers)

    def forward(self, latents: Tensor) -> Tensor:
        """latents: (B, C, h, w). Returns (B, C · expansion, h, w)."""
        return to_grid(self.project(to_tokens(latents)), latents.shape[2], latents.shape[3])
