"""Frozen vision networks whose features a tokenizer learns to predict."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError, InputError

from .networks import load_network
from .preprocess import PREPROCESSING, Preprocess, pixel_values, to_uint8

Grid = int | tuple[int, int]          # tokens (rows, columns); a number: that many a side


class VisionTeacher(nn.Module):
    """A frozen network in eval mode: images in [0, 1] in, patch features on the student's token grid out.

    `width`: channels of a feature. `provenance`: where the weights come from. `kind`: dinov3, dinov2, siglip or cnn,
    which decides how images are prepared. Always in eval mode; `features` gives no gradient, `logits` does.
    """

    network: Any                      # nn.Module of transformers or timm

    def __init__(
        self,
        network: nn.Module,
        kind: str,
        *,
        input_size: int = 0,
        grid: Grid | None = None,
        provenance: str = "network given by the caller",
        spec: Preprocess | None = None,
    ):
        """`input_size`: pixels a side given to the network, 0 as published: the student's image size (dinov3), 14 (the
        patch) pixels for each student token (dinov2), the network's own size (siglip, cnn). `grid`: the student's token
        grid, from which a CNN's stage is chosen (none: stride 16); no other kind needs it.
        `spec`: image processing, none: the published one of this kind. Raises ConfigError on an unknown kind."""
        super().__init__()
        if kind not in PREPROCESSING:
            raise ConfigError(f"there is no teacher kind '{kind}'; known: {', '.join(PREPROCESSING)}")
        self.kind, self.input_size, self.provenance = kind, input_size, provenance
        self.spec = spec or PREPROCESSING[kind]
        self.network = network.requires_grad_(False).eval()
        config: Any = getattr(network, "config", None)
        self.is_transformers = hasattr(config, "model_type")
        if kind == "cnn":
            self.network.to(memory_format=torch.channels_last)      # type: ignore[call-overload]   # a third less time
            self.stage, self.stride, self.width = choose_stage(network, self.network_size((0, 0), None), grid)
            self.prefix = 0
        elif self.is_transformers:
            self.width, self.stride = config.hidden_size, _side(config.patch_size)
            self.prefix = 0 if kind == "siglip" else 1 + getattr(config, "num_register_tokens", 0)
        else:
            self.width, self.stride = self.network.num_features, _side(self.network.patch_embed.patch_size)
            self.prefix = self.network.num_prefix_tokens
        self.eval()

    def train(self, mode: bool = True) -> "VisionTeacher":
        """A teacher stays in eval mode."""
        return super().train(False)

    @property
    def has_logits(self) -> bool:
        """Whether the network has a classifier."""
        return not self.is_transformers and bool(getattr(self.network, "num_classes", 0)) and not self.spec.quantise

    def to_uint8(self, images: Tensor) -> Tensor:
        """255·x truncated to uint8; images (B, 3, H, W) in [0, 1]."""
        return to_uint8(images)

    def preprocess(self, images: Tensor, size: Grid | None = None) -> Tensor:
        """Pixel values (B, 3, *size) from images (B, 3, H, W) in [0, 1]; size in pixels, none: the network's for these images."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(f"a teacher's images must be float (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        return pixel_values(images, self.network_size(images.shape[-2:], None) if size is None else _pair(size), self.spec)

    def network_size(self, image_size: tuple[int, ...], grid: Grid | None) -> tuple[int, int]:
        """Pixels (height, width) given to the network for students' images of `image_size` and their token grid."""
        if self.input_size:
            return self.input_size, self.input_size
        if self.kind == "dinov2" and grid is not None:
            h, w = _pair(grid)
            return h * self.stride, w * self.stride
        if self.kind in ("dinov2", "dinov3"):
            return image_size[0], image_size[1]
        if self.is_transformers:
            return _pair(self.network.config.image_size)
        return tuple(self.network.pretrained_cfg["input_size"][1:])

    def hidden(self, values: Tensor) -> Tensor:
        """Final tokens (B, prefix + N, width), class and register tokens first, from pixel values. A CNN has no prefix."""
        if self.kind == "cnn":
            options = {"indices": [self.stage], "intermediates_only": True, "stop_early": True, "output_fmt": "NCHW"}
            return self.network.forward_intermediates(values, **options)[0].flatten(2).transpose(1, 2)
        if not self.is_transformers:
            return self.network.forward_features(values)
        # SigLIP has fixed positions; the others adapt theirs by themselves.
        options = {"interpolate_pos_encoding": True} if self.kind == "siglip" else {}
        return self.network(pixel_values=values, **options).last_hidden_state

    def features(self, images: Tensor, grid: Grid) -> Tensor:
        """Patch features (B, h·w, width), float32 and row-major, on the student's token grid (h, w); without gradient.

        images: (B, 3, H, W) in [0, 1]. Class and register tokens are dropped; a grid of another size is interpolated
        bilinearly.
        """
        return self.class_and_features(images, grid)[1]

    @property
    def has_class_token(self) -> bool:
        """Whether the network sums the image up in a token of its own."""
        return self.prefix > 0

    @torch.no_grad()
    def class_and_features(self, images: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The class token (B, width) behind the last norm, float32, and the patch features as `features` gives them.

        Of a network without a class token, the mean of its own patch features stands for it.
        """
        h, w = _pair(grid)
        values = self.preprocess(images, self.network_size(images.shape[-2:], (h, w)))
        hidden = self.hidden(values).float()
        tokens = hidden[:, self.prefix :]                                          # (B, N, width)
        class_token = hidden[:, 0] if self.has_class_token else tokens.mean(1)     # (B, width)
        own = tuple(-(-side // self.stride) if self.kind == "cnn" else side // self.stride for side in values.shape[-2:])
        if own != (h, w):
            square = tokens.transpose(1, 2).unflatten(2, own)                      # (B, width, rows, columns)
            square = F.interpolate(square, (h, w), mode="bilinear", align_corners=False, antialias=own[0] > h or own[1] > w)
            tokens = square.flatten(2).transpose(1, 2)
        return class_token, tokens.contiguous()

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, 3, H, W) in [0, 1], with gradient. Raises ConfigError if there is no classifier."""
        if not self.has_logits:
            raise ConfigError(f"the {self.kind} teacher ({self.provenance}) has no classifier whose logits could be compared")
        return self.network(self.preprocess(images))


def build_vision_teacher(cfg: Any, grid: Grid | None = None) -> VisionTeacher:
    """The teacher of a config with the fields `backend`, `source`, `input_size`, `config`.

    backend: `transformers` (hub id or folder: DINOv3, DINOv2, SigLIP), `timm` (timm's name, hf-hub:ORG/NAME, or a folder),
    `asset` (a name of `toklab assets`, such as efficientnet-lite0), `random` (`config` is a transformers config;
    seeded weights, as `provenance` says). `grid`: the student's token grid, which chooses a CNN's stage.
    Raises WeightsMissing if the weights are not here and cannot be fetched, ConfigError on an unusable choice.
    """
    found = load_network(cfg.backend, cfg.source, dict(cfg.config or {}))
    spec = replace(PREPROCESSING[found.kind], **found.spec)
    return VisionTeacher(found.network, found.kind, input_size=cfg.input_size, grid=grid, provenance=found.provenance, spec=spec)


def choose_stage(network: Any, size: tuple[int, int], grid: Grid | None) -> tuple[int, int, int]:
    """(index, stride, channels) of the deepest stage of a timm CNN that is no coarser than the grid at that input size."""
    stages = list(network.feature_info)
    wanted = 16 if grid is None else max(size[0] // _pair(grid)[0], size[1] // _pair(grid)[1])
    fitting = [i for i, s in enumerate(stages) if s["reduction"] <= wanted] or [0]
    stage = stages[fitting[-1]]
    return fitting[-1], stage["reduction"], stage["num_chs"]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _side(patch: Any) -> int:
    return _pair(patch)[0]
