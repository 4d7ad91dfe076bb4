"""Multi-resolution spectrogram discriminator (Jang et al. 2021, UnivNet, arXiv 2106.07889, sec. 2.3) with 2-D strides.

In contrast to `msstft` and `mrd` it judges magnitudes, and halves both axes at every layer but the last two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .result import Judgement

FFTS = (128, 256, 512, 1024, 2048)
CHANNELS = (64, 128, 256, 512, 1024)
KERNELS = (5, 3)
QUIETEST, LOUDEST = 1e-7, 1e3      # the power is kept between them
MIDDLE = 5                         # kernel of the strided layers but the first


class SpectrogramDiscriminator(nn.Module):
    """2-D convolutions over the magnitudes of one STFT."""

    window: Tensor

    def __init__(
        self, n_fft: int, hop: int | None = None, window: int | None = None, channels: Sequence[int] = CHANNELS,
        kernels: Sequence[int] = KERNELS,
    ):
        """hop, window: samples (none: n_fft / 4 and n_fft). channels: of each layer but the last, which has one; all but the
        last of them have stride 2. kernels: of the first layer, and of the last two; odd."""
        super().__init__()
        self.n_fft, self.hop = n_fft, n_fft // 4 if hop is None else hop
        self.register_buffer("window", torch.hann_window(window or n_fft), persistent=False)
        first, last = kernels
        sizes = [first] + [MIDDLE] * (len(channels) - 2) + [last]
        strides = [2] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, size, stride, size // 2))
            for before, after, size, stride in zip([1, *channels], channels, sizes, strides))
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, last, padding=last // 2))

    def spectrogram(self, audio: Tensor) -> Tensor:
        """Magnitudes (B, 1, bins, frames) of audio (B, 1, T), centred with reflect padding, in float32."""
        found = torch.stft(audio.float().squeeze(1), self.n_fft, self.hop, len(self.window), self.window, return_complex=True)
        power = found.real.square() + found.imag.square()
        return power.clamp(QUIETEST, LOUDEST).sqrt().unsqueeze(1)

    def forward(self, audio: Tensor) -> Judgement:
        """audio: (B, 1, T), T above n_fft / 2. The output is not among the features."""
        x, features = self.spectrogram(audio), []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return Judgement(self.conv_post(x), features)


class MultiResolutionSpectrogramDiscriminator(nn.Module):
    """One member for each STFT."""

    def __init__(
        self, ffts: Sequence[int] = FFTS, hops: Sequence[int] | None = None, windows: Sequence[int] | None = None,
        channels: Sequence[int] = CHANNELS, kernels: Sequence[int] = KERNELS,
    ):
        """hops, windows: one for each of `ffts` (none: a quarter, and as long); the rest as in SpectrogramDiscriminator."""
        super().__init__()
        hops, windows = hops or [n_fft // 4 for n_fft in ffts], windows or ffts
        self.discriminators = nn.ModuleList(
            SpectrogramDiscriminator(n_fft, hop, window, channels, kernels)
            for n_fft, hop, window in zip(ffts, hops, windows, strict=True))

    def forward(self, audio: Tensor) -> list[Judgement]:
        """audio: (B, 1, T)."""
        return [member(audio) for member in self.discriminators]
