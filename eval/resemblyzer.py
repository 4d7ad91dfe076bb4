"""The speaker encoder of the resemblyzer package (GE2E, Wan et al. 2018): a network of ours with the package's weights."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.losses.spectral import mel_filters

SAMPLE_RATE = 16_000
WINDOW, HOP, BANDS = 400, 160, 40        # 25 ms and 10 ms, in samples; mel bands
FRAMES = 160                             # of a partial utterance: 1.6 s
PARTIALS_PER_SECOND, COVERAGE = 1.3, 0.75
LOUDNESS = -30.0                         # dB of full scale: quieter clips are raised to it
UNUSED = ("similarity_weight", "similarity_bias")      # of the training's loss


class GE2ESpeakerEncoder(nn.Module):
    """Three LSTM layers over mel frames, the last state projected, rectified and scaled to length 1."""

    def __init__(self, width: int = 256, size: int = 256, layers: int = 3):
        """width: of the LSTM; size: of the embedding."""
        super().__init__()
        self.lstm = nn.LSTM(BANDS, width, layers, batch_first=True)
        self.linear = nn.Linear(width, size)
        self.register_buffer("filters", mel_filters(SAMPLE_RATE, WINDOW, BANDS, scale="slaney"), persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, mels: Tensor) -> Tensor:
        """mels: (B, frames, 40), power, not logarithmic. Returns (B, size) of length 1, none of them negative."""
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=-1)

    def mel_power(self, audio: Tensor) -> Tensor:
        """(1 + samples // 160, 40) mel power of audio (samples,), frame i centred at sample 160 i, zeros beyond the ends."""
        window, filters = self.get_buffer("window"), self.get_buffer("filters")
        spectrum = torch.stft(audio, WINDOW, HOP, window=window, center=True, pad_mode="constant", return_complex=True)
        return spectrum.abs().square().T @ filters

    @torch.inference_mode()
    def embed(self, audio: Tensor) -> Tensor:
        """(size,) of length 1: the mean over partial utterances of 1.6 s, of which the last is filled with zeros or left out.

        audio: (samples,) at 16 kHz.
        """
        starts = partial_starts(len(audio))
        end = (starts[-1] + FRAMES) * HOP
        mel = self.mel_power(F.pad(audio.float(), (0, max(0, end - len(audio)))))
        return F.normalize(self(torch.stack([mel[start : start + FRAMES] for start in starts])).mean(0), dim=0)


def partial_starts(samples: int) -> list[int]:
    """First frames of the partial utterances of a clip: 1.3 a second; the last only if the clip fills 75 % of it, or alone."""
    step = round(SAMPLE_RATE / PARTIALS_PER_SECOND / HOP)
    frames = math.ceil((samples + 1) / HOP)
    starts = list(range(0, max(1, frames - FRAMES + step + 1), step))
    if len(starts) > 1 and samples - starts[-1] * HOP < COVERAGE * FRAMES * HOP:
        starts.pop()
    return starts


def raise_volume(audio: Tensor) -> Tensor:
    """A clip below −30 dB of full scale raised to it, others as they are. Silence stays silence."""
    level = 20 * math.log10(max(float(audio.square().mean().sqrt()), 1e-12))
    return audio * 10 ** ((LOUDNESS - level) / 20) if -200 < level < LOUDNESS else audio


def load_resemblyzer() -> tuple[GE2ESpeakerEncoder, str]:
    """The encoder with the package's weights, and their source. Raises WeightsMissing, CheckpointError."""
    from tokenizers_lab.assets import find_state_dict

    state, source = find_state_dict("resemblyzer")
    network = GE2ESpeakerEncoder()
    network.load_state_dict({name: tensor for name, tensor in state.items() if name not in UNUSED}, strict=True)
    return network.eval().requires_grad_(False), source
