"""Speech for the loader: random segments of clips, or whole ones, to train on; whole clips to validate with."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_lab.data.audio import AudioFile, audio_info, check_length, open_audio, read_segment
from tokenizers_lab.data.batch import SpeechBatch
from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.manifest import MANIFESTS, ClipListing, open_clips, to_row
from tokenizers_lab.data.reading import Numbers, Raw, Reader
from tokenizers_lab.data.resample import resampled_length
from tokenizers_lab.data.sampling import view_numbers
from tokenizers_lab.data.sources import Source
from tokenizers_lab.errors import ConfigError, DataError
from tokenizers_lab.settings import SpeechDataConfig
from tokenizers_lab.teachers.cache import Crop, FeatureFolder, open_features

SOUND_PARTS = ("flac", "wav", "mp3", "ogg", "opus")
CROPS = ("random", "fixed", "start")
UNLIMITED = 3600.0       # a max_seconds from here on is a guard against decoding bombs, not a choice of clips


@dataclass
class SpeechView:
    """A decoded clip, or a segment of one."""

    audio: Tensor                      # (channels, samples) float32
    start: int                         # where in the clip it begins, in samples
    about: dict[str, Any]              # text, speaker, language
    room: int = 0                      # samples that it shall have in a batch at least
    teacher: Tensor | None = None      # (channels, samples) the same seconds at the teacher's rate, where it has its own
    features: dict[str, Tensor] = field(default_factory=dict)   # (frames, D) each, where they are on disk
    trouble: str | None = None         # why they could not be read, which ends the run: the clip itself is whole


class SpeechReader(Reader):
    """Reads clips as a SpeechDataConfig says."""

    noun, sample = "clips", "sample:speech"
    manifests = MANIFESTS
    parts = (*SOUND_PARTS, "json", "txt")

    def __init__(self, cfg: SpeechDataConfig):
        self.cfg = cfg
        self.room = cfg.batch_frames
        self.features: dict[str, FeatureFolder] = {}

    def check(self) -> None:
        """Raises ConfigError if an option is out of its range."""
        cfg = self.cfg
        if cfg.crop not in CROPS:
            raise ConfigError(f"data.crop is '{cfg.crop}'; it can be {', '.join(CROPS)}")
        if cfg.features and cfg.crop == "random":
            raise ConfigError("data.features are of known crops: set data.crop=fixed or data.crop=start, not random")
        if cfg.batch_frames is not None and (cfg.features or cfg.teacher_rate is not None):
            raise ConfigError("data.batch_frames gives whole clips; data.features and data.teacher_rate are of segments")
        if (cfg.batch_frames is not None and cfg.batch_frames < 1) or not cfg.frame_rate > 0 or not cfg.text_frames >= 0:
            raise ConfigError("data.batch_frames and data.frame_rate must be positive, data.text_frames at least 0")
        if cfg.sample_rate < 1 or cfg.channels < 1 or round(cfg.segment_seconds * cfg.sample_rate) < 1:
            raise ConfigError("data.sample_rate, data.channels and data.segment_seconds must be positive")
        if cfg.teacher_rate is not None and cfg.teacher_rate < 1:
            raise ConfigError("data.teacher_rate must be positive")
        if not 0 <= cfg.min_seconds < cfg.max_seconds or (cfg.val_seconds is not None and cfg.val_seconds <= 0):
            raise ConfigError("data.min_seconds must be at least 0 and below data.max_seconds, data.val_seconds positive")

    def prepare(self) -> None:
        """Opens the folder of the teachers' features, if there is one. Raises ConfigError if it does not fit the config."""
        if self.cfg.features:
            self.features = open_features(Path(self.cfg.features).expanduser(), crop_options(self.cfg))

    def listing(self, source: Source) -> ClipListing:
        """The clips of a folder or a manifest that are within the limits. Raises DataError."""
        where = source.manifest or source.folder
        assert where is not None
        longest = self.cfg.max_seconds if self.cfg.max_seconds < UNLIMITED else math.inf
        return open_clips(where, self.cfg.min_seconds, longest, timed=self.room is not None)

    def from_shard(self, sample: dict[str, Any], name: str) -> Raw:
        """The sound, with what the JSON or text file beside it says. Raises DataError."""
        part = next((part for part in SOUND_PARTS if part in sample), None)
        if part is None:
            raise DataError(f"{name}: has no sound (one of {', '.join(SOUND_PARTS)})")
        about: dict[str, Any] = {"text": None, "speaker": None, "language": None, "duration": None}
        try:
            if "txt" in sample:
                about["text"] = sample["txt"].decode("utf-8").strip() or None
            if "json" in sample:
                row = to_row({**json.loads(sample["json"]), "file": name}, name)
                about |= {key: value for key, value in vars(row).items() if key != "file" and value is not None}
        except (ValueError, TypeError) as error:
            raise DataError(f"{name}: what is said of it cannot be read ({error})") from None
        return Raw(name, name, sample[part], about)

    def wants(self, raw: Raw) -> bool:
        """Whether a clip of a shard is within the limits; its header tells where nothing else does. Raises DataError."""
        if self.cfg.min_seconds <= 0 and self.cfg.max_seconds >= UNLIMITED:
            return True
        return self.cfg.min_seconds <= clip_seconds(raw) <= self.cfg.max_seconds

    def size(self, raw: Raw) -> float:
        """Frames that a clip takes in a batch, its text counted. Raises DataError if its length is nowhere to be read."""
        text = (raw.about["text"] or "").encode("utf-8", errors="replace")
        return clip_seconds(raw) * self.cfg.frame_rate + len(text) * self.cfg.text_frames

    def sizes(self, listing: ClipListing) -> np.ndarray:
        """The same of all clips of a listing: float64 (N,); NaN where the length is not known."""
        return listing.durations.astype(np.float64) * self.cfg.frame_rate + listing.texts.sizes() * self.cfg.text_frames

    def training(self, raw: Raw, numbers: Numbers) -> SpeechView:
        """A segment of a clip, or a shorter clip whole; with data.batch_frames whole clips. Raises DataError."""
        cfg = self.cfg
        if cfg.batch_frames is not None:
            with open_audio(raw.content, raw.name) as file:
                check_length(file, min(cfg.max_seconds, cfg.batch_frames / cfg.frame_rate))      # a listed one may be wrong
                return SpeechView(self._whole(file), 0, raw.about)
        wanted = round(cfg.segment_seconds * cfg.sample_rate)
        place = {"random": numbers[0], "fixed": view_numbers(0, raw.key)[0], "start": 0.0}[cfg.crop]
        with open_audio(raw.content, raw.name) as file:
            total = resampled_length(file.info.samples, file.info.sample_rate, cfg.sample_rate)
            start = int(place * (max(total - wanted, 0) + 1))
            audio = read_segment(file, start, wanted, cfg.sample_rate, cfg.channels)
            teacher = None
            if cfg.teacher_rate is not None:      # resampled from the source, not from the other copy
                first, samples = span_at(start, cfg.segment_seconds, cfg.sample_rate, cfg.teacher_rate)
                teacher = read_segment(file, first, samples, cfg.teacher_rate, cfg.channels)
            view = SpeechView(audio, start, raw.about, wanted, teacher)      # all training batches have one shape
        crop = Crop(raw.key, start, wanted, cfg.sample_rate, raw.about.get("text"))
        try:
            view.features = {name: folder.read(crop, audio) for name, folder in self.features.items()}
        except DataError as error:
            view.trouble = str(error)
        return view

    def validation(self, raw: Raw) -> SpeechView:
        """A whole clip, or its beginning. Raises DataError."""
        with open_audio(raw.content, raw.name) as file:
            if self.cfg.val_seconds is None:
                check_length(file, self.cfg.max_seconds)
            return SpeechView(self._whole(file, self.cfg.val_seconds), 0, raw.about)

    def _whole(self, file: AudioFile, seconds: float | None = None) -> Tensor:
        """All samples of a clip, or those of its first seconds: (channels, samples). Raises DataError."""
        samples = resampled_length(file.info.samples, file.info.sample_rate, self.cfg.sample_rate)
        if seconds is not None:
            samples = min(samples, round(seconds * self.cfg.sample_rate))
        return read_segment(file, 0, samples, self.cfg.sample_rate, self.cfg.channels)

    def assemble(self, views: Sequence[SpeechView], keys: list[str]) -> "FetchedSpeech":
        """A batch of views, each followed by zeros up to the longest; segments up to their full length."""
        lengths = torch.tensor([view.audio.shape[1] for view in views])
        longest = max(int(lengths.max()), *(view.room for view in views))
        audio = torch.zeros(len(views), self.cfg.channels, longest)
        teacher = None
        if all(view.teacher is not None for view in views):
            teacher = torch.zeros(len(views), self.cfg.channels, round(self.cfg.segment_seconds * (self.cfg.teacher_rate or 0)))
        for i, view in enumerate(views):
            audio[i, :, : view.audio.shape[1]] = view.audio
            if teacher is not None and view.teacher is not None:
                teacher[i, :, : view.teacher.shape[1]] = view.teacher
        features: dict[str, Tensor] = {}
        trouble = next((view.trouble for view in views if view.trouble), None)
        if trouble is None and all(view.features for view in views):
            features = {name: torch.stack([view.features[name] for view in views]) for name in views[0].features}
        known = {name: [view.about.get(name) for view in views] for name in ("text", "speaker", "language")}
        return FetchedSpeech(
            keys=keys, audio=audio, lengths=lengths, starts=torch.tensor([view.start for view in views]),
            texts=known["text"], speakers=known["speaker"], languages=known["language"], teacher=teacher, features=features,
            error=trouble,
        )   # fmt: skip


