"""Multi-period discriminator (Kong et al. 2020, HiFi-GAN): the waveform folded at prime periods."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .result import Judgement

PERIODS = (2, 3, 5, 7, 11)
CHANNELS = (32, 128, 512, 1024, 1024)


class PeriodDiscriminator(nn.Module):
    """Convolutions along columns of the waveform folded to (T / period, period); the last one's kernel is `last_kernel`."""

    def __init__(self, period: int, channels: Sequence[int] = CHANNELS, pad_full: bool = False, last_kernel: int = 3):
        super().__init__()
        self.period, self.pad_full = period, pad_full
        strides = [3] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0)))
            for before, after, stride in zip([1, *channels], channels, strides)
        )
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (last_kernel, 1), padding=(last_kernel // 2, 0)))

    def forward(self, audio: Tensor) -> Judgement:
        """audio: (B, 1, T). The last feature map is the output."""
        missing = -audio.shape[-1] % self.period
        if missing or self.pad_full:
            audio = F.pad(audio, (0, missing or self.period), "reflect")
        x = audio.unflatten(-1, (-1, self.period))                       # (B, 1, T / period, period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.conv_post(x)
        return Judgement(x.flatten(1), [*features, x])


class MultiPeriodDiscriminator(nn.Module):
    """One member for each period. `pad_full`: a length that is a multiple of the period gets a whole period more."""

    def __init__(
        self, periods: Sequence[int] = PERIODS, channels: Sequence[int] = CHANNELS, pad_full: bool = False, last_kernel: int = 3
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period, channels, pad_full, last_kernel) for period in periods)

    def forward(self, audio: Tensor) -> list[Judgement]:
        """audio: (B, 1, T)."""
        return [member(audio) for member in self.discriminators]
