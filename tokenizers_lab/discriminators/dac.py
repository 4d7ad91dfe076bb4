"""The Descript audio codec's discriminators together: periods, scales and resolutions (arXiv 2306.06546, sec. 3.4)."""

from collections.abc import Sequence

from torch import Tensor, nn

from tokenizers_lab.nn.resample import resample_julius

from .mpd import PERIODS, MultiPeriodDiscriminator
from .mrd import WINDOWS, MultiResolutionDiscriminator
from .msd import ScaleDiscriminator
from .result import Judgement

PERIOD_CHANNELS = (32, 128, 512, 1024, 1024)
SCALE_CHANNELS, SCALE_GROUPS = (16, 64, 256, 1024, 1024, 1024), (1, 4, 16, 64, 256, 1)
SCALE_KERNELS, SCALE_STRIDES = (15, 41, 41, 41, 41, 5), (1, 4, 4, 4, 4, 1)
PEAK = 0.8


class DacDiscriminator(nn.Module):
    """Members in the order periods, rates, windows; each hears the audio without its mean and with its peak at 0.8."""

    def __init__(
        self, sample_rate: int, periods: Sequence[int] = PERIODS, rates: Sequence[int] = (), windows: Sequence[int] = WINDOWS,
        period_channels: Sequence[int] = PERIOD_CHANNELS, scale_channels: Sequence[int] = SCALE_CHANNELS,
        scale_groups: Sequence[int] = SCALE_GROUPS, resolution_channels: int = 64,
    ):
        """rates: factors by which a scale discriminator's audio is slower than `sample_rate`; the rest as in their classes."""
        super().__init__()
        self.sample_rate, self.rates = sample_rate, list(rates)
        self.mpd = MultiPeriodDiscriminator(periods, period_channels, pad_full=True)
        self.msd = nn.ModuleList(
            ScaleDiscriminator(scale_channels, SCALE_KERNELS, SCALE_STRIDES, scale_groups) for _ in self.rates)
        self.mrd = MultiResolutionDiscriminator(windows, resolution_channels)

    def forward(self, audio: Tensor) -> list[Judgement]:
        """audio: (B, 1, L). The last feature map of every member is its output."""
        audio = level_peak(audio)
        slower = [resample_julius(audio, self.sample_rate, self.sample_rate // rate) for rate in self.rates]
        return [*self.mpd(audio), *(member(x) for member, x in zip(self.msd, slower)), *self.mrd(audio)]


def level_peak(audio: Tensor) -> Tensor:
    """Audio (B, 1, L) minus its mean, scaled to a peak of 0.8, item by item."""
    audio = audio - audio.mean(dim=-1, keepdim=True)
    return PEAK * audio / (audio.abs().amax(dim=-1, keepdim=True) + 1e-9)
