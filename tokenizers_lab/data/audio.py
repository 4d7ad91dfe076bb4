"""Reads sound files (WAV, FLAC, OGG, MP3, AIFF, …) as float32 in [-1, 1]: whole, a stretch of them, or in pieces.

Integers of any depth are scaled to [-1, 1]; floats are taken as they are. Whatever cannot be read is a DataError of one line.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from tokenizers_lab.data.decode import open_bytes
from tokenizers_lab.data.resample import resample, resample_blocks, resample_span, resampled_length
from tokenizers_lab.errors import DataError

EXTENSIONS = frozenset({"wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "au", "w64", "rf64", "caf"})
FORMATS = frozenset({"WAV", "WAVEX", "FLAC", "OGG", "MP3", "MPEG", "AIFF", "AU", "W64", "RF64", "CAF"})
MAX_SECONDS = 4 * 3600.0       # longer files are read in pieces, not whole
MAX_CHANNELS = 64
RATES = (1_000, 768_000)       # Hz: what a header may say
MAX_PEAK = 100.0               # floats beyond this are not sound in [-1, 1]; somewhat above 1 happens after processing
WAV_BYTES = 4_000_000_000      # of samples, that a WAV header can tell
BLOCK = 1 << 16                # samples of a channel that `read_blocks` decodes at once

_WAV_DATA = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAM = 0x7FFFF000           # a WAV data size from here on was written before the length was known


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says."""

    sample_rate: int     # Hz
    channels: int
    samples: int         # of each channel

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.samples / self.sample_rate


class AudioFile:
    """An open sound file; made by `open_audio`."""

    def __init__(self, file: soundfile.SoundFile, name: str):
        self._file, self.name, self.format = file, name, str(file.format)     # libsndfile's name of the format
        self.info = AudioInfo(file.samplerate, file.channels, file.frames)

    def read(self, first: int = 0, samples: int | None = None) -> Tensor:
        """Samples [first, first + samples) of all channels, cut at the file's end: float32 (channels, t).

        Raises DataError if the file is damaged or ends before its header says so, or holds NaN or infinity.
        """
        samples = min(self.info.samples - first, self.info.samples if samples is None else samples)
        try:
            if first != self._file.tell():
                self._file.seek(first)
            values = self._file.read(samples, dtype="float32", always_2d=True)     # (t, channels)
        # Damaged files make soundfile raise LibsndfileError, RuntimeError, MemoryError, …
        except Exception as error:
            raise DataError(f"{self.name}: truncated or damaged ({_one_line(error)})") from error
        if len(values) < samples:
            raise DataError(f"{self.name}: truncated; its header promises {self.info.samples:,} samples, it ends at "
                            f"{first + len(values):,}")
        return torch.from_numpy(self._sound(values).T.copy())

    def blocks(self, samples: int = BLOCK) -> Iterator[Tensor]:
        """The whole file in pieces of that many samples: float32 (channels, t). Raises DataError."""
        for first in range(0, self.info.samples, samples):
            yield self.read(first, samples)

    def _sound(self, values: np.ndarray) -> np.ndarray:
        peak = max(values.max(initial=0.0), -values.min(initial=0.0))      # NaN in a comparison below is False
        if peak <= MAX_PEAK:
            return values
        if not np.isfinite(values).all():
            raise DataError(f"{self.name}: holds NaN or infinity")
        raise DataError(f"{self.name}: floating point values up to {peak:g}; scale them to [-1, 1]")


@contextmanager
def open_audio(source: str | Path | bytes, name: str | None = None) -> Iterator[AudioFile]:
    """A sound file, or the bytes of one, with only its header read. name: what errors call it; by default the path.

    Raises DataError if it is missing, empty, no sound file, truncated as far as its container tells, or has a sample rate or
    a number of channels out of bounds.
    """
    name = name or ("audio" if isinstance(source, bytes) else str(source))
    with open_bytes(source, name) as handle:
        size = handle.seek(0, io.SEEK_END)
        if size == 0:
            raise DataError(f"{name}: an empty file")
        whole = _ogg_is_whole(handle, size)
        handle.seek(0)
        try:
            file = soundfile.SoundFile(handle if isinstance(source, bytes) else _descriptor(handle))
        except Exception as error:
            raise DataError(f"{name}: not a sound file, or a damaged one ({_one_line(error)})") from error
        with file:
            _check_header(file, name)
            if not whole and file.format == "OGG":
                raise DataError(f"{name}: truncated; its last page does not end the stream")
            yield AudioFile(file, name)


def audio_info(source: str | Path | bytes, name: str | None = None) -> AudioInfo:
    """What the header of a file, or of a file's bytes, says. Raises DataError."""
    with open_audio(source, name) as file:
        return file.info


def read_audio(
    source: str | Path | bytes,
    sample_rate: int | None = None,
    channels: int | None = None,
    max_seconds: float = MAX_SECONDS,
    name: str | None = None,
) -> tuple[Tensor, int]:
    """A whole file, or a file's bytes, as float32 (channels, samples), and its sample rate in Hz.

    sample_rate: resample to it; none: the file's. channels: 1 mixes down by the mean, see `to_channels`; none: the file's.
    Raises DataError if it is unreadable, damaged, not finite, or longer than max_seconds by its header.
    """
    with open_audio(source, name) as file:
        check_length(file, max_seconds)
        audio = to_channels(file.read(), channels, file.name)
        rate = sample_rate or file.info.sample_rate
        return resample(audio, file.info.sample_rate, rate), rate


