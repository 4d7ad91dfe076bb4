"""The VFM-VAE tokenizer (arXiv 2510.18457): a frozen foundation model, a small projection to latents, a strong decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.layer_tokens import LayerTokens, checked_layers
from tokenizers_lab.quantizers.fsq import ProjectedFSQ
from tokenizers_lab.quantizers.gaussian import DiagonalGaussian
from tokenizers_lab.quantizers.grouped import GroupedVQ
from tokenizers_lab.quantizers.result import QuantizerResult, codebook_health
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

from .adapter import Compressor
from .config import ModelConfig, check_model
from .synthesis import Decoder
from .vfm import Features, FoundationModel


class VFMVAE(ImageTokenizer):
    """VFM-VAE: images (B, 3, H, W) in [0, 1] to latents (B, C, h, w) or codes (B, K, h, w), any size that is a multiple of
    `downsample`.

    The foundation model is part of it, and is saved with it; it stays frozen. Continuous latents are normalised by `latent_mean`
    and `latent_std` (per channel; 0 and 1 until they are collected). Encoding gives the posterior's mean unless asked to sample.
    """

    system = "vfm_vae"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        self.downsample = cfg.downsample
        self.vfm = FoundationModel(cfg.vfm)
        self.encoder = Compressor(cfg, self.vfm.widths, self.vfm.strides)
        self.quantizer = build_quantizer(cfg)
        self.decoder = Decoder(cfg)
        self.add_latent_statistics(cfg.latent_channels)

    def requires_grad_(self, requires_grad: bool = True) -> "VFMVAE":
        """Of all but the foundation model, which stays frozen."""
        super().requires_grad_(requires_grad)
        self.vfm.requires_grad_(False)
        return self

    @property
    def discrete(self) -> bool:
        """Whether it gives codes."""
        return self.quantizer is not None

    def moments(self, images: Tensor, prior: float = 1.0) -> tuple[Tensor, Features]:
        """What the projection makes of images (B, 3, H, W) in [0, 1], and the foundation model's features.

        (B, 2C, h, w): mean and log-variance; of discrete latents (B, C, h, w). prior: the images are shrunk by this first.
        """
        features = self.vfm(images, prior)
        return self.encoder(features.layers), features

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """Distribution of the latents (B, C, h, w), float32 or wider; a point of discrete latents."""
        return DiagonalGaussian.from_moments(moments, not self.discrete, dim=1)

    def quantize(self, latents: Tensor, entropy: bool = False) -> QuantizerResult:
        """Of discrete latents (B, C, h, w): quantized (B, C, h, w), codes (B, K, h, w), losses."""
        flat = latents.flatten(2)
        if isinstance(self.quantizer, GroupedVQ):
            result = self.quantizer(flat, entropy)
        else:
            level = self.quantizer(flat)
            codes = level.codes[:, None]
            result = QuantizerResult(level.quantized, codes, health=codebook_health(codes, self.quantizer.size))
        result.quantized = result.quantized.unflatten(2, tuple(latents.shape[2:]))
        result.codes = result.codes.unflatten(2, tuple(latents.shape[2:]))
        return result

    def images(self, latents: Tensor) -> list[Tensor]:
        """For training: images about [−1, 1] of all sizes, the largest first, from latents (B, C, h, w), not normalised."""
        return self.decoder(latents)

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        """Normalised latents (B, C, h, w): the posterior's mean, or a draw from it; or codes (B, K, h, w).

        Raises InputError on unusable images.
        """
        self.check_images(images)
        moments, _ = self.moments(images)
        if self.discrete:
            return ImageEncoding(codes=self.quantize(moments).codes)
        posterior = self.posterior(moments)
        latents = posterior.mode()
        if sample:
            noise = torch.randn(latents.shape, generator=generator, device=generator.device if generator else latents.device)
            latents = posterior.sample(noise.to(latents))
        shape = (1, -1, 1, 1)
        normalised = (latents - self.latent_mean.view(shape)) / self.latent_std.view(shape)
        return ImageEncoding(latents=normalised, posterior=posterior)

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images in [0, 1] from normalised latents (B, C, h, w), or from codes (B, K, h, w). Raises InputError on others."""
        if self.discrete:
            plain = self.dequantize(latents)
        else:
            channels = self.cfg.latent_channels
            if latents.dim() != 4 or latents.shape[1] != channels or not latents.is_floating_point() or 0 in latents.shape:
                wanted = f"float (B, {channels}, h, w)"
                raise InputError(f"latents must be {wanted}, not {latents.dtype} {tuple(latents.shape)}")
            shape = (1, -1, 1, 1)
            plain = latents * self.latent_std.view(shape) + self.latent_mean.view(shape)
        image = self.images(plain.to(self.latent_mean.dtype))[0]
        return (image * 0.5 + 0.5).clamp(0, 1)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[LayerTokens]:
        """What the frozen foundation model says of images after each of these blocks, or stages of a CNN (from 0; negative: from
        the end): patch tokens, and the class token where it has one; of the last block behind the final norm, where its
        kind has one.

        Training changes nothing of them. Raises InputError on unusable images and on layers that are not there.
        """
        self.check_images(images)
        return self.vfm.tokens(images, checked_layers(layers, self.vfm.depth, "the foundation model"))

    def dequantize(self, codes: Tensor) -> Tensor:
        """Latents (B, C, h, w) of codes (B, K, h, w). Raises InputError on another shape or on codes that there are not."""
        books = self.quantizer.codebooks if isinstance(self.quantizer, GroupedVQ) else 1
        if codes.dim() != 4 or codes.shape[1] != books or codes.dtype != torch.int64 or 0 in codes.shape:
            raise InputError(f"codes must be int64 (B, {books}, h, w), not {codes.dtype} {tuple(codes.shape)}")
        if not codes.is_meta and not torch.compiler.is_compiling():
            low, high = codes.aminmax()
            if low < 0 or high >= self.quantizer.size:
                raise InputError(f"codes must be in [0, {self.quantizer.size}), not in [{low}, {high}]")
        flat = codes.flatten(2)
        found = self.quantizer.decode(flat if isinstance(self.quantizer, GroupedVQ) else flat[:, 0])
        return found.unflatten(2, tuple(codes.shape[2:]))

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """See ImageTokenizer. Raises InputError of discrete latents too."""
        if self.discrete:
            raise InputError("codes have no statistics to normalise by")
        super().set_latent_statistics(mean, std)

    def start_part(self, part: str, source: str) -> str:
        """See Tokenizer. The foundation model starts from its pretrained weights: a hub id, a folder, timm's name, an asset."""
        return self.vfm.start(source) if part == "vfm" else super().start_part(part, source)


def build_quantizer(cfg: ModelConfig) -> Any:
    """The quantizer of discrete latents; none for continuous ones."""
    own = cfg.quantizer
    if cfg.latent == "vq":
        return GroupedVQ(cfg.latent_channels, own.codebooks, own.size, own.beta, own.entropy_temperature)
    return ProjectedFSQ(cfg.latent_channels, own.levels) if cfg.latent == "fsq" else None
