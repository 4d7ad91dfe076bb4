"""Measures a signal and its reconstruction while they pass in pieces, and the time that each step takes."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from tokenizers_lab.data.resample import Resampler
from tokenizers_lab.metrics import MEL_BANDS, MEL_HOP, MEL_RATE, MEL_WINDOW, log_mel_spectrogram

T = TypeVar("T")
MEL_AT_ONCE = 10 * MEL_RATE                # samples whose mel frames are computed together
EPSILON = torch.finfo(torch.float32).eps   # as in torchmetrics' SI-SDR


class PairMeter:
    """Mel distance and SI-SDR of a reconstruction: what `metrics.speech_metrics` gives for the whole, in constant memory.

    original_rate, rate: Hz of the original and of the reconstruction, at whose rate both are compared. What one of them is
    longer than the other does not count.
    """

    def __init__(self, original_rate: int, rate: int):
        self._to_rate, self._to_mel = Resampler(original_rate, rate), Resampler(rate, MEL_RATE)
        self._original, self._reconstruction = Tail(), Tail()
        self._samples, self._sums = 0, torch.zeros(0)      # (5, channels) float64: of x, y, xx, yy, xy
        self._mel = Tail()                                 # (2, samples) at MEL_RATE of which not all frames are known
        self._mel_begun, self._mel_sum, self._mel_frames = False, 0.0, 0

    def push_original(self, audio: Tensor) -> None:
        """The next piece (channels, t) of the original."""
        self._original.add(self._to_rate.push(audio.float()))
        self._compare()

    def push_reconstruction(self, audio: Tensor) -> None:
        """The next piece (channels, t) of the reconstruction."""
        self._reconstruction.add(audio.float())
        self._compare()

    def result(self) -> dict[str, float]:
        """`mel` and `sisdr` (dB), once both signals have ended."""
        rest = self._to_rate.flush()
        if rest is not None:
            self._original.add(rest)
        self._compare()
        rest = self._to_mel.flush()
        self._frames(rest, last=True)
        return {"mel": self._mel_sum / max(1, self._mel_frames * MEL_BANDS), "sisdr": self._si_sdr()}

    def _compare(self) -> None:
        ready = min(self._original.length, self._reconstruction.length)
        if not ready:
            return
        y, x = self._original.take(ready), self._reconstruction.take(ready)      # (channels, ready)
        wide_x, wide_y = x.double(), y.double()
        sums = torch.stack([wide_x.sum(1), wide_y.sum(1), (wide_x**2).sum(1), (wide_y**2).sum(1), (wide_x * wide_y).sum(1)])
        self._sums = sums if not self._samples else self._sums + sums
        self._samples += ready
        self._frames(self._to_mel.push(torch.stack([x.mean(0), y.mean(0)])))

    def _frames(self, pair: Tensor | None, last: bool = False) -> None:
        """Add the mel frames that are known now. Frame j is made of MEL_WINDOW samples around sample MEL_HOP · j."""
        if pair is not None:
            self._mel.add(pair)
        length = self._mel.length
        if not length or not (last or length >= MEL_AT_ONCE):
            return
        held = self._mel.take(length)
        mels = log_mel_spectrogram(held[:, None], MEL_RATE)                      # (2, bands, frames)
        begin = MEL_WINDOW // MEL_HOP if self._mel_begun else 0                  # frames before it were known already
        end = mels.shape[2] if last else (length - MEL_WINDOW // 2) // MEL_HOP + 1
        self._mel_sum += (mels[0] - mels[1])[:, begin:end].abs().sum(dtype=torch.float64).item()
        self._mel_frames += end - begin
        if not last:
            # Half a window would do for the frames, but less than a whole one would be padded at the end.
            self._mel.add(held[:, end * MEL_HOP - MEL_WINDOW :])
            self._mel_begun = True

    def _si_sdr(self) -> float:
        """Scale-invariant SDR in dB from the sums, the mean over the channels."""
        if not self._samples:
            return math.nan
        sum_x, sum_y, xx, yy, xy = self._sums
        xx, yy, xy = xx - sum_x**2 / self._samples, yy - sum_y**2 / self._samples, xy - sum_x * sum_y / self._samples
        scale = (xy + EPSILON) / (yy + EPSILON)
        target = scale**2 * yy
        noise = (target - 2 * scale * xy + xx).clamp_min(0)
        return (10 * torch.log10((target + EPSILON) / (noise + EPSILON))).mean().item()


class Tail:
    """What has come of a signal (channels, t) and was not taken yet."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self.length = 0

    def add(self, audio: Tensor) -> None:
        """Put a piece at the end."""
        if audio.shape[-1]:
            self._kept.append(audio)
            self.length += audio.shape[-1]

    def take(self, samples: int) -> Tensor:
        """The first so many samples, which are then gone."""
        whole = torch.cat(self._kept, dim=-1)
        rest = whole[:, samples:].clone()      # a view would keep all that came before
        self._kept, self.length = ([rest] if rest.shape[1] else []), rest.shape[1]
        return whole[:, :samples]


class Clock:
    """Seconds spent inside iterators that draw from one another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each has come is added to that name, with what the iterator itself draws from."""
        iterator = iter(items)
        while True:
            begin = time.perf_counter()
            item = next(iterator, None)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            if item is None:
                return
            yield item
