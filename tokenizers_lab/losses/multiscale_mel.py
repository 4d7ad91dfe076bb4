"""Mel distance over several windows, as in the Descript audio codec (arXiv 2306.06546, sec. 3.5)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spectral import MelSpectrogram, widest


class MultiWindowMelLoss(nn.Module):
    """For each window, with bands of its own: L1 of log10 of the squared magnitudes, plus L1 of the magnitudes.

    Hann windows, a hop of a quarter, centred; Slaney's mel scale. Magnitudes below `floor` count as `floor` in the logarithm.
    """

    def __init__(
        self, sample_rate: int, bands: Sequence[int] = (40, 80, 160, 320), windows: Sequence[int] = (256, 512, 1024, 2048),
        power: float = 2.0, floor: float = 1e-5,
    ):
        """power: of the magnitude inside the logarithm."""
        super().__init__()
        self.power, self.floor = power, floor
        self.scales = nn.ModuleList(
            MelSpectrogram(sample_rate, window, window // 4, count, scale="slaney")
            for count, window in zip(bands, windows, strict=True))

    def terms(self, estimate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """(log terms, magnitude terms), one a window, of audio (B, 1, L) or (B, L) of equal lengths."""
        logs, magnitudes, dtype = [], [], torch.promote_types(estimate.dtype, torch.float32)
        for scale in self.scales:
            ours, theirs = scale(widest(estimate)), scale(widest(reference))
            logs.append(F.l1_loss(self.level(ours), self.level(theirs)))
            magnitudes.append(F.l1_loss(ours, theirs))
        return torch.stack(logs).to(dtype), torch.stack(magnitudes).to(dtype)

    def level(self, mel: Tensor) -> Tensor:
        """log10 of max(mel, floor)^power."""
        return mel.clamp_min(self.floor).pow(self.power).log10()

    def forward(self, estimate: Tensor, reference: Tensor) -> Tensor:
        """Sum of all terms: a scalar."""
        return torch.cat(self.terms(estimate, reference)).sum()
