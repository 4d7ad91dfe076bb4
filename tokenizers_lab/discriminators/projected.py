"""The projected discriminator of StyleGAN-T (Sauer et al. 2023): small heads on features of a frozen network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.nn.local_norm import LocalBatchNorm
from tokenizers_lab.nn.spectral_norm import spectral_norm
from tokenizers_lab.teachers.layers import hidden_layers, is_cnn, prefix_tokens, stage_features
from tokenizers_lab.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise

SLOPE = 0.2
LAYERS = (3, 6, 9, 12, 0)      # of a vision transformer of 12 blocks: behind every third, and what enters the first


class HeadBlock(nn.Module):
    """Spectral-normed circular convolution over the tokens, local batch norm, leaky ReLU."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
        self.conv, self.norm = spectral_norm(conv), LocalBatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, L)."""
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class DiscriminatorHead(nn.Module):
    """A logit for each token: a pointwise block, a residual block of nine tokens, a pointwise map. All spectral-normed."""

    def __init__(self, channels: int):
        super().__init__()
        self.point, self.wide = HeadBlock(channels, 1), HeadBlock(channels, 9)
        self.out = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """features: (B, channels, L). Returns logits (B, 1, L)."""
        h = self.point(features)
        return self.out((self.wide(h) + h) / 2**0.5)


class ProjectedHeads(nn.Module):
    """One head for each layer of features. What trains of the projected discriminator."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.heads = nn.ModuleList(DiscriminatorHead(width) for width in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features: (B, channels, L) of each layer. Returns all their logits, (B, Σ L)."""
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], dim=1)


class JudgeFeatures(nn.Module):
    """Features of a frozen vision network, always in eval mode; gradients flow to the images.

    `widths`: channels of each layer. A transformer's class token is added to every patch token.
    """

    network: Any

    def __init__(self, network: nn.Module, layers: Sequence[int] = LAYERS, provenance: str = "network given by the caller",
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        """layers: as `hidden_layers` counts them (last ones before the final norm), of a CNN its stages."""
        super().__init__()
        self.network, self.layers, self.provenance = network, list(layers), provenance
        self.mean, self.std = tuple(mean), tuple(std)
        self.is_cnn = is_cnn(network)
        config: Any = getattr(network, "config", None)
        if self.is_cnn:
            self.widths = [self.network.feature_info[layer]["num_chs"] for layer in layers]
        else:
            self.prefix = prefix_tokens(network)
            self.widths = [config.hidden_size if config is not None else self.network.num_features] * len(self.layers)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "JudgeFeatures":
        """Eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W) in [0, 1], of the size that the network shall see. Returns (B, channels, L) of each layer."""
        values = normalise(images, self.mean, self.std)
        if self.is_cnn:
            return [stage.flatten(2) for stage in stage_features(self.network, values, self.layers)]
        found, _ = hidden_layers(self.network, values, self.layers, final_norm=False)
        patches = [tokens[:, self.prefix :] + (tokens[:, :1] if self.prefix else 0) for tokens in found]
        return [tokens.transpose(1, 2) for tokens in patches]
