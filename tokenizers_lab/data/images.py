"""Images for the loader: class labels, the crops of training and validation, batches of bytes that become floats."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.decode import converted_from, open_image, to_array
from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.folder import ImageFolder, open_folder
from tokenizers_lab.data.reading import Numbers, Raw, Reader
from tokenizers_lab.data.sources import Source
from tokenizers_lab.data.transforms import check_crop, training_view, validation_view
from tokenizers_lab.errors import DataError
from tokenizers_lab.settings import ImageDataConfig

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp")


@dataclass
class ImageView:
    """A decoded square."""

    image: Image.Image                 # RGB
    label: int | None
    converted: str | None = None       # validation: what it was stored as, if not 8-bit RGB


class ImageReader(Reader):
    """Reads images as an ImageDataConfig says."""

    noun, sample = "images", "sample:photos"
    parts = (*IMAGE_PARTS, "cls")

    def __init__(self, cfg: ImageDataConfig):
        self.cfg = cfg

    def check(self) -> None:
        """Raises ConfigError if the crop's options contradict each other."""
        check_crop(self.cfg)

    def listing(self, source: Source) -> ImageFolder:
        """The images under a folder; its sub-folders are classes. Raises DataError."""
        assert source.folder is not None
        return open_folder(source.folder)

    def from_shard(self, sample: dict[str, Any], name: str) -> Raw:
        """The image and its class. Raises DataError if there is no image, or the class is no integer."""
        label = None
        if "cls" in sample:
            try:
                label = int(sample["cls"])
            except ValueError:
                raise DataError(f"{name}: its class {sample['cls'][:20]!r} is not a number") from None
        for part in IMAGE_PARTS:
            if part in sample:
                return Raw(name, name, sample[part], {"label": label})
        raise DataError(f"{name}: has no image (one of {', '.join(IMAGE_PARTS)})")

    def training(self, raw: Raw, numbers: Numbers) -> ImageView:
        """The crop, perhaps mirrored, of an image. Raises DataError."""
        with open_image(raw.content, self.cfg.max_pixels, raw.name) as image:
            return ImageView(training_view(image, self.cfg, numbers, raw.name), raw.about["label"])

    def validation(self, raw: Raw) -> ImageView:
        """The centre crop of an image. Raises DataError."""
        with open_image(raw.content, self.cfg.max_pixels, raw.name) as image:
            stored = converted_from(image)
            return ImageView(validation_view(image, self.cfg, raw.name), raw.about["label"], stored)

    def assemble(self, views: Sequence[ImageView], keys: list[str]) -> "FetchedImages":
        """A batch of views of one size. Labels are kept if all samples have one."""
        size = views[0].image.height, views[0].image.width
        images = torch.empty((len(views), 3, *size), dtype=torch.uint8)
        pixels = images.numpy()
        for i, view in enumerate(views):
            pixels[i] = to_array(view.image)
        labels = [view.label for view in views if view.label is not None]
        return FetchedImages(
            keys=keys,
            images=images,
            labels=torch.tensor(labels) if len(labels) == len(views) else None,
            converted={key: view.converted for key, view in zip(keys, views) if view.converted is not None},
        )


@dataclass
class FetchedImages(Fetched):
    """Images as bytes, a quarter of the floats that they become."""

    images: Tensor = field(default_factory=lambda: torch.empty(0))   # uint8 (B, 3, H, W); float32 [0, 1] once pinned
    labels: Tensor | None = None                                     # (B,) int64
    converted: dict[str, str] = field(default_factory=dict)          # validation: key -> what it was stored as, if not 8-bit RGB

    def pin_memory(self) -> Fetched:
        """The conversion to float happens here, in the pinning thread, off the training thread."""
        self.images = _to_float(self.images)
        return super().pin_memory()

    def batch(self) -> ImageBatch:
        """Floats in [0, 1]."""
        return ImageBatch(images=_to_float(self.images), keys=self.keys, labels=self.labels, converted=self.converted)


def _to_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.to(torch.float32).div_(255)
