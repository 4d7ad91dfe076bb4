"""The frozen foundation model in front of VFM-VAE: built from the config, then given pretrained weights; it never trains."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import load_weights
from tokenizers_lab.nn.layer_tokens import LayerTokens
from tokenizers_lab.nn.patch import to_tokens
from tokenizers_lab.teachers.layers import blocks_of, hidden_layers, is_cnn, number_of, prefix_tokens, stage_features
from tokenizers_lab.teachers.networks import ASSET_NETWORKS, from_asset, from_timm, local_folder
from tokenizers_lab.teachers.preprocess import HALF, IMAGENET_MEAN, IMAGENET_STD, normalise

from .config import VFMConfig

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sight:
    """How a kind of network is given its images, and which tokens are its last layer."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str                # of the resize in front of it
    judged: str                       # of images in losses and discriminators
    prior_antialias: bool = True      # of the shrinking by the equivariance prior
    final_norm: bool = True           # whether layer −1 is behind the final norm


# implementation notes, sections 2 and 10; DINOv3 and CNNs are ours
SIGHTS = {
    "siglip": Sight(HALF, HALF, "bilinear", "bilinear"),
    "dinov2": Sight(IMAGENET_MEAN, IMAGENET_STD, "bicubic", "bicubic"),
    "dinov3": Sight(IMAGENET_MEAN, IMAGENET_STD, "bicubic", "bicubic"),
    "mae": Sight(IMAGENET_MEAN, IMAGENET_STD, "bilinear", "bilinear", prior_antialias=False),
    "clip": Sight(CLIP_MEAN, CLIP_STD, "bilinear", "bicubic", prior_antialias=False, final_norm=False),
    "cnn": Sight(HALF, HALF, "bicubic", "bicubic"),
}
# part of a model_type or an architecture's name: kind; the first that fits counts
NAMES = {"siglip": "siglip", "dinov2": "dinov2", "dinov3": "dinov3", "mae": "mae", "eva": "clip", "clip": "clip"}


class Features(NamedTuple):
    """What the foundation model sees."""

    layers: list[Tensor]                    # a map (B, C, h, w) of each layer of the config, float32 or wider
    pixels: Tensor                          # (B, 3, H, W) that it was given
    output: Any                             # its own output, of transformers or timm


