"""How each kind of vision teacher was given its images by the papers that distil from it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocess:
    """Image processing in front of a network: [0, 1] images in, pixel values out."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"   # of the antialiased resize: bilinear, bicubic
    detour: int = 0                   # pixels a side of the published resize, which comes before the one to the network's size
    quantise: bool = False            # the image passes through uint8, truncated


# Implementation notes of RecTok, section 9. The resize through 224 (DINOv3) and 518 (DINOv2) pixels is the published one.
# SigLIP's own transform also cuts away a tenth of the picture, which would shift its patches against the student's: left out.
PREPROCESSING = {
    "dinov3": Preprocess(detour=224, quantise=True),
    "dinov2": Preprocess(detour=518, interpolation="bicubic"),
    "siglip": Preprocess(HALF, HALF, "bicubic"),
    "cnn": Preprocess(HALF, HALF, "bicubic"),
}


def to_uint8(images: Tensor) -> Tensor:
    """uint8 images from [0, 1] floats of any shape, by truncating 255·x as the authors' cast does; outside values are clamped."""
    return (images.float() * 255).clamp(0, 255).to(torch.uint8)


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of float images (B, 3, H, W) to `size`, differentiable; the images themselves if they have that size."""
    if tuple(images.shape[-2:]) == size:
        return images
    return transforms.resize(images, list(size), InterpolationMode(interpolation), antialias=True)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images − mean) / std for each colour of (B, 3, H, W)."""
    shape = (1, -1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def pixel_values(images: Tensor, size: tuple[int, int], spec: Preprocess) -> Tensor:
    """What the network is given, float32 (B, 3, *size), from images (B, 3, H, W) in [0, 1].

    Differentiable unless `spec.quantise`. Always float32: truncation and interpolation in bf16 would change the target.
    """
    x = to_uint8(images).float() * (1 / 255) if spec.quantise else images.float()
    x = resize(x, (spec.detour, spec.detour) if spec.detour else size, spec.interpolation)
    x = normalise(x, spec.mean, spec.std)
    if tuple(x.shape[-2:]) != size:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    return x
