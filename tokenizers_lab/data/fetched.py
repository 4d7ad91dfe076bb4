"""What a decoding process hands to the training process: bytes, a quarter of the floats that they become."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.decode import to_array
from tokenizers_lab.data.quarantine import Bad


@dataclass
class Fetched:
    """A decoded batch, the samples that were unreadable on the way, and, instead of an exception, the error that ended it."""

    images: Tensor | None = None       # uint8 (B, 3, H, W); float32 [0, 1] once pinned
    keys: list[str] = field(default_factory=list)
    labels: Tensor | None = None       # (B,) int64
    bad: list[Bad] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)   # validation: key -> what it was stored as, if not 8-bit RGB
    error: str | None = None           # a DataError's line
    stream: int = 0                    # shards: which of the rank's streams this is
    position: list[int] | None = None  # shards: that stream's epoch, place and index after this batch

    def pin_memory(self) -> "Fetched":
        """Called by DataLoader's pinning thread: the conversion to float happens there, off the training thread."""
        if self.images is not None:
            self.images = _to_float(self.images).pin_memory()
        if self.labels is not None:
            self.labels = self.labels.pin_memory()
        return self

    def batch(self) -> ImageBatch:
        """The batch as training sees it."""
        assert self.images is not None
        return ImageBatch(images=_to_float(self.images), keys=self.keys, labels=self.labels, converted=self.converted)


def assemble(views: Sequence[Image.Image], keys: list[str], labels: Sequence[int | None]) -> Fetched:
    """A batch of views of one size (RGB). Labels are kept if all samples have one."""
    size = views[0].height, views[0].width
    images = torch.empty((len(views), 3, *size), dtype=torch.uint8)
    pixels = images.numpy()
    for i, view in enumerate(views):
        pixels[i] = to_array(view)
    known = [label for label in labels if label is not None]
    return Fetched(images, keys, torch.tensor(known) if len(known) == len(labels) else None)


def _to_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.to(torch.float32).div_(255)
