"""Vectors that represent an image: of a tokenizer's latents or layers, of a frozen teacher, or mere pixels, for probes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import ConfigError, InputError
from tokenizers_lab.teachers.networks import ASSET_NETWORKS
from tokenizers_lab.teachers.vision import VisionTeacher, build_vision_teacher
from tokenizers_lab.tokenizer import ImageTokenizer

from .candidates import describe
from .latents import raw_latents

BACKENDS = ("asset", "timm", "transformers", "random")
PIXELS = 8                        # a side of the pixel baseline
PATCH = 16                        # pixels of a token of a teacher whose input follows the image's size


@dataclass(frozen=True)
class ImageFeatures:
    """Something that gives a vector for each image: a row of a probe."""

    label: str
    role: str                                                    # model, untrained, teacher or baseline
    name: str                                                    # what the vectors are, for the result
    compute: Callable[[Tensor, Sequence[str]], Tensor]           # images (B, 3, H, W) in [0, 1], keys -> float (B, D)
    description: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    multiple: int = 1                                            # of which sides of images must be multiples


@dataclass
class TeacherChoice:
    """What `build_vision_teacher` takes."""

    backend: str
    source: str
    input_size: int = 0
    config: dict[str, Any] = field(default_factory=dict)


# --- tokenizers -------------------------------------------------------------------------------------------------------------

def latent_features(
    tokenizer: ImageTokenizer, label: str, role: str = "model", grid: int = 0, sample: bool = False, seed: int = 0
) -> ImageFeatures:
    """A tokenizer's un-normalised latents: their mean over positions (C), or averaged to grid × grid positions (C · grid²).

    sample: a draw from the posterior, which depends on the seed and the keys alone, in place of its mode; one image at a time.
    `compute` raises InputError of a tokenizer that gives codes only.
    """
    dtype = next(tokenizer.parameters()).dtype

    def compute(images: Tensor, keys: Sequence[str]) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(stable_seed(seed, "features", *keys))
        encoding = tokenizer.encode(images.to(dtype), sample=sample, generator=generator)
        latents = _drawn(tokenizer, encoding.latents) if sample else raw_latents(tokenizer, encoding)
        if latents is None:
            raise InputError(f"{label} gives codes, not latents, and numbers of codes say nothing of how alike they are")
        return F.adaptive_avg_pool2d(latents.float(), grid or 1).flatten(1)

    where = f"averaged to {grid} × {grid} positions" if grid else "mean over positions"
    name = f"latents ({'drawn' if sample else 'mode'}), {where}"
    return ImageFeatures(label, role, name, compute, describe(tokenizer, role), tokenizer.device, tokenizer.downsample)


def _drawn(tokenizer: ImageTokenizer, latents: Tensor | None) -> Tensor | None:
    """Latents as `encode` drew them, without the normalisation by the saved statistics."""
    shift, scale = getattr(tokenizer, "latent_mean", None), getattr(tokenizer, "latent_std", None)
    if latents is None or not isinstance(shift, Tensor) or not isinstance(scale, Tensor):
        return latents
    return latents * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def layer_features(
    tokenizer: ImageTokenizer, label: str, role: str = "model", layers: Sequence[int] = (-1,)
) -> ImageFeatures:
    """Class tokens of these layers (from 0; negative: from the end) and the mean patch token of the last named, as DINOv2's and
    VTP's probes take them; of a network without a class token the mean patch token of each.

    For tokenizers with a method `features(images, layers)` that gives patch_tokens (B, N, D) and class_token (B, D), or none, of
    each. Raises InputError for others.
    """
    if not callable(getattr(tokenizer, "features", None)):
        raise InputError(f"{label} ({tokenizer.system}) has no features of layers: probe its latents (--features latents)")
    if not layers:
        raise ConfigError("features need a layer")
    method: Any = tokenizer.features
    dtype = next(tokenizer.parameters()).dtype

    def compute(images: Tensor, keys: Sequence[str]) -> Tensor:
        found = list(method(images.to(dtype), list(layers)))
        tokens = [one.patch_tokens.mean(dim=1) if one.class_token is None else one.class_token for one in found]
        if found[-1].class_token is not None:
            tokens.append(found[-1].patch_tokens.mean(dim=1))
        return torch.cat([token.float() for token in tokens], dim=1)

    one = len(layers) == 1
    which = f"layer{'' if one else 's'} {', '.join(map(str, layers))}"
    name = f"class token of {which} and mean patch token of the last, or the latter alone where there is no class token"
    return ImageFeatures(label, role, name, compute, describe(tokenizer, role), tokenizer.device, tokenizer.downsample)


# --- others -----------------------------------------------------------------------------------------------------------------

def parse_teacher(text: str) -> TeacherChoice:
    """BACKEND:SOURCE, such as timm:vit_small_patch14_dinov2.lvd142m, or a bare name: an asset, else an id or folder of
    transformers' (with a /), else timm's. random:model_type=dinov2,hidden_size=24,… is a network with random weights."""
    backend, found, source = text.partition(":")
    if found and backend == "hf-hub":                                # timm's own prefix
        return TeacherChoice("timm", text)
    if not found or backend not in BACKENDS:
        backend, source = "asset" if text in ASSET_NETWORKS else "transformers" if "/" in text else "timm", text
    if not source:
        raise ConfigError(f"--teacher {text} names no network; such as efficientnet-lite0 or timm:NAME")
    if backend != "random":
        return TeacherChoice(backend, source)
    pairs = [pair.partition("=") for pair in source.split(",")]
    if not all(equals and name for name, equals, _ in pairs):
        raise ConfigError(f"--teacher {text}: write random:model_type=dinov2,hidden_size=24,…")
    return TeacherChoice(backend, "", config={name.strip(): value.strip() for name, _, value in pairs})


def load_teacher(text: str, device: torch.device | str = "cpu") -> VisionTeacher:
    """The frozen network that `parse_teacher` understands. Raises WeightsMissing, ConfigError, CheckpointError."""
    return build_vision_teacher(parse_teacher(text)).to(device)


def teacher_features(teacher: VisionTeacher, label: str) -> ImageFeatures:
    """Mean of a frozen network's final patch tokens.

    SigLIP and DINOv3 see the image at its own size, DINOv2 14 pixels for each 16 of it (224 at 256), a CNN at its own size;
    all with their own normalisation and no other resize in between.
    """
    spec = replace(teacher.spec, detour=0)

    def compute(images: Tensor, keys: Sequence[str]) -> Tensor:
        from tokenizers_lab.teachers.preprocess import pixel_values

        values = pixel_values(images, _teacher_size(teacher, images.shape[2], images.shape[3]), spec)
        return teacher.hidden(values)[:, teacher.prefix :].float().mean(dim=1)

    description = {"network": teacher.provenance, "kind": teacher.kind, "random": "random weights" in teacher.provenance}
    device = next(teacher.network.parameters()).device
    return ImageFeatures(label, "teacher", "mean of the final patch tokens", compute, description, device)


def _teacher_size(teacher: VisionTeacher, height: int, width: int) -> tuple[int, int]:
    """Pixels that the network is given for images of this size."""
    if teacher.kind == "cnn" or teacher.input_size or (teacher.kind == "siglip" and not teacher.is_transformers):
        return teacher.network_size((height, width), None)
    unit = PATCH if teacher.kind == "dinov2" else teacher.stride
    return max(1, height // unit) * teacher.stride, max(1, width // unit) * teacher.stride


def pixel_features(side: int = PIXELS) -> ImageFeatures:
    """The image itself, averaged to side × side pixels: what needs no network."""
    def compute(images: Tensor, keys: Sequence[str]) -> Tensor:
        return F.adaptive_avg_pool2d(images.float(), side).flatten(1)

    name = f"{side} × {side} pixels"
    return ImageFeatures(name, "baseline", f"image averaged to {name}", compute, {"weights": "none"})
