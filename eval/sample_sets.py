"""Sets of finished images: an NPZ file or a folder, of samples that a generator made or of the images they are compared with."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.decode import converted_from, open_image, to_rgb
from tokenizers_lab.data.folder import ImageFolder, open_folder
from tokenizers_lab.data.images import ImageReader, ImageView
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.data.reading import Raw
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.settings import ImageDataConfig

from .gather import on_first, processes
from .image_arrays import ImageArray, open_image_array
from .statistics import content_hash

SAMPLES_FILE, PROTOCOL_FILE, IMAGES_FOLDER = "samples.npz", "samples.json", "images"      # what `toklab generate` leaves


class AsIsReader(ImageReader):
    """Reads images as they are stored, all of one size."""

    def __init__(self, cfg: ImageDataConfig, size: tuple[int, int]):
        super().__init__(cfg)
        self.height_width = size

    def validation(self, raw: Raw) -> ImageView:
        """The whole image. Raises DataError if it is unreadable or of another size."""
        with open_image(raw.content, self.cfg.max_pixels, raw.name) as image:
            stored = converted_from(image)
            pixels = to_rgb(image, raw.name)
        if (pixels.height, pixels.width) != self.height_width:
            raise DataError(f"{raw.name} has {pixels.width} × {pixels.height} pixels, the first image {self.height_width[1]} × "
                            f"{self.height_width[0]}: samples are of one size")
        return ImageView(pixels, raw.about["label"], converted=stored)


@dataclass(frozen=True)
class SampleSet:
    """Images of one size, in order."""

    name: str                     # as it was given
    source: ImageArray | ImageFolder
    size: tuple[int, int]         # height, width in pixels

    def __len__(self) -> int:
        return len(self.source)

    @property
    def hashed(self) -> list[str] | None:
        """Sorted names by whose hash the splits of an Inception Score are drawn, where the order of names would sort images by
        class: where they lie in sub-folders. None elsewhere: splits are of the order that there is."""
        if isinstance(self.source, ImageArray) or not any("/" in name for name in self.source.names):
            return None
        return sorted(self.source.names)

    def batches(self, size: int, workers: int = 0) -> Iterator[ImageBatch]:
        """This process's share, images (B, 3, H, W) in [0, 1]; keys sort in the order of the file or of names."""
        if isinstance(self.source, ImageArray):
            return self.source.batches(size, *processes())
        cfg = ImageDataConfig(train="", val=str(self.source.root), size=max(self.size), workers=workers)
        return validation_batches(cfg, size, *processes(), reader=AsIsReader(cfg, self.size))

    def sha256(self) -> str:
        """Of the file, or of all files of the folder (`statistics.content_hash`); the same on all processes."""
        if isinstance(self.source, ImageArray):
            path = self.source.path
            return on_first(lambda: sha256_of(path))
        folder = self.source
        return on_first(lambda: content_hash([folder.root / name for name in folder.names], folder.root))

    def protocol(self) -> dict[str, Any] | None:
        """What `toklab generate` wrote beside the images; None if it wrote nothing that is readable."""
        place = self.source.path if isinstance(self.source, ImageArray) else self.source.root
        return read_protocol(place.parent / PROTOCOL_FILE)


def read_protocol(file: Path) -> dict[str, Any] | None:
    """What a samples.json says; None if there is none that is readable."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def find_images(name: str) -> Path:
    """Where the images are: in a folder of `toklab generate` its samples.npz, else its images/; anything else itself."""
    path = Path(name).expanduser()
    if not (path / PROTOCOL_FILE).is_file():
        return path
    return path / (SAMPLES_FILE if (path / SAMPLES_FILE).is_file() else IMAGES_FOLDER)


def open_samples(name: str) -> SampleSet:
    """An NPZ file with `arr_0`, a folder of `toklab generate`, or a folder of images of one size.

    Raises DataError if it is none of them or empty, InputError for anything else than a folder or an .npz file.
    """
    path = find_images(name)
    if path.is_dir():
        folder = open_folder(path)
        with open_image(folder.root / folder.names[0]) as image:
            pixels = to_rgb(image, folder.names[0])      # turned as its EXIF says
        return SampleSet(name, folder, (pixels.height, pixels.width))
    if path.suffix != ".npz":
        raise InputError(f"{name} is neither a folder of images nor an .npz file"
                         + ("" if path.exists() else ": there is no such file or folder"))
    array = open_image_array(path)
    return SampleSet(name, array, array.size)
