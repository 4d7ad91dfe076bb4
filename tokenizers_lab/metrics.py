"""Metrics that training logs and evaluation reports, one value for each image or clip."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_lab.data.resample import resample
from tokenizers_lab.errors import InputError
from tokenizers_lab.losses.spectral import MelSpectrogram, log_mel

IMAGE_METRICS = ("psnr", "ssim")      # what image_metrics gives
SPEECH_METRICS = ("mel", "sisdr")     # what speech_metrics gives
GENERATOR_METRICS = ("velocity_mse",)     # what an objective of latents gives
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5     # Gaussian window of Wang et al. 2004
SSIM_K1, SSIM_K2 = 0.01, 0.03
MEL_RATE, MEL_WINDOW, MEL_HOP, MEL_BANDS = 16_000, 1024, 256, 80     # of the mel distance: Hz, samples, samples, bands


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


def log_mel_spectrogram(audio: Tensor, sample_rate: int) -> Tensor:
    """Natural log-mel magnitudes (B, 80, frames) of audio (B, channels, samples), its channels averaged, at 16 kHz.

    Hann window 1024, hop 256, centred, Slaney's mel scale and area norm, 0 to 8 kHz, magnitudes from 1e-5. Whatever the
    codec's rate, so that codecs of several rates are comparable; what they do above 8 kHz does not count.
    """
    mono = resample(audio.float().mean(1), sample_rate, MEL_RATE)
    if mono.shape[-1] < MEL_WINDOW:      # a window's worth at least, or nothing can be reflected
        mono = F.pad(mono, (0, MEL_WINDOW - mono.shape[-1]))
    with torch.autocast(audio.device.type, enabled=False):
        return log_mel(_mel(str(audio.device))(mono))


@lru_cache(maxsize=4)
def _mel(device: str) -> MelSpectrogram:
    with torch.inference_mode(False):      # kept for callers that compute gradients
        return MelSpectrogram(MEL_RATE, MEL_WINDOW, MEL_HOP, MEL_BANDS, scale="slaney").to(device)


def mel_distance(x: Tensor, y: Tensor, sample_rate: int, lengths: Tensor | None = None) -> Tensor:
    """Mean absolute difference of `log_mel_spectrogram` of each clip; 0 for identical clips, smaller is better.

    x, y: (B, channels, samples) at `sample_rate` Hz; lengths: (B,) samples of each that count. Returns float32 (B,).
    Raises InputError if the shapes differ.
    """
    check_clips(x, y)
    pairs = zip(_items(x, lengths), _items(y, lengths))
    return torch.stack([F.l1_loss(log_mel_spectrogram(a, sample_rate), log_mel_spectrogram(b, sample_rate)) for a, b in pairs])


def mean_mel_distance(y: Tensor, sample_rate: int, lengths: Tensor | None = None) -> Tensor:
    """The trivial baseline: the mel distance of each clip from its own mean over time, held still. Returns (B,)."""
    mels = [log_mel_spectrogram(item, sample_rate) for item in _items(y, lengths)]
    return torch.stack([(mel - mel.mean(-1, keepdim=True)).abs().mean() for mel in mels])


def si_sdr(x: Tensor, y: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019) of x to the original y, without their means.

    x, y: (B, channels, samples); lengths: (B,) samples of each that count. Returns float32 (B,), the mean over channels.
    Raises InputError if the shapes differ.
    """
    check_clips(x, y)
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    pairs = zip(_items(x, lengths), _items(y, lengths))
    return torch.stack(
        [scale_invariant_signal_distortion_ratio(a.float(), b.float(), zero_mean=True).mean() for a, b in pairs])


def speech_metrics(x: Tensor, y: Tensor, sample_rate: int, lengths: Tensor | None = None) -> dict[str, Tensor]:
    """What validation logs of clips y and their reconstructions x, both (B, channels, samples): name to values (B,)."""
    return {"mel": mel_distance(x, y, sample_rate, lengths), "sisdr": si_sdr(x, y, lengths)}


def check_clips(x: Tensor, y: Tensor) -> None:
    """Raise InputError unless x and y are floats (B, channels, samples) of one shape, not empty."""
    if x.shape != y.shape or x.dim() != 3 or 0 in x.shape or not (x.is_floating_point() and y.is_floating_point()):
        raise InputError(f"two float tensors (B, channels, samples) of one shape are needed, not {x.dtype} {tuple(x.shape)} "
                         f"and {y.dtype} {tuple(y.shape)}")


def _items(clips: Tensor, lengths: Tensor | None) -> list[Tensor]:
    """Each clip (1, channels, its samples)."""
    ends = [clips.shape[2]] * len(clips) if lengths is None else lengths.tolist()
    return [clips[i : i + 1, :, :end] for i, end in enumerate(ends)]