class FoundationModel(nn.Module):
    """A frozen vision network, always in eval mode and without gradient: images in [0, 1] to maps of its layers.

    `widths`: channels of each layer; `strides`: pixels of the original image a side of each layer's position.
    """

    network: Any

    def __init__(self, cfg: VFMConfig):
        super().__init__()
        self.cfg = cfg
        self.network = build_network(cfg)
        self.is_cnn = is_cnn(self.network)
        self.kind = cfg.kind or kind_of(cfg, self.is_cnn)
        self.sight = SIGHTS[self.kind]
        if self.is_cnn:
            stages = list(self.network.feature_info)
            if any(not -len(stages) <= layer < len(stages) for layer in cfg.layers):
                raise ConfigError(f"model.vfm.layers {list(cfg.layers)}: {cfg.name} has the stages 0 to {len(stages) - 1}")
            self.depth = len(stages)
            self.widths = [stages[layer]["num_chs"] for layer in cfg.layers]
            self.strides = [stages[layer]["reduction"] / cfg.scale for layer in cfg.layers]
        else:
            self.depth = len(blocks_of(self.network))
            for layer in cfg.layers:
                number_of(layer, self.depth)
            config: Any = getattr(self.network, "config", None)
            patch = config.patch_size if config is not None else self.network.patch_embed.patch_size
            self.patch = patch if isinstance(patch, int) else patch[0]
            self.prefix = prefix_tokens(self.network)
            self.widths = [config.hidden_size if config is not None else self.network.num_features] * len(cfg.layers)
            self.strides = [self.patch / cfg.scale] * len(cfg.layers)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "FoundationModel":
        """Eval mode, whatever is asked."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "FoundationModel":
        """No gradient, whatever is asked."""
        return super().requires_grad_(False)

    def preprocess(self, images: Tensor, prior: float = 1.0) -> Tensor:
        """Pixel values from images (B, 3, H, W) in [0, 1]; prior: scale at most 1, applied first and on its own."""
        wide = images if images.dtype == torch.float64 else images.float()
        if prior != 1:
            wide = resize_by(wide, prior, self.sight.interpolation, self.sight.prior_antialias)
        wide = resize_by(wide, self.cfg.scale, self.sight.interpolation, self.cfg.scale < 1)
        return normalise(wide, self.sight.mean, self.sight.std)

    @torch.no_grad()
    def forward(self, images: Tensor, prior: float = 1.0) -> Features:
        """images: (B, 3, H, W) in [0, 1]. prior: see `preprocess`."""
        pixels = self.preprocess(images, prior)
        values = pixels.to(next(self.network.parameters()).dtype)
        if self.is_cnn:
            maps, output = stage_features(self.network, values, self.cfg.layers), None
        else:
            tokens, output = hidden_layers(self.network, values, self.cfg.layers, self.sight.final_norm)
            rows, cols = values.shape[2] // self.patch, values.shape[3] // self.patch
            maps = [t[:, self.prefix :].transpose(1, 2).unflatten(2, (rows, cols)) for t in tokens]
        return Features([m if m.dtype == torch.float64 else m.float() for m in maps], pixels, output)

    @torch.no_grad()
    def tokens(self, images: Tensor, layers: Sequence[int]) -> list[LayerTokens]:
        """After these blocks, or stages of a CNN, from 0, of images (B, 3, H, W) in [0, 1]; the last block as layer −1."""
        values = self.preprocess(images).to(next(self.network.parameters()).dtype)
        if self.is_cnn:
            return [LayerTokens(to_tokens(stage)) for stage in stage_features(self.network, values, layers)]
        numbers = [-1 if layer == self.depth - 1 else layer + 1 for layer in layers]
        found, _ = hidden_layers(self.network, values, numbers, self.sight.final_norm)
        return [LayerTokens(t[:, self.prefix :], t[:, 0] if self.prefix else None) for t in found]

    def start(self, source: str) -> str:
        """Take the pretrained weights of a hub id, a folder, timm's name or an asset; returns where they are from.

        Raises WeightsMissing if they are not here and cannot be fetched, CheckpointError if they do not fit.
        """
        if source in ASSET_NETWORKS:
            found = from_asset(source)
        elif self.cfg.backend == "timm":
            found = from_timm(source)
        else:
            return start_transformers(self.network, source)
        own = self.network.state_dict()
        load_weights(self.network, {k: v for k, v in found.network.state_dict().items() if k in own}, source)   # no classifier
        return found.provenance


def resize_by(images: Tensor, scale: float, interpolation: str, antialias: bool) -> Tensor:
    """Images (B, C, H, W) of `scale` times the size."""
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode=interpolation, align_corners=False, antialias=antialias)


def kind_of(cfg: VFMConfig, cnn: bool) -> str:
    """The kind that a network's name tells. Raises ConfigError if it tells none."""
    if cnn:
        return "cnn"
    name = cfg.name if cfg.backend == "timm" else str(cfg.config["model_type"])
    for part, kind in NAMES.items():
        if part in name.lower():
            return kind
    raise ConfigError(f"how '{name}' is given its images is not known: set model.vfm.kind to one of {', '.join(SIGHTS)}")


def build_network(cfg: VFMConfig) -> Any:
    """The network that the config describes, with random weights. Raises ConfigError if there is none."""
    if cfg.backend == "timm":
        return build_timm(cfg.name)
    from transformers import AutoConfig, AutoModel

    options = dict(cfg.config)
    if "model_type" not in options:
        raise ConfigError("model.vfm.config needs a model_type of transformers, such as siglip_vision_model")
    if options["model_type"] == "vit_mae":
        options["mask_ratio"] = 0.0
    try:
        return AutoModel.from_config(AutoConfig.for_model(**options))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.vfm.config is no network of transformers: {str(error).splitlines()[0][:160]}") from error


def build_timm(name: str) -> Any:
    """timm's network of that name, for images of any size. Raises ConfigError."""
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(f"model.vfm.name: timm has no network '{name}'" + (f"; nearest: '{near[0]}'" if near else ""))
    try:
        network: Any = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:      # a CNN has no such option
        network = timm.create_model(name, pretrained=False, num_classes=0)
    if not hasattr(network, "forward_intermediates") or (not is_cnn(network) and not hasattr(network, "blocks")):
        raise ConfigError(f"model.vfm.name: timm's '{name}' does not give the features of its layers")
    return network


def start_transformers(network: Any, source: str) -> str:
    """Weights of a folder or hub id of transformers; the config stays ours."""
    folder: Path = local_folder(source)
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    try:
        found, info = type(network).from_pretrained(folder, config=network.config, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit model.vfm: {str(error).splitlines()[0][:160]}") from error
    if info["missing_keys"]:
        raise CheckpointError(f"{folder} does not fit model.vfm: it lacks {sorted(info['missing_keys'])[0]}")
    load_weights(network, found.state_dict(), str(folder))
    return f"{source} (transformers)"
