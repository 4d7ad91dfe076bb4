"""Images for the loader: labels, captions, the crops of training and validation, batches of bytes that become floats."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.decode import converted_from, open_image, to_array
from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.folder import ImageFolder
from tokenizers_lab.data.manifest import MANIFESTS, to_row
from tokenizers_lab.data.pairs import open_images
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
    text: str | None = None
    converted: str | None = None       # validation: what it was stored as, if not 8-bit RGB


class ImageReader(Reader):
    """Reads images as an ImageDataConfig says."""

    noun, sample = "images", "sample:photos"
    manifests = MANIFESTS

    def __init__(self, cfg: ImageDataConfig):
        self.cfg = cfg
        self.parts = (*IMAGE_PARTS, "cls", *(("txt", "json") if cfg.texts else ()))

    def check(self) -> None:
        """Raises ConfigError if the crop's options contradict each other."""
        check_crop(self.cfg)

    def listing(self, source: Source) -> ImageFolder:
        """The images of a manifest, or under a folder, whose sub-folders are classes. Raises DataError."""
        where = source.manifest or source.folder
        assert where is not None
        return open_images(where, self.cfg.texts)

    def from_shard(self, sample: dict[str, Any], name: str) -> Raw:
        """The image, its class and, with data.texts, its caption. Raises DataError if one is missing or wrong."""
        label = None
        if "cls" in sample:
            try:
                label = int(sample["cls"])
            except ValueError:
                raise DataError(f"{name}: its class {sample['cls'][:20]!r} is not a number") from None
        text = shard_text(sample, name) if self.cfg.texts else None
        for part in IMAGE_PARTS:
            if part in sample:
                return Raw(name, name, sample[part], {"label": label, "text": text})
        raise DataError(f"{name}: has no image (one of {', '.join(IMAGE_PARTS)})")

    def training(self, raw: Raw, numbers: Numbers) -> ImageView:
        """The crop, perhaps mirrored, of an image. Raises DataError."""
        with open_image(raw.content, self.cfg.max_pixels, raw.name) as image:
            return ImageView(training_view(image, self.cfg, numbers, raw.name), raw.about["label"], raw.about["text"])

    def validation(self, raw: Raw) -> ImageView:
        """The centre crop of an image. Raises DataError."""
        with open_image(raw.content, self.cfg.max_pixels, raw.name) as image:
            stored = converted_from(image)
            return ImageView(validation_view(image, self.cfg, raw.name), raw.about["label"], raw.about["text"], stored)

    def assemble(self, views: Sequence[ImageView], keys: list[str]) -> "FetchedImages":
        """A batch of views of one size. Labels, and captions, are kept if all samples have one."""
        size = views[0].image.height, views[0].image.width
        images = torch.empty((len(views), 3, *size), dtype=torch.uint8)
        pixels = images.numpy()
        for i, view in enumerate(views):
            pixels[i] = to_array(view.image)
        labels = [view.label for view in views if view.label is not None]
        texts = [view.text for view in views if view.text is not None]
        return FetchedImages(
            keys=keys,
            images=images,
            labels=torch.tensor(labels) if len(labels) == len(views) else None,
            texts=texts if self.cfg.texts and len(texts) == len(views) else None,
            converted={key: view.converted for key, view in zip(keys, views) if view.converted is not None},
        )


@dataclass
class FetchedImages(Fetched):
    """Images as bytes, a quarter of the floats that they become."""

    images: Tensor = field(default_factory=lambda: torch.empty(0))   # uint8 (B, 3, H, W); float32 [0, 1] once pinned
    labels: Tensor | None = None                                     # (B,) int64
    converted: dict[str, str] = field(default_factory=dict)          # validation: key -> what it was stored as, if not 8-bit RGB
    texts: list[str] | None = None

    def pin_memory(self) -> Fetched:
        """The conversion to float happens here, in the pinning thread, off the training thread."""
        self.images = _to_float(self.images)
        return super().pin_memory()

    def batch(self) -> ImageBatch:
        """Floats in [0, 1]."""
        return ImageBatch(_to_float(self.images), self.keys, self.labels, self.converted, self.texts)


def shard_text(sample: dict[str, Any], name: str) -> str:
    """The caption of a shard's sample: its .txt file, or the text or caption that its .json file names. Raises DataError."""
    try:
        if "txt" in sample:
            text = sample["txt"].decode("utf-8").strip()
        else:
            text = (to_row({**json.loads(sample.get("json", b"{}")), "file": name}, name).text or "").strip()
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: its caption cannot be read ({error})") from None
    if not text:
        raise DataError(f"{name}: has no caption (.txt, or text or caption in .json)")
    return text


def _to_float(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.to(torch.float32).div_(255)
