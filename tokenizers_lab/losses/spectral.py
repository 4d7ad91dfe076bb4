"""Spectrograms of waveforms and distances between them."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scale = Literal["htk", "slaney"]


def hz_to_mel(hz: Tensor, scale: Scale) -> Tensor:
    """Frequencies in Hz on the mel scale: HTK's 2595 log10(1 + f / 700), or Slaney's, linear below 1 kHz."""
    if scale == "htk":
        return 2595 * torch.log10(1 + hz / 700)
    high = 15 + 27 * torch.log(hz.clamp_min(1e-9) / 1000) / torch.log(torch.tensor(6.4, dtype=hz.dtype))
    return torch.where(hz >= 1000, high, 3 * hz / 200)


def mel_to_hz(mel: Tensor, scale: Scale) -> Tensor:
    """The inverse of `hz_to_mel`."""
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    high = 1000 * torch.exp((mel - 15) * torch.log(torch.tensor(6.4, dtype=mel.dtype)) / 27)
    return torch.where(mel >= 15, high, 200 * mel / 3)


def mel_filters(
    sample_rate: int, n_fft: int, bands: int, low: float = 0.0, high: float | None = None, scale: Scale = "htk",
    area_norm: bool = True,
) -> Tensor:
    """Triangular filters (n_fft // 2 + 1, bands), float32, computed in float64.

    low, high: Hz (none: half the rate). area_norm: each triangle has area 1 over Hz (Slaney). Narrow bands may hold no bin.
    """
    with torch.device("cpu"):      # also where networks are built without memory
        bins = torch.linspace(0, sample_rate // 2, n_fft // 2 + 1, dtype=torch.float64)
        ends = torch.tensor([low, sample_rate / 2 if high is None else high], dtype=torch.float64)
        first, last = hz_to_mel(ends, scale).tolist()
        edges = mel_to_hz(torch.linspace(first, last, bands + 2, dtype=torch.float64), scale)       # (bands + 2,)
    widths = edges.diff()
    slopes = edges[None] - bins[:, None]                                                            # (bins, bands + 2)
    filters = torch.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]).clamp_min(0)
    if area_norm:
        filters = filters * 2 / (edges[2:] - edges[:-2])
    return filters.float()


def widest(audio: Tensor) -> Tensor:
    """In float64 where the device has it: float32 transforms differ between processors by more than quiet bands can bear."""
    return audio.float() if audio.device.type == "mps" else audio.double()


def stft_magnitude(audio: Tensor, n_fft: int, hop: int, window: Tensor, center: bool = True) -> Tensor:
    """|STFT| (B, bins, frames) of audio (B, T), not normalised.

    window: (n,) with n ≤ n_fft, centred in n_fft. center: reflect-pad by n_fft / 2, so that frame i is about sample i · hop;
    else by (n_fft − hop) / 2 on both sides (HiFi-GAN), so that there is a frame for each whole hop.
    """
    if not center:
        audio = F.pad(audio.unsqueeze(1), [int((n_fft - hop) / 2)] * 2, "reflect").squeeze(1)
    return torch.stft(audio, n_fft, hop, len(window), window, center=center, return_complex=True).abs()


class MelSpectrogram(nn.Module):
    """Magnitudes in mel bands: (B, bands, frames) of audio (B, T) or (B, 1, T). Windows are periodic Hann."""

    window: Tensor
    filters: Tensor

    def __init__(
        self, sample_rate: int, n_fft: int, hop: int, bands: int, window: int | None = None, low: float = 0.0,
        high: float | None = None, scale: Scale = "htk", center: bool = True, floor: float = 0.0,
    ):
        """window: samples (none: n_fft); low, high: Hz; floor: added to each magnitude; see `stft_magnitude` for center."""
        super().__init__()
        self.n_fft, self.hop, self.center, self.floor = n_fft, hop, center, floor
        self.register_buffer("window", torch.hann_window(window or n_fft), persistent=False)
        filters = mel_filters(sample_rate, n_fft, bands, low, high, scale).to(self.window.device)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """audio: (B, T) or (B, 1, T). Raises RuntimeError on audio shorter than the padding."""
        audio = audio.squeeze(1) if audio.dim() == 3 else audio
        magnitude = stft_magnitude(audio, self.n_fft, self.hop, self.window.to(audio.dtype), self.center) + self.floor
        return (magnitude.transpose(1, 2) @ self.filters.to(magnitude.dtype)).transpose(1, 2)


def log_mel(mel: Tensor, smallest: float = 1e-5) -> Tensor:
    """Natural logarithm of max(mel, smallest)."""
    return mel.clamp_min(smallest).log()


class MultiScaleMelLoss(nn.Module):
    """L1 distances of natural log-mel spectrograms at falling resolutions: scale k divides n_fft, hop and window by 2^k.

    The bands stay the same, so that at the finest scales some hold no bin and are constant (as in SpeechTokenizer).
    """

    def __init__(
        self, sample_rate: int, n_fft: int = 1024, hop: int = 240, window: int = 1024, bands: int = 80, scales: int = 4,
        low: float = 0.0, high: float | None = None,
    ):
        """n_fft, hop, window: samples at scale 0; low, high: Hz."""
        super().__init__()
        self.scales = nn.ModuleList(
            MelSpectrogram(
                sample_rate, n_fft // 2**k, hop // 2**k, bands, window // 2**k, low, high, "htk", center=False, floor=1e-9
            )
            for k in range(scales)
        )

    def spectrograms(self, audio: Tensor) -> list[Tensor]:
        """Log-mel spectrograms (B, bands, frames) of audio (B, T) or (B, 1, T), one a scale."""
        return [log_mel(scale(audio)) for scale in self.scales]

    def forward(self, estimate: Tensor, reference: Tensor) -> Tensor:
        """(scales,) mean absolute differences; audio (B, T) or (B, 1, T) of equal lengths."""
        pairs = zip(self.spectrograms(estimate), self.spectrograms(reference))
        return torch.stack([F.l1_loss(ours, theirs) for ours, theirs in pairs])


class MultiScaleSTFTLoss(nn.Module):
    """Mean over resolutions of spectral convergence plus L1 of log magnitudes (Yamamoto et al. 2020, Parallel WaveGAN)."""

    def __init__(self, windows: Sequence[int] = (512, 1024, 2048)):
        """windows: samples; n_fft is the window, the hop a quarter of it."""
        super().__init__()
        self.windows = list(windows)
        for n in self.windows:
            self.register_buffer(f"window_{n}", torch.hann_window(n), persistent=False)

    def forward(self, estimate: Tensor, reference: Tensor) -> Tensor:
        """A scalar; audio (B, T) or (B, 1, T)."""
        estimate, reference = (x.squeeze(1) if x.dim() == 3 else x for x in (estimate, reference))
        terms = []
        for n in self.windows:
            window = self.get_buffer(f"window_{n}").to(estimate.dtype)
            ours, theirs = (stft_magnitude(x, n, n // 4, window).clamp_min(1e-7) for x in (estimate, reference))
            terms.append((theirs - ours).norm() / theirs.norm() + F.l1_loss(ours.log(), theirs.log()))
        return torch.stack(terms).mean()
