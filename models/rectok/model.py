"""The RecTok tokenizer (arXiv 2512.13421): a ViT autoencoder with a diagonal-Gaussian latent."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.layer_tokens import LayerTokens, checked_layers
from tokenizers_lab.nn.masking import TokenMask, gather_tokens, restore_tokens
from tokenizers_lab.nn.patch import PatchEmbed, depth_to_space, init_positions, resize_positions, to_grid, to_tokens
from tokenizers_lab.nn.rope import axial_table
from tokenizers_lab.nn.transformer import Transformer
from tokenizers_lab.quantizers.gaussian import DiagonalGaussian
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

from .config import ModelConfig, ViTConfig, check_model


class Encoder(nn.Module):
    """Images in [0, 1] to the moments of each token's latent."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        size = cfg.encoder
        outputs = cfg.latent_channels * (2 if cfg.variational else 1)
        self.patch = cfg.patch
        self.embed = PatchEmbed(3, size.width, cfg.patch)
        self.positions = init_positions((cfg.image_size // cfg.patch) ** 2, size.width)
        self.transformer = Transformer(size.width, size.depth, size.heads, cfg.qk_norm)
        self.head = nn.Linear(size.width, outputs)
        self.apply(init_linear)
        if cfg.variational:
            nn.init.constant_(self.head.bias[cfg.latent_channels :], cfg.logvar_bias)

    def forward(self, images: Tensor, mask: TokenMask | None = None) -> Tensor:
        """images: (B, 3, H, W) in [0, 1]. Returns moments (B, n, 2C), or (B, n, C) of a plain autoencoder.

        With a mask only the visible tokens are computed, in the mask's shuffled order; without, all, row by row.
        """
        tokens, rope = self.tokens(images)
        if mask is not None:
            tokens, rope = gather_tokens(tokens, mask.keep), rope[mask.keep]
        return self.head(self.transformer(tokens, rope))

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the transformer: tokens (B, N, width) and their rotary table (N, 2 · head width)."""
        rows, cols = images.shape[2] // self.patch, images.shape[3] // self.patch
        tokens = self.embed(images.to(self.embed.weight.dtype) * 2 - 1)
        tokens = tokens + resize_positions(self.positions, rows, cols)
        return tokens, axial_table(self.transformer.head_dim, rows, cols, tokens.device)


class Decoder(nn.Module):
    """Latents to images about [0, 1]; masked tokens are replaced by a learned one."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        size = cfg.decoder
        self.patch = cfg.patch
        self.embed = nn.Linear(cfg.latent_channels, size.width)
        self.mask_token = init_positions(1, size.width)
        self.positions = init_positions((cfg.image_size // cfg.patch) ** 2, size.width)
        self.transformer = Transformer(size.width, size.depth, size.heads, cfg.qk_norm)
        self.pixels = nn.Linear(size.width, 3 * cfg.patch**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        self.apply(init_linear)

    def forward(self, latents: Tensor, grid: tuple[int, int], mask: TokenMask | None = None) -> Tensor:
        """latents: (B, n, C), not normalised. Returns float32 images (B, 3, H, W) for a grid of (rows, columns), not clamped."""
        rows, cols = grid
        tokens = self.embed(latents.to(self.embed.weight.dtype))
        if mask is not None:
            tokens = restore_tokens(tokens, self.mask_token, mask)
        tokens = tokens + resize_positions(self.positions, rows, cols)
        tokens = self.transformer(tokens, axial_table(self.transformer.head_dim, rows, cols, tokens.device))
        images = self.smooth(depth_to_space(self.pixels(tokens), rows, cols, self.patch))
        return (images if images.dtype == torch.float64 else images.float()) * 0.5 + 0.5


class RecTok(ImageTokenizer):
    """RecTok: images (B, 3, H, W) in [0, 1] to latents (B, C, H/patch, W/patch), any size that is a multiple of the patch.

    Latents are normalised by `latent_mean` and `latent_std` (per channel; 0 and 1 until they are collected).
    """

    system = "rectok"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        self.downsample = cfg.patch
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.add_latent_statistics(cfg.latent_channels)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the images' tokens."""
        return images.shape[2] // self.cfg.patch, images.shape[3] // self.cfg.patch

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """Distribution of the latents, float32 (B, n, C), from the encoder's output."""
        return DiagonalGaussian.from_moments(moments, self.cfg.variational)

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        """Normalised latents (B, C, h, w): the posterior's mean, or a draw from it. Raises InputError on unusable images."""
        self.check_images(images)
        rows, cols = self.grid(images)
        posterior = self.posterior(self.encoder(images))
        latents = posterior.mode()
        if sample:
            noise = torch.randn(latents.shape, generator=generator, device=generator.device if generator else latents.device)
            latents = posterior.sample(noise.to(latents))
        return ImageEncoding(
            latents=to_grid((latents - self.latent_mean) / self.latent_std, rows, cols),
            posterior=posterior.map(lambda tokens: to_grid(tokens, rows, cols)),
        )

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images in [0, 1] from normalised latents (B, C, h, w). Raises InputError on another shape."""
        if latents.dim() != 4 or latents.shape[1] != self.cfg.latent_channels or not latents.is_floating_point():
            wanted = f"float (B, {self.cfg.latent_channels}, h, w)"
            raise InputError(f"latents must be {wanted}, not {latents.dtype} {tuple(latents.shape)}")
        tokens = to_tokens(latents) * self.latent_std + self.latent_mean
        return self.decoder(tokens, (latents.shape[2], latents.shape[3])).clamp(0, 1)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[LayerTokens]:
        """Patch tokens after each of these blocks of the encoder (from 0; negative: from the end), normed by its final norm.

        Raises InputError on unusable images and on blocks that are not there.
        """
        self.check_images(images)
        transformer = self.encoder.transformer
        blocks = checked_layers(layers, len(transformer.blocks))
        return [LayerTokens(tokens) for tokens in transformer.intermediate(*self.encoder.tokens(images), blocks)]


class SemanticTransformer(nn.Module):
    """Predicts a teacher's features of all tokens from the latents of the visible ones. Used in training only."""

    def __init__(self, latent_channels: int, size: ViTConfig, tokens: int, width_out: int):
        super().__init__()
        self.embed = nn.Linear(latent_channels, size.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.positions = init_positions(tokens, size.width)
        self.transformer = Transformer(size.width, size.depth, size.heads)
        self.out = nn.Linear(size.width, width_out)

    def forward(self, latents: Tensor, grid: tuple[int, int], mask: TokenMask | None = None) -> Tensor:
        """latents: (B, n, C), in the mask's order if there is one. Returns features (B, rows · cols, width_out)."""
        rows, cols = grid
        tokens = self.embed(latents)
        if mask is not None:
            tokens = restore_tokens(tokens, self.mask_token, mask)
        tokens = tokens + resize_positions(self.positions, rows, cols)
        return self.out(self.transformer(tokens, axial_table(self.transformer.head_dim, rows, cols, tokens.device)))


class SemanticMLP(nn.Module):
    """Predicts a teacher's features of each token from its own latent. It cannot fill in masked tokens."""

    def __init__(self, latent_channels: int, width_out: int):
        super().__init__()
        hidden = 4 * latent_channels
        self.mlp = nn.Sequential(nn.Linear(latent_channels, hidden), nn.GELU(), nn.Linear(hidden, width_out))

    def forward(self, latents: Tensor, grid: tuple[int, int], mask: TokenMask | None = None) -> Tensor:
        """latents: (B, N, C) of all tokens in image order. Returns features (B, N, width_out). Raises InputError with a mask."""
        if mask is not None:
            raise InputError("an mlp semantic decoder needs objective.mask_ratio 0: it cannot fill in masked tokens")
        return self.mlp(latents)


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02, biases 0, for linear maps and convolutions."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
