"""A small speech codec, made in milliseconds, and real speech: what the harness of speech is tested on."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.eval.speech_data import speech_data_config
from tokenizers_lab.settings import SpeechDataConfig
from tokenizers_lab.tokenizer import SpeechEncoding, SpeechTokenizer

N = 5      # clips: odd, so that two processes get different numbers


@dataclass
class StepsConfig:
    """Size of the toy."""

    channels: int = 1


class Steps(SpeechTokenizer):
    """Frames of four samples: two codebooks, each a pair's mean in 64 steps. Random weights scale it wrongly.

    `half`: decodes a sample for each pair, at half the rate.
    """

    system = "steps"
    sample_rate, hop, codebooks, codebook_size = 16_000, 4, 2, 64
    decodings = ("half",)

    def __init__(self, cfg: StepsConfig):
        super().__init__(cfg)
        self.channels = cfg.channels
        self.gain = nn.Parameter(0.1 * torch.rand(1))

    @classmethod
    def fitted(cls, channels: int = 1) -> "Steps":
        model = cls(StepsConfig(channels))
        nn.init.ones_(model.gain)
        return model.eval().requires_grad_(False)

    def output_rate(self, decoding: str | None = None) -> int:
        return self.sample_rate // 2 if decoding == "half" else self.sample_rate

    def encode(self, audio: Tensor, lengths: Tensor | None = None) -> SpeechEncoding:
        self.check_audio(audio, lengths)
        padded = nn.functional.pad(audio.mean(1), (0, -audio.shape[2] % 4))
        pairs = padded.unflatten(1, (-1, 2, 2)).mean(3).transpose(1, 2)      # (B, 2, T)
        return SpeechEncoding(codes=((pairs + 1) / 2 * 63).round().clamp(0, 63).long())

    def decode(self, codes: Tensor, lengths: Tensor | None = None, decoding: str | None = None) -> Tensor:
        self.check_codes(codes, lengths)
        pairs = (codes / 63 * 2 - 1).transpose(1, 2).flatten(1)[:, None] * self.gain      # (B, 1, 2 T)
        return (pairs if decoding == "half" else pairs.repeat_interleave(2, 2)).expand(-1, self.channels, -1)


def config(channels: int = 1, limit: int = N, seconds: float | None = 2.9) -> SpeechDataConfig:
    """Some clips of the sample speech, cut; some are shorter, so that batches are padded."""
    return speech_data_config("sample:speech", Steps(StepsConfig(channels)), limit, seconds)


def batches(size: int = 2, rank: int = 0, world: int = 1, **options):
    """Batches of those clips."""
    return validation_batches(config(**options), size, rank, world)
