"""What a data loader yields."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class ImageBatch:
    """Images as float32 (B, 3, H, W) in [0, 1], with the names of their sources and, where known, class labels and captions."""

    images: Tensor
    keys: list[str]
    labels: Tensor | None = None      # (B,) int64
    converted: dict[str, str] = field(default_factory=dict)   # validation: key -> what an image was stored as, if not 8-bit RGB
    texts: list[str] | None = None    # captions, with data.texts

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same batch on a device."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), labels=labels)


@dataclass
class LatentBatch:
    """Cached latents of images, float32 (B, C, h, w) as the tokenizer's `encode` gives them, with the images' names and
    classes."""

    latents: Tensor                   # its mode, or one draw
    keys: list[str]
    labels: Tensor | None = None      # (B,) int64
    spread: Tensor | None = None      # (B, C, h, w) the posterior's standard deviation, where moments were cached

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str) -> "LatentBatch":
        """The same batch on a device."""
        names = ("latents", "labels", "spread")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names if getattr(self, name) is not None}
        return replace(self, **moved)


@dataclass
class SpeechBatch:
    """Clips, or segments of them, as float32 (B, channels, samples) in [-1, 1], padded with zeros behind their `lengths`.

    Texts are those of whole clips, also where the audio is a segment; what is not known is None.
    """

    audio: Tensor
    lengths: Tensor                   # (B,) int64, samples of each that are sound
    keys: list[str]
    texts: list[str | None]
    speakers: list[str | None]
    languages: list[str | None]
    starts: Tensor                    # (B,) int64, where in its clip each begins, in samples at the batch's rate
    teacher_audio: Tensor | None = None                      # (B, channels, samples) the same seconds at data.teacher_rate
    features: dict[str, Tensor] = field(default_factory=dict)   # teacher: its features (B, frames, D), where they are cached

    def __len__(self) -> int:
        return len(self.audio)

    def to(self, device: torch.device | str) -> "SpeechBatch":
        """The same batch on a device."""
        names = ("audio", "lengths", "starts", "teacher_audio")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names if getattr(self, name) is not None}
        features = {name: value.to(device, non_blocking=True) for name, value in self.features.items()}
        return replace(self, **moved, features=features)
