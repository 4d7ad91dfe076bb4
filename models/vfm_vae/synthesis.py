"""The decoder of VFM-VAE: style-modulated ConvNeXt blocks, each of twice the size, each with an image of its size."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.nn.modulated import MappingNetwork, MapTransformer, ModulatedConvNeXt, ToImage, Upsample, group_norm
from tokenizers_lab.nn.transformer import BlockStack

from .adapter import Decompressor
from .config import ModelConfig, channels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrelu": partial(F.leaky_relu, negative_slope=0.2), "silu": F.silu, "gelu": F.gelu,
}
NOISE_SIDE = 8      # of block 0's noise map; doubles from block to block, whatever the image size


class LatentBranch(nn.Module):
    """Decompressed latents at the input size of one block: folded or unfolded, depthwise, pointwise, group-normed.

    fold: latent positions along a side of one input position; unfold: input positions along a side of one latent one.
    """

    def __init__(self, width: int, width_out: int, fold: int, unfold: int, activation: str):
        super().__init__()
        self.folds, self.unfolds = fold, unfold
        wide, inner = width * fold**2, width_out * unfold**2
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.pointwise = nn.Conv2d(wide, inner, 1, bias=False)
        self.norm = group_norm(inner, min(32, inner))
        self.activation = ACTIVATIONS[activation]
        self.out = nn.Conv2d(width_out, width_out, 1, bias=False)
        self.out_norm = group_norm(width_out, min(32, width_out))

    def forward(self, latents: Tensor) -> Tensor:
        """latents: (B, width, h, w). Returns (B, width_out, h · unfold / fold, w · unfold / fold)."""
        x = F.pixel_unshuffle(latents, self.folds)
        x = self.activation(self.norm(self.pointwise(self.depthwise(x))))
        return self.out_norm(self.out(F.pixel_shuffle(x, self.unfolds)))


class SynthesisBlock(nn.Module):
    """Doubles the size, refines, and adds its features to the running sum, from which its image comes."""

    def __init__(self, cfg: ModelConfig, number: int, before: int, latent: int, width: int, attention: int):
        """before: channels of the block before (0: there is none); latent: of the latent branch; attention: layers."""
        super().__init__()
        kernel, blur = 5 if number <= 1 else 7, (3 if number <= 2 else 5) * cfg.blur
        noise = NOISE_SIDE * 2**number if cfg.legacy_noise else 0
        layers = 1 + cfg.res_blocks * (3 if number <= 3 and cfg.deep else 2)
        self.upsample = Upsample(before + latent, width, blur, norm_last=number == 0)
        self.layers = nn.ModuleList(ModulatedConvNeXt(width, cfg.code, kernel, noise) for _ in range(layers))
        self.attention = nn.ModuleList(MapTransformer(width) for _ in range(attention))
        self.upsample_sum = Upsample(before, width, blur) if before else None
        self.to_image = ToImage(width, cfg.code)

    def forward(self, x: Tensor, total: Tensor | None, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, before + latent, h, w); total: the running sum (B, before, h, w); code: (B, code).

        Returns features and running sum (B, width, 2h, 2w) and the image (B, 3, 2h, 2w), float32 or wider, about [−1, 1].
        """
        x = self.upsample(x)
        for layer in self.layers:
            x = layer(x, code)
        for layer in self.attention:
            x = layer(x)
        if self.upsample_sum is None:
            total = x
        else:
            assert total is not None
            total = self.upsample_sum(total) + x
        image = self.to_image(total, code)
        return x, total, image if image.dtype == torch.float64 else image.float()


class Step(NamedTuple):
    """What one block makes."""

    features: Tensor      # (B, width, h, w)
    image: Tensor         # (B, 3, h, w) about [−1, 1]


