"""Whisper's log-mel spectrogram, differentiable."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.losses.spectral import mel_filters, stft_magnitude

WHISPER_RATE, WHISPER_FFT, WHISPER_HOP = 16_000, 400, 160


@lru_cache(maxsize=8)
def whisper_filters(bands: int) -> Tensor:
    """Whisper's mel filters (bands, 201): Slaney's scale, unit areas. The tensor is shared: do not change it."""
    with torch.inference_mode(False), torch.device("cpu"):      # the cache must serve training too
        return mel_filters(WHISPER_RATE, WHISPER_FFT, bands, scale="slaney").T.contiguous()


def whisper_log_mel(audio: Tensor, bands: int, samples: int, floor_over_batch: bool = False) -> Tensor:
    """Whisper's input features (B, bands, samples / 160) of 16 kHz audio (B, L), padded with zeros or cut to `samples`,
    float32.

    log10 of the mel power, nothing below the maximum − 8, then (· + 4) / 4. Differentiable, also through the maximum.
    floor_over_batch: one maximum for the whole batch instead of one for each item; LM-SPT was trained so.
    """
    audio = F.pad(audio, (0, samples - audio.shape[-1]))                       # a negative padding cuts
    window = torch.hann_window(WHISPER_FFT, device=audio.device)
    power = stft_magnitude(audio.float(), WHISPER_FFT, WHISPER_HOP, window)[..., :-1].square()     # (B, 201, frames)
    level = (whisper_filters(bands).to(power) @ power).clamp_min(1e-10).log10()
    loudest = level.amax() if floor_over_batch else level.amax((-2, -1), keepdim=True)
    return (torch.maximum(level, loudest - 8) + 4) / 4