def clip_seconds(raw: Raw) -> float:
    """Length of a clip: what is listed, else what its header says. Raises DataError."""
    listed = raw.about.get("duration")
    return audio_info(raw.content, raw.name).seconds if listed is None else listed


def crop_options(cfg: SpeechDataConfig) -> dict[str, Any]:
    """The options that decide what a training segment is."""
    return {name: getattr(cfg, name) for name in ("crop", "segment_seconds", "sample_rate", "channels")}


class FixedCrops(SpeechReader):
    """Gives, in place of whole clips, the segment that training with the same config always hears of each."""

    def check(self) -> None:
        """Raises ConfigError if an option is out of its range, or if the crops are random."""
        super().check()
        if self.cfg.batch_frames is not None:
            raise ConfigError("only segments can be computed beforehand, and data.batch_frames gives whole clips: leave it out")
        if self.cfg.crop == "random":
            raise ConfigError("only known crops can be computed beforehand: set data.crop=fixed or data.crop=start, not random")

    def validation(self, raw: Raw) -> SpeechView:
        """The training segment. Raises DataError."""
        return self.training(raw, (0.0, 0.0, 0.0, 0.0))


def span_at(start: int, seconds: float, sample_rate: int, rate: int) -> tuple[int, int]:
    """(first sample, samples) at `rate` Hz of the `seconds` that begin at sample `start` at `sample_rate` Hz; LM-SPT's rule."""
    return int(start * rate / sample_rate), round(seconds * rate)


@dataclass
class FetchedSpeech(Fetched):
    """Clips with what is known of them."""

    audio: Tensor = field(default_factory=lambda: torch.empty(0))     # (B, channels, samples) float32
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))   # (B,) int64
    starts: Tensor = field(default_factory=lambda: torch.empty(0))    # (B,) int64
    texts: list[str | None] = field(default_factory=list)
    speakers: list[str | None] = field(default_factory=list)
    languages: list[str | None] = field(default_factory=list)
    teacher: Tensor | None = None                                      # (B, channels, samples) at the teacher's rate
    features: dict[str, Tensor] = field(default_factory=dict)          # name: (B, frames, D)

    def pin_memory(self) -> "FetchedSpeech":
        """Called by DataLoader's pinning thread."""
        super().pin_memory()
        self.features = {name: value.pin_memory() for name, value in self.features.items()}
        return self

    def batch(self) -> SpeechBatch:
        """The batch as training sees it."""
        return SpeechBatch(
            self.audio, self.lengths, self.keys, self.texts, self.speakers, self.languages, self.starts, self.teacher,
            self.features)
