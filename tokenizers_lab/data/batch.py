"""What a data loader yields."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class ImageBatch:
    """Images as float32 (B, 3, H, W) in [0, 1], with the names of their sources and, where known, class labels."""

    images: Tensor
    keys: list[str]
    labels: Tensor | None = None      # (B,) int64

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same batch on a device."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), labels=labels)
