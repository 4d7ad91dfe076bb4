"""Multi-scale STFT discriminator (Défossez et al. 2022, EnCodec): complex spectrograms at several resolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .result import Judgement

WINDOWS = (1024, 2048, 512, 256, 128)


class STFTDiscriminator(nn.Module):
    """2-D convolutions over real and imaginary part of one STFT; `window` samples (= n_fft), hop a quarter unless given."""

    window: Tensor

    def __init__(self, window: int, filters: int = 32, hop: int | None = None, dilations: Sequence[int] = (1, 2, 4)):
        super().__init__()
        self.hop = window // 4 if hop is None else hop
        self.register_buffer("window", torch.hann_window(window))
        convs: list[nn.Module] = [nn.Conv2d(2, filters, (3, 9), padding=(1, 4))]
        for dilation in dilations:      # of the time axis
            convs.append(weight_norm(nn.Conv2d(filters, filters, (3, 9), (1, 2), (dilation, 4), (dilation, 1))))
        convs.append(weight_norm(nn.Conv2d(filters, filters, 3, padding=1)))
        self.convs = nn.ModuleList(convs)
        self.conv_post = weight_norm(nn.Conv2d(filters, 1, 3, padding=1))

    def spectrum(self, audio: Tensor) -> Tensor:
        """(B, 2, frames, bins) of audio (B, 1, T): not centred, over the root of the window's energy. T at least the window."""
        n = len(self.window)
        z = torch.stft(audio.squeeze(1), n, self.hop, n, self.window, center=False, return_complex=True)
        z = z / self.window.square().sum().sqrt()
        return torch.stack([z.real, z.imag], 1).transpose(2, 3)

    def forward(self, audio: Tensor) -> Judgement:
        """audio: (B, 1, T). The output is not among the features."""
        x, features = self.spectrum(audio), []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        return Judgement(self.conv_post(x), features)


class MultiScaleSTFTDiscriminator(nn.Module):
    """One member for each window."""

    def __init__(self, windows: Sequence[int] = WINDOWS, filters: int = 32):
        super().__init__()
        self.discriminators = nn.ModuleList(STFTDiscriminator(window, filters) for window in windows)

    def forward(self, audio: Tensor) -> list[Judgement]:
        """audio: (B, 1, T)."""
        return [member(audio) for member in self.discriminators]
