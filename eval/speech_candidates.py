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
from tokenizers_lab.tokenizer import SpeechEncoding, SpeechTokenizer

from .candidates import UNTRAINED_LABEL, decoder_protocol, describe, step_options, untrained_copy

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
    """A reconstruction, and the codes or latents that it was decoded from, where there are any."""

    audio: Tensor                     # (channels, samples) in [-1, 1], as long as the clip
    sample_rate: int                  # Hz
    codes: Tensor | None = None       # (K, frames) int64
    latents: Tensor | None = None     # (C, frames), of a tokenizer without codes


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
    tokenizer: SpeechTokenizer, label: str = "model", role: str = "model", decoding: str | None = None, steps: int | None = None
) -> SpeechCandidate:
    """A tokenizer as a row: each clip resampled to its rate, mixed to its channels, encoded and decoded alone.

    decoding: one of `tokenizer.decodings`; none: its usual way. steps: of a decoder that samples; none: its own number.
    A tokenizer that takes texts is given the clip's. Raises InputError on another decoding, or on steps where there are none.
    """
    if decoding is not None and decoding not in tokenizer.decodings:
        known = ", ".join(tokenizer.decodings) or "only one way"
        raise InputError(f"{label} does not decode in the way '{decoding}'; it has {known}")
    way: dict[str, Any] = {} if decoding is None else {"decoding": decoding}
    parameter, rate = next(tokenizer.parameters()), tokenizer.output_rate(**way)
    options = {**way, **step_options(tokenizer, steps, label)}

    def reconstruct(clip: Clip) -> Rebuilt:
        audio = network_input(clip, tokenizer)[None]
        encoding = tokenizer.encode(audio.to(parameter.device, parameter.dtype))
        decoded = tokenizer.decode(encoding.code, encoding.lengths, **options, **text_options(tokenizer, clip))
        return rebuilt(checked_audio(decoded[0].float(), rate, clip, label), rate, encoding)

    description = {**describe(tokenizer, role), "sample_rate": tokenizer.sample_rate, "output_rate": rate, **way,
                   **decoder_protocol(tokenizer, steps)}
    if takes_texts(tokenizer):
        description["texts"] = "the data's, where known"
    return SpeechCandidate(label, role, description, reconstruct, device=parameter.device)


def takes_texts(tokenizer: SpeechTokenizer) -> bool:
    """Whether decode is to be told what is said."""
    return tokenizer.takes_texts


def text_options(tokenizer: SpeechTokenizer, clip: Clip) -> dict[str, Any]:
    """What decode is told of one clip's text: nothing where it takes none."""
    return {"texts": [clip.text]} if takes_texts(tokenizer) else {}


def rebuilt(audio: Tensor, sample_rate: int, encoding: SpeechEncoding) -> Rebuilt:
    """A reconstruction with what it was decoded from. encoding: of this clip alone."""
    if encoding.codes is not None:
        return Rebuilt(audio, sample_rate, encoding.codes[0])
    return Rebuilt(audio, sample_rate, latents=None if encoding.latents is None else encoding.latents[0])


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
    model: SpeechTokenizer | SpeechCandidate, label: str, baselines: bool, seed: int, absolute: bool, decoding: str | None = None,
    steps: int | None = None,
) -> list[SpeechCandidate]:
    """The rows of a result, the model first. absolute: some metric needs no original, so that originals have a value too."""
    if isinstance(model, SpeechCandidate):
        if steps is not None:
            raise InputError(f"{model.label} is finished: it has no sampling steps")
        candidates = [model]
    else:
        model.eval()
        candidates = [model_candidate(model, label, decoding=decoding, steps=steps)]
        if baselines:
            if getattr(model, "cfg", None) is not None:
                candidates.append(model_candidate(untrained_copy(model, seed), UNTRAINED_LABEL, "untrained", decoding, steps))
            candidates.append(mean_mel_candidate())
    if baselines and absolute:
        candidates.append(originals_candidate())
    return candidates
