"""Multi-scale discriminator (Kumar et al. 2019, MelGAN; Kong et al. 2020): the waveform at falling rates."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tokenizers_lab.nn.spectral_norm import spectral_norm

from .result import Judgement

CHANNELS = (128, 128, 256, 512, 1024, 1024, 1024)
KERNELS = (15, 41, 41, 41, 41, 41, 5)
STRIDES = (1, 2, 2, 4, 4, 1, 1)
GROUPS = (1, 4, 16, 16, 16, 16, 1)


class ScaleDiscriminator(nn.Module):
    """Grouped convolutions over the waveform."""

    def __init__(
        self, channels: Sequence[int] = CHANNELS, kernels: Sequence[int] = KERNELS, strides: Sequence[int] = STRIDES,
        groups: Sequence[int] = GROUPS, spectral: bool = False,
    ):
        super().__init__()
        norm = spectral_norm if spectral else weight_norm
        sizes = zip([1, *channels], channels, kernels, strides, groups)
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(before, after, kernel, stride, kernel // 2, groups=parts))
            for before, after, kernel, stride, parts in sizes
        )
        self.conv_post = norm(nn.Conv1d(channels[-1], 1, 3, padding=1))

    def forward(self, audio: Tensor) -> Judgement:
        """audio: (B, 1, T). The last feature map is the output."""
        x, features = audio, []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        x = self.conv_post(x)
        return Judgement(x.flatten(1), [*features, x])


class MultiScaleDiscriminator(nn.Module):
    """`scales` members; member i hears the audio average-pooled i times by 2.

    The first has spectral norm, the others weight norm. Spectral norm makes one power iteration in each training forward.
    """

    def __init__(
        self, scales: int = 3, channels: Sequence[int] = CHANNELS, kernels: Sequence[int] = KERNELS,
        strides: Sequence[int] = STRIDES, groups: Sequence[int] = GROUPS,
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(
            ScaleDiscriminator(channels, kernels, strides, groups, spectral=i == 0) for i in range(scales)
        )

    def forward(self, audio: Tensor) -> list[Judgement]:
        """audio: (B, 1, T)."""
        result = []
        for i, member in enumerate(self.discriminators):
            if i:
                audio = F.avg_pool1d(audio, 4, 2, padding=2)
            result.append(member(audio))
        return result
