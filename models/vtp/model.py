"""The VTP tokenizer (arXiv 2512.13687): a vision transformer whose latents rebuild images and whose tokens understand them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.nn.dinov3_vit import TokenFeatures
from tokenizers_lab.nn.layer_tokens import checked_layers
from tokenizers_lab.nn.patch import to_grid, to_tokens
from tokenizers_lab.nn.text_transformer import TextTransformer
from tokenizers_lab.teachers.preprocess import IMAGENET_MEAN, IMAGENET_STD
from tokenizers_lab.text import build_text_tokenizer
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

from .config import ModelConfig, check_model
from .network import Contrast, PixelDecoder, Trunk


class VTP(ImageTokenizer):
    """VTP: images (B, 3, H, W) in [0, 1] to latents (B, C, H/patch, W/patch), any size that is a multiple of the patch.

    Encoding and decoding are deterministic. Latents are normalised by `latent_mean` and `latent_std` (per channel; 0 and 1 until
    they are collected). `features` is for probes; with its text encoder it also compares images with texts.
    """

    system = "vtp"
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        self.downsample = cfg.patch
        self.trunk = Trunk(cfg)
        self.decoder = PixelDecoder(cfg.decoder, cfg.latent_channels, cfg.patch)
        self.text: TextTransformer | None = None
        self.contrast: Contrast | None = None
        if cfg.text is not None:
            size = cfg.text
            self.text_tokenizer = build_text_tokenizer(size.text)
            self.text = TextTransformer(size.width, size.depth, size.heads, size.text.context, size.text.vocabulary,
                                        size.mlp_ratio, size.quick_gelu, size.projection_bias)
            self.contrast = Contrast(cfg, Trunk.semantic_width(cfg), size.width)
        self.add_latent_statistics(cfg.latent_channels)
        for name, value in (("pixel_mean", IMAGENET_MEAN), ("pixel_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """[0, 1] to the space of the trunk's input and the decoder's output (ImageNet's mean and deviation)."""
        return (images - self.pixel_mean) / self.pixel_std

    def denormalise(self, pixels: Tensor) -> Tensor:
        """The inverse of `normalise`, float32 or wider, not clamped."""
        wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        return wide * self.pixel_std + self.pixel_mean

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        """Normalised latents (B, C, h, w); there is no posterior to sample. Raises InputError on unusable images."""
        self.check_images(images)
        pixels = self.normalise(images)
        latents = self.trunk.latents(pixels)                                              # (B, N, C)
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return ImageEncoding(latents=to_grid((wide - self.latent_mean) / self.latent_std, *self.trunk.grid(pixels)))

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images in [0, 1] from normalised latents (B, C, h, w). Raises InputError on another shape."""
        if latents.dim() != 4 or latents.shape[1] != self.cfg.latent_channels or not latents.is_floating_point():
            wanted = f"float (B, {self.cfg.latent_channels}, h, w)"
            raise InputError(f"latents must be {wanted}, not {latents.dtype} {tuple(latents.shape)}")
        tokens = to_tokens(latents) * self.latent_std + self.latent_mean
        return self.denormalise(self.decoder(tokens, (latents.shape[2], latents.shape[3]))).clamp(0, 1)

    def features(self, images: Tensor, layers: Sequence[int] = (-1,)) -> list[TokenFeatures]:
        """Class and patch tokens after each of these blocks of the trunk (from 0; negative: from the end).

        They are normed by the trunk's final norm and never go through the bottleneck. Raises InputError on unusable images and
        on blocks that are not there.
        """
        self.check_images(images)
        return self.trunk.intermediate(self.normalise(images), checked_layers(layers, self.trunk.depth, "the trunk"))

    def image_embedding(self, images: Tensor) -> Tensor:
        """(B, W) of length 1, to be compared with `text_embedding`. Raises InputError on unusable images, ConfigError without
        a text encoder."""
        self.check_images(images)
        return F.normalize(self.project_images(self.trunk.semantic(self.normalise(images))), dim=-1)

    def text_embedding(self, texts: Sequence[str]) -> Tensor:
        """(B, W) of length 1. Raises ConfigError without a text encoder, WeightsMissing if the texts' tokenizer is not here."""
        return F.normalize(self.embed_texts(self.text_ids(texts).to(self.device)), dim=-1)

    def text_ids(self, texts: Sequence[str | None]) -> Tensor:
        """Ids (B, context) int64 on the CPU. Raises as `text_embedding`."""
        if self.text is None:
            raise ConfigError("this VTP has no text encoder (model.text is none)")
        return self.text_tokenizer.encode(texts)[0]

    def project_images(self, found: TokenFeatures) -> Tensor:
        """Semantic tokens to the space of texts, (B, W), not of length 1."""
        if self.contrast is None:
            raise ConfigError("this VTP has no text encoder (model.text is none)")
        pooled = found.class_token if self.cfg.image_feature == "cls" else found.patch_tokens.mean(dim=1)
        return self.contrast.projection(pooled)

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Ids (B, context) to the space of images, (B, W), not of length 1."""
        if self.text is None:
            raise ConfigError("this VTP has no text encoder (model.text is none)")
        return self.text(ids)
