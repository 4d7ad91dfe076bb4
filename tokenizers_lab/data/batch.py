"""What a data loader yields."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class ImageBatch:
    """Images as float32 (B, 3, H, W) in [0, 1], with the names of their sources and, where known, class labels."""

    images: Tensor
    keys: list[str]
    labels: Tensor | None = None      # (B,) int64
    converted: dict[str, str] = field(default_factory=dict)   # validation: key -> what an image was stored as, if not 8-bit RGB

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same batch on a device."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), labels=labels)
