"""Resampling of whole signals and of endless ones: a windowed-sinc filter (torchaudio's, its defaults), and the same in pieces.

Output sample n stands at the time of input sample n·from/to. With the rates divided by their greatest common divisor, `to`
output samples need `from` input samples and `margin` more on either side; so the output of a piece with its margin is that of
the whole.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

LOBES, ROLLOFF = 6, 0.99            # torchaudio's lowpass_filter_width and rolloff
MAX_KERNEL = 2_000_000              # filter taps that are kept as a table; rates with few common factors would need billions
DIRECT_OUTPUTS = 65_536             # output samples that are computed at once without a table


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """The signal at another sample rate, as torchaudio.functional.resample gives it (filter computed in float64).

    audio: float (..., T) at from_rate Hz. Returns (..., ceil(T · to_rate / from_rate)).
    """
    if from_rate == to_rate or audio.shape[-1] == 0:
        return audio
    step, group = _ratio(from_rate, to_rate)
    if _has_table(step, group):
        return _table(step, group, str(audio.device))(audio.float().contiguous())
    flat = audio.reshape(-1, audio.shape[-1]).float()
    margin = _margin(step, group)
    padded = torch.nn.functional.pad(flat, (margin, margin + step))
    return _direct(padded, step, group, resampled_length(audio.shape[-1], from_rate, to_rate)).reshape(*audio.shape[:-1], -1)


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """How many samples `resample` makes of that many."""
    return -(-samples * to_rate // from_rate)


def resample_span(start: int, samples: int, from_rate: int, to_rate: int) -> tuple[int, int, int]:
    """Which input a stretch of the output needs: output samples [start, start + samples) of the resampled signal.

    Returns (first, last, skip): `resample(x[first:last])[skip : skip + samples]` equals `resample(x)[start : start + samples]`,
    where x may end before `last`; first is at least 0.
    """
    if from_rate == to_rate:
        return start, start + samples, 0
    step, group = _ratio(from_rate, to_rate)
    before = -(-_margin(step, group) // step)                            # whole groups that hold the margin
    first_group = max(start // group - before, 0)
    last_group = -(-(start + samples) // group) + before
    return first_group * step, last_group * step, start - first_group * group


class Resampler:
    """Resamples an endless signal piece by piece: what `push` and `flush` return, joined, equals `resample` of the whole."""

    def __init__(self, from_rate: int, to_rate: int):
        self.from_rate, self.to_rate = from_rate, to_rate
        self._same = from_rate == to_rate
        self._step, self._group = _ratio(from_rate, to_rate)
        self._before = -(-_margin(self._step, self._group) // self._step)     # groups of context on either side
        self._held: Tensor | None = None       # input from group _first on
        self._first = self._done = 0           # the first group that is held; groups that were given out
        self._seen = 0                         # input samples so far

    def push(self, audio: Tensor) -> Tensor:
        """The output that the signal so far determines and that was not given yet. audio: (C, t) -> (C, u), u may be 0."""
        if self._same:
            return audio
        self._seen += audio.shape[-1]
        self._held = audio if self._held is None else torch.cat([self._held, audio], dim=-1)
        ready = self._seen // self._step - self._before     # groups whose margin has come
        if ready <= self._done:
            return audio[..., :0]
        return self._give(ready, self._held[..., : (ready + self._before - self._first) * self._step])

    def flush(self) -> Tensor | None:
        """The rest of the output, once the signal has ended; none if nothing was pushed."""
        if self._held is None or self._same:
            return None
        total = resampled_length(self._seen, self.from_rate, self.to_rate)
        rest = resample(self._held, self.from_rate, self.to_rate)
        self._held = None
        return rest[..., (self._done - self._first) * self._group : total - self._first * self._group]

    def _give(self, ready: int, context: Tensor) -> Tensor:
        assert self._held is not None
        begin, end = (self._done - self._first) * self._group, (ready - self._first) * self._group
        out = resample(context, self.from_rate, self.to_rate)[..., begin:end]
        keep = max(ready - self._before, self._first)
        self._held = self._held[..., (keep - self._first) * self._step :].clone()   # a view would keep all that came before
        self._first, self._done = keep, ready
        return out


def resample_blocks(blocks: Iterable[Tensor], from_rate: int, to_rate: int) -> Iterator[Tensor]:
    """Pieces (C, t) of a signal at another sample rate; joined they equal `resample` of the whole. None is empty."""
    resampler = Resampler(from_rate, to_rate)
    for block in blocks:
        out = resampler.push(block)
        if out.shape[-1]:
            yield out
    rest = resampler.flush()
    if rest is not None and rest.shape[-1]:
        yield rest


def _ratio(from_rate: int, to_rate: int) -> tuple[int, int]:
    common = math.gcd(from_rate, to_rate)
    return from_rate // common, to_rate // common


def _margin(step: int, group: int) -> int:
    """Input samples on either side of an output sample that its filter reaches."""
    return math.ceil(LOBES * step / (min(step, group) * ROLLOFF))


def _has_table(step: int, group: int) -> bool:
    return group * (2 * _margin(step, group) + step) <= MAX_KERNEL


@lru_cache(maxsize=8)
def _table(step: int, group: int, device: str) -> torch.nn.Module:
    from torchaudio.transforms import Resample  # only those who resample need it

    # Asked for no type, it computes the phases in float32 and is 2e-6 off.
    with torch.inference_mode(False):      # the table must serve gradients too
        return Resample(step, group, lowpass_filter_width=LOBES, rolloff=ROLLOFF, dtype=torch.float64).float().to(device)


def _direct(padded: Tensor, step: int, group: int, samples: int) -> Tensor:
    """The same filter, each of its taps computed where it is used: slower, without a table of step × group taps.

    padded: (C, margin + T + margin + step). Returns (C, samples).
    """
    margin = _margin(step, group)
    cutoff = min(1.0, group / step) * ROLLOFF              # of the input's Nyquist frequency
    taps = torch.arange(2 * margin + 1, device=padded.device)
    pieces = []
    for begin in range(0, samples, DIRECT_OUTPUTS):
        n = torch.arange(begin, min(begin + DIRECT_OUTPUTS, samples), device=padded.device)
        whole = n * step // group                          # the input sample at or before each output sample
        fraction = (n * step % group).double() / group
        t = ((taps - margin)[None, :] - fraction[:, None]) * cutoff          # (outputs, taps), in zero crossings
        weight = torch.sinc(t) * torch.cos(t.clamp(-LOBES, LOBES) * (math.pi / LOBES / 2)) ** 2 * cutoff
        near = padded[:, whole[:, None] + taps[None, :]]   # (C, outputs, taps)
        pieces.append((near * weight.float()).sum(-1))
    return torch.cat(pieces, dim=-1)
