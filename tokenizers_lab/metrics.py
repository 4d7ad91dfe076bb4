"""Image metrics that training logs and evaluation reports, one value for each image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_lab.errors import InputError

IMAGE_METRICS = ("psnr", "ssim")      # what image_metrics gives
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5     # Gaussian window of Wang et al. 2004
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10·log10(1 / mean squared error), of each image; identical images give infinity.

    x, y: (B, C, H, W) in [0, 1]. Returns float32 (B,). Raises InputError if the shapes differ.
    """
    check_pair(x, y)
    return -10 * torch.log10((x.float() - y.float()).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each image, in [−1, 1]: Gaussian window 11, σ 1.5, mean of the colours.

    torchmetrics' convention: the mean is over all pixels, with the image mirrored at its borders.
    x, y: (B, C, H, W) in [0, 1], at least 11 pixels a side. Returns float32 (B,). Raises InputError on other shapes.
    """
    check_pair(x, y)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise InputError(f"SSIM needs at least {SSIM_WINDOW} pixels a side, not {tuple(x.shape[-2:])}")
    # Imported here: torchmetrics takes seconds to import.
    from torchmetrics.functional.image import structural_similarity_index_measure

    with torch.autocast(x.device.type, enabled=False):
        return structural_similarity_index_measure(
            x.float(), y.float(), gaussian_kernel=True, sigma=SSIM_SIGMA, kernel_size=SSIM_WINDOW, reduction="none",
            data_range=1.0, k1=SSIM_K1, k2=SSIM_K2,
        ).reshape(len(x))      # type: ignore[union-attr]


def patch_mean(images: Tensor, patch: int) -> Tensor:
    """The trivial baseline: each patch × patch square replaced by its mean colour.

    images: (B, C, H, W), sides multiples of `patch`. Returns the same shape. Raises InputError on other sides.
    """
    if images.dim() != 4 or patch < 1 or images.shape[2] % patch or images.shape[3] % patch:
        raise InputError(f"images of shape {tuple(images.shape)} do not divide into patches of {patch} pixels")
    return F.avg_pool2d(images, patch).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def image_metrics(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What validation logs of images x and their reconstructions y, both (B, 3, H, W) in [0, 1]: name to values (B,)."""
    return {"psnr": psnr(x, y), "ssim": ssim(x, y)}


def check_pair(x: Tensor, y: Tensor) -> None:
    """Raise InputError unless x and y are floats (B, C, H, W) of one shape."""
    if x.shape != y.shape or x.dim() != 4 or not (x.is_floating_point() and y.is_floating_point()):
        raise InputError(f"two float tensors (B, C, H, W) of one shape are needed, not {x.dtype} {tuple(x.shape)} "
                         f"and {y.dtype} {tuple(y.shape)}")