class Synthesis(BlockStack):
    """All blocks, and the branches that give some of them the latents. `multiple`: what a latent grid's sides must divide by."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        widths, latent = channels(cfg), cfg.latent_channels * cfg.expansion
        depths = dict(zip(cfg.attention_blocks, cfg.attention_depths))
        first, grid = cfg.image_size // 2 ** (cfg.blocks - 1), cfg.image_size // cfg.downsample
        self.branches = nn.ModuleDict()
        self.blocks = nn.ModuleList()
        self.multiple = 1
        for i, width in enumerate(widths):
            entering = cfg.latent_widths[i] if i in cfg.latent_blocks else 0
            if entering:
                fold, unfold = ratio(grid, first * 2**i // 2, i)
                self.multiple = max(self.multiple, fold)
                try:
                    self.branches[str(i)] = LatentBranch(latent, entering, fold, unfold, cfg.latent_activation)
                except ValueError as error:
                    raise ConfigError(f"model.latent_widths.{i}: {error}") from error
            try:
                self.blocks.append(SynthesisBlock(cfg, i, widths[i - 1] if i else 0, entering, width, depths.get(i, 0)))
            except ValueError as error:
                raise ConfigError(f"model: block {i}: {error}") from error

    def latent_maps(self, latents: Tensor) -> dict[int, Tensor]:
        """What each block that has a branch is given of decompressed latents (B, C · expansion, h, w)."""
        return {int(i): branch(latents) for i, branch in self.branches.items()}

    def steps(self, maps: dict[int, Tensor], code: Tensor) -> Iterator[Step]:
        """Block after block, from the smallest on. maps: of `latent_maps`; code: (B, code)."""
        x, total = maps[0], None
        for i, block in enumerate(self.blocks):
            if i:
                x = torch.cat([x, maps[i]], dim=1) if i in maps else x
            x, total, image = self.run(block, x, total, code)      # type: ignore[arg-type]
            yield Step(x, image)

    def forward(self, latents: Tensor, code: Tensor) -> list[Tensor]:
        """Images (B, 3, h, w) about [−1, 1] of all blocks, the largest first, from decompressed latents (B, …, h, w)."""
        return [step.image for step in self.steps(self.latent_maps(latents), code)][::-1]


class Decoder(nn.Module):
    """Latents to images: decompression, global style code, synthesis."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.pooled, self.downsample = cfg.pooled, cfg.downsample
        wide = cfg.latent_channels * cfg.expansion
        self.decompress = Decompressor(cfg)
        self.mapping = MappingNetwork(wide * cfg.pooled**2, cfg.code)
        self.synthesis = Synthesis(cfg)

    def code(self, latents: Tensor) -> Tensor:
        """Style code (B, code) of decompressed latents (B, C · expansion, h, w)."""
        return self.mapping(F.adaptive_avg_pool2d(latents, self.pooled).flatten(1))

    def forward(self, latents: Tensor) -> list[Tensor]:
        """latents: (B, C, h, w), not normalised, any h and w. Returns the images of all sizes, about [−1, 1], the largest first:
        (B, 3, H, W) with H, W `downsample` times h, w, then its halves.

        A grid that the blocks cannot fold is continued at its right and lower edge, and the images are cut to size.
        """
        h, w = latents.shape[2:]
        wide = self.decompress(latents)
        code = self.code(wide)
        down, right = (-side % self.synthesis.multiple for side in (h, w))
        if down or right:
            wide = F.pad(wide, (0, right, 0, down), mode="replicate")
        images = self.synthesis(wide, code)
        if not (down or right):
            return images
        sizes = [(-(-h * self.downsample // 2**i), -(-w * self.downsample // 2**i)) for i in range(len(images))]
        return [image[:, :, :rows, :cols] for image, (rows, cols) in zip(images, sizes)]


def ratio(grid: int, size: int, block: int) -> tuple[int, int]:
    """(fold, unfold) from a latent grid to a block's input size. Raises ConfigError unless one divides the other."""
    if size < 1 or (grid % size and size % grid):
        raise ConfigError(f"latents cannot enter block {block}: it works at {size} positions a side, the latent grid has {grid}")
    return (grid // size, 1) if grid >= size else (1, size // grid)