def read_blocks(
    source: str | Path | bytes,
    sample_rate: int | None = None,
    channels: int | None = None,
    block: int = BLOCK,
    name: str | None = None,
    pick: int | None = None,
) -> Iterator[Tensor]:
    """What `read_audio` gives, in pieces of about `block` samples of the file: any length in constant memory.

    pick: only this channel of the file, counted from 0. Yields float32 (channels, t), t above 0; joined they equal the whole.
    Raises DataError.
    """
    with open_audio(source, name) as file:
        picked = (piece if pick is None else piece[pick : pick + 1] for piece in file.blocks(block))
        mixed = (to_channels(piece, channels, file.name) for piece in picked)
        yield from resample_blocks(mixed, file.info.sample_rate, sample_rate or file.info.sample_rate)


def read_segment(file: AudioFile, start: int, samples: int, sample_rate: int, channels: int | None = None) -> Tensor:
    """Samples [start, start + samples) of the resampled file, decoding no more than they need.

    start, samples: in samples at sample_rate (Hz); cut at the file's end. Returns float32 (channels, t), equal to that stretch
    of `read_audio`. Raises DataError.
    """
    total = resampled_length(file.info.samples, file.info.sample_rate, sample_rate)
    samples = min(samples, total - start)
    first, last, skip = resample_span(start, samples, file.info.sample_rate, sample_rate)
    audio = to_channels(file.read(first, last - first), channels, file.name)
    return resample(audio, file.info.sample_rate, sample_rate)[:, skip : skip + samples].contiguous()


def to_channels(audio: Tensor, channels: int | None, name: str = "audio") -> Tensor:
    """(C, T) with another number of channels: 1 is their mean, one channel is repeated, none keeps them as they are.

    Raises DataError for anything else, such as 6 channels that shall become 2: which belong together is not known.
    """
    if channels is None or channels == len(audio):
        return audio
    if channels == 1:
        return audio.mean(0, keepdim=True)
    if len(audio) == 1:
        return audio.expand(channels, -1)
    raise DataError(f"{name}: has {len(audio)} channels, which do not become {channels}; mix it down or pick channels first")


def encode_audio(audio: Tensor, sample_rate: int, kind: str = "FLAC", subtype: str = "PCM_16") -> bytes:
    """The bytes of a sound file of a kind (WAV, FLAC, …).

    audio: (channels, samples) in [-1, 1]; clipped there unless subtype is FLOAT.
    """
    values = audio.detach().cpu().float()
    if subtype != "FLOAT":
        values = values.clamp(-1, 1)
    buffer = io.BytesIO()
    soundfile.write(buffer, values.T.numpy(), sample_rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def write_blocks(
    path: str | Path, blocks: Iterable[Tensor], samples: int, channels: int, sample_rate: int, subtype: str = "PCM_16"
) -> None:
    """Write the first `samples` of pieces (channels, t) in [-1, 1] as a WAV file of any length, in constant memory.

    Clipped to [-1, 1] unless subtype is FLOAT. More than WAV's 4 GB make it RF64. The file appears under its name when it is
    whole. Raises what `blocks` raises, and DataError if it cannot be written, or if less comes or what comes is not finite.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")
    kind = "WAV" if samples * channels * (4 if subtype == "FLOAT" else 2) < WAV_BYTES else "RF64"
    left = samples
    try:
        with soundfile.SoundFile(draft, "w", sample_rate, channels, subtype, format=kind) as file:
            for block in blocks:
                values = block[:, :left].detach().cpu().float()
                if not values.isfinite().all():
                    raise DataError(f"{path}: the samples to write hold NaN or infinity")
                file.write((values if subtype == "FLOAT" else values.clamp(-1, 1)).T.numpy())
                left -= values.shape[1]
        if left:
            raise DataError(f"{path}: only {samples - left:,} of {samples:,} samples came")
        os.replace(draft, path)
    except soundfile.SoundFileError as error:
        raise DataError(f"{path}: cannot be written ({_one_line(error)})") from error
    finally:
        draft.unlink(missing_ok=True)


def check_length(file: AudioFile, max_seconds: float) -> None:
    """Raises DataError if the file's header says that it is longer."""
    if file.info.seconds > max_seconds:
        length = f"{file.info.seconds:,.0f} s are more than {max_seconds:,.0f} s"
        raise DataError(f"{file.name}: {length}; cut it, or read it in pieces")


def _check_header(file: soundfile.SoundFile, name: str) -> None:
    if file.format not in FORMATS:
        raise DataError(f"{name}: sound files of type {file.format} are not read; convert it to WAV or FLAC")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise DataError(f"{name}: a sample rate of {file.samplerate} Hz is outside {RATES[0]} to {RATES[1]}")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise DataError(f"{name}: {file.channels} channels are more than {MAX_CHANNELS}")
    if file.frames == 0:
        raise DataError(f"{name}: holds no samples")
    if not 0 < file.frames < 1 << 50:      # what libsndfile says when it does not know
        raise DataError(f"{name}: its header does not say how long it is; convert it to WAV or FLAC")
    for promised, there in _WAV_DATA.findall(file.extra_info):
        if int(there) < int(promised) < _STREAM:
            raise DataError(f"{name}: truncated; its header promises {promised} bytes of samples, {there} are there")


def _ogg_is_whole(handle: io.BufferedIOBase, size: int) -> bool:
    """Whether the last page of an OGG file is marked as the stream's last; true for other files."""
    handle.seek(0)
    if handle.read(4) != b"OggS":
        return True
    handle.seek(max(0, size - 70_000))     # a page has at most 65,307 bytes
    tail = handle.read()
    page = tail[max(tail.rfind(b"OggS"), 0) :]
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        return False
    return bool(page[5] & 4)


def _descriptor(handle: io.BufferedIOBase) -> int:
    """A descriptor of its own at the file's start. libsndfile then reads by itself, and has no name to take raw samples by."""
    descriptor = os.dup(handle.fileno())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"^Error opening .*?: ", "", text) or type(error).__name__
