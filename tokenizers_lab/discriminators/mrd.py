"""Multi-resolution discriminator on complex spectrograms, split into bands (arXiv 2306.06546, sec. 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .result import Judgement

WINDOWS = (2048, 1024, 512)
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))     # shares of the spectrum


class ResolutionDiscriminator(nn.Module):
    """Judges the STFT of one window length, band by band. `width`: channels of its convolutions (DAC 32, LM-SPT 64)."""

    def __init__(self, window: int, width: int = 64, bands: Sequence[tuple[float, float]] = BANDS):
        super().__init__()
        self.window, self.hop = window, window // 4
        bins = window // 2 + 1
        self.bands = [(int(low * bins), int(high * bins)) for low, high in bands]
        self.band_convs = nn.ModuleList(band_stack(width) for _ in bands)
        self.conv_post = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)))

    def spectrogram(self, audio: Tensor) -> Tensor:
        """Real and imaginary parts (B, 2, L / hop rounded up, window / 2 + 1) of audio (B, 1, L), in float32."""
        audio = audio.float().squeeze(1)
        side = (self.window - self.hop) // 2
        audio = F.pad(audio[:, None], (side, side - audio.shape[-1] % -self.hop), mode="reflect").squeeze(1)
        window = torch.hann_window(self.window, device=audio.device)
        spectrum = torch.stft(audio, self.window, self.hop, window=window, return_complex=True)      # centred, reflect padding
        return torch.view_as_real(spectrum[..., 2:-2]).permute(0, 3, 2, 1)                           # (B, 2, frames, bins)

    def forward(self, audio: Tensor) -> Judgement:
        """audio: (B, 1, L). The feature maps are those of every layer, band after band; the last one is the output."""
        spectrum = self.spectrogram(audio)
        maps, ends = [], []
        for (low, high), stack in zip(self.bands, self.band_convs, strict=True):
            x = spectrum[..., low:high]
            for conv in stack.children():
                x = F.leaky_relu(conv(x), 0.1)
                maps.append(x)
            ends.append(x)
        x = self.conv_post(torch.cat(ends, dim=-1))
        return Judgement(x.flatten(1), [*maps, x])


class MultiResolutionDiscriminator(nn.Module):
    """One member for each window length."""

    def __init__(self, windows: Sequence[int] = WINDOWS, width: int = 64, bands: Sequence[tuple[float, float]] = BANDS):
        super().__init__()
        self.discriminators = nn.ModuleList(ResolutionDiscriminator(window, width, bands) for window in windows)

    def forward(self, audio: Tensor) -> list[Judgement]:
        """audio: (B, 1, L)."""
        return [member(audio) for member in self.discriminators]


def band_stack(width: int) -> nn.ModuleList:
    """The five convolutions over (time, frequency) of one band."""
    shapes = [(2, (3, 9), 1)] + [(width, (3, 9), 2)] * 3 + [(width, (3, 3), 1)]
    return nn.ModuleList(
        weight_norm(nn.Conv2d(width_in, width, kernel, (1, stride), (kernel[0] // 2, kernel[1] // 2)))
        for width_in, kernel, stride in shapes)
