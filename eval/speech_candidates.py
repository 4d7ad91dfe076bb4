"""What makes sound that is measured: the model, the same network untrained; and what stands beside it: originals, mean mel."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.audio import to_channels
from tokenizers_lab.data.resample import resample, resampled_length
from tokenizers_lab.errors import InputError
from tokenizers_lab.metrics import mean_mel_distance
from tokenizers_lab.tokenizer import SpeechTokenizer

from .candidates import UNTRAINED_LABEL, describe, untrained_copy

ORIGINALS_LABEL, MEAN_MEL_LABEL = "originals", "mean mel"
TOLERANCE = 0.1      # seconds by which a codec's output may be shorter than its input: a frame that it does not give back


@dataclass(frozen=True)
class Clip:
    """A clip as it was read, and what is known of it."""

    key: str
    audio: Tensor                     # (channels, samples) in [-1, 1]
    sample_rate: int                  # Hz
    text: str | None = None
    speaker: str | None = None
    language: str | None = None

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.audio.shape[1] / self.sample_rate

    def about(self) -> dict[str, Any]:
        """What metrics are told of it."""
        return {"key": self.key, "text": self.text, "speaker": self.speaker, "language": self.language}


@dataclass(frozen=True)
class Rebuilt:
    """A reconstruction, and the codes that it was decoded from, where there are any."""

    audio: Tensor                     # (channels, samples) in [-1, 1], as long as the clip
    sample_rate: int                  # Hz
    codes: Tensor | None = None       # (K, frames) int64


@dataclass(frozen=True)
class SpeechCandidate:
    """A row of the result. `reconstruct` may be called from several threads at once; `numbers` stand for metrics without it."""

    label: str
    role: str                                                       # model, untrained, baseline or originals
    description: dict[str, Any]
    reconstruct: Callable[[Clip], Rebuilt] | None = None
    numbers: dict[str, Callable[[Clip], float]] = field(default_factory=dict)     # metric: its value without a reconstruction
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def model_candidate(
    tokenizer: SpeechTokenizer, label: str = "model", role: str = "model", decoding: str | None = None
) -> SpeechCandidate:
    """A tokenizer as a row: each clip resampled to its rate, mixed to its channels, encoded and decoded alone.

    decoding: one of `tokenizer.decodings`; none: its usual way. Raises InputError on another.
    """
    if decoding is not None and decoding not in tokenizer.decodings:
        known = ", ".join(tokenizer.decodings) or "only one way"
        raise InputError(f"{label} does not decode in the way '{decoding}'; it has {known}")
    way: dict[str, Any] = {} if decoding is None else {"decoding": decoding}
    parameter, rate = next(tokenizer.parameters()), tokenizer.output_rate(**way)

    def reconstruct(clip: Clip) -> Rebuilt:
        audio = network_input(clip, tokenizer)[None]
        encoding = tokenizer.encode(audio.to(parameter.device, parameter.dtype))
        made = checked_audio(tokenizer.decode(encoding.code, encoding.lengths, **way)[0].float(), rate, clip, label)
        return Rebuilt(made, rate, None if encoding.codes is None else encoding.codes[0])

    description = {**describe(tokenizer, role), "sample_rate": tokenizer.sample_rate, "output_rate": rate, **way}
    return SpeechCandidate(label, role, description, reconstruct, device=parameter.device)


def network_input(clip: Clip, tokenizer: SpeechTokenizer) -> Tensor:
    """The clip (channels, samples) as the tokenizer takes it: its channels, its rate. Raises DataError on unfit channels."""
    audio = to_channels(clip.audio, tokenizer.channels, clip.key)
    return resample(audio, clip.sample_rate, tokenizer.sample_rate).clamp(-1, 1)      # a resampled peak may overshoot


def samples_at(clip: Clip, sample_rate: int) -> int:
    """Samples of the clip at another rate."""
    return resampled_length(clip.audio.shape[1], clip.sample_rate, sample_rate)


def checked_audio(audio: Tensor, sample_rate: int, clip: Clip, label: str) -> Tensor:
    """A reconstruction (channels, samples) cut to the clip's length and clamped to [-1, 1].

    Raises InputError if it is shorter by more than 0.1 s, or not finite.
    """
    wanted = samples_at(clip, sample_rate)
    if audio.dim() != 2 or audio.shape[1] + TOLERANCE * sample_rate < wanted:
        raise InputError(f"{label} gave {tuple(audio.shape)} at {sample_rate} Hz for {clip.key}, which has {wanted} samples "
                         "there: a reconstruction is as long as its original")
    if not torch.isfinite(audio).all():
        raise InputError(f"{label} gave NaN or infinite samples for {clip.key}: its weights or its precision are broken")
    return torch.nn.functional.pad(audio, (0, max(0, wanted - audio.shape[1])))[:, :wanted].clamp(-1, 1)


def originals_candidate() -> SpeechCandidate:
    """The originals themselves: what a metric of sound or text alone gives without any codec."""
    return SpeechCandidate(ORIGINALS_LABEL, "originals", {}, lambda clip: Rebuilt(clip.audio, clip.sample_rate))


def mean_mel_candidate() -> SpeechCandidate:
    """The trivial baseline: each clip's mean mel spectrum held still. It is no sound, so that only `mel` is known of it."""
    numbers = {"mel": lambda clip: float(mean_mel_distance(clip.audio[None], clip.sample_rate)[0])}
    return SpeechCandidate(MEAN_MEL_LABEL, "baseline", {}, numbers=numbers)


def all_candidates(
    model: SpeechTokenizer | SpeechCandidate, label: str, baselines: bool, seed: int, absolute: bool, decoding: str | None = None
) -> list[SpeechCandidate]:
    """The rows of a result, the model first. absolute: some metric needs no original, so that originals have a value too."""
    if isinstance(model, SpeechCandidate):
        candidates = [model]
    else:
        model.eval()
        candidates = [model_candidate(model, label, decoding=decoding)]
        if baselines:
            if getattr(model, "cfg", None) is not None:
                candidates.append(model_candidate(untrained_copy(model, seed), UNTRAINED_LABEL, "untrained", decoding))
            candidates.append(mean_mel_candidate())
    if baselines and absolute:
        candidates.append(originals_candidate())
    return candidates
