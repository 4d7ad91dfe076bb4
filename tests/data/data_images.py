"""Images and shards that the data tests make for themselves."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tokenizers_lab.settings import ImageDataConfig


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth random RGB pixels, uint8 (H, W, 3): what a JPEG keeps within a few grey levels."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The bytes of a file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int, width: int = 40, height: int = 32) -> bytes:
    """A photograph-like JPEG."""
    return encoded(Image.fromarray(noise(width, height, seed)), quality=95)


def write_folder(root: Path, n: int, bad: tuple[int, ...] = ()) -> Path:
    """n images 0.jpg … of which those in `bad` are no images."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (root / f"{i}.jpg").write_bytes(b"no image" if i in bad else jpeg(i))
    return root


def write_shards(root: Path, sizes: list[int], bad: tuple[int, ...] = (), labels: bool = True) -> Path:
    """Shards 0.tar … of the given sizes; samples are numbered through all of them, and labelled by their number."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for _ in range(size):
                parts = {"jpg": b"no image" if number in bad else jpeg(number), "txt": b"ignored"}
                if labels:
                    parts["cls"] = str(number).encode()
                for kind, data in parts.items():
                    info = tarfile.TarInfo(f"{number:05d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return root


def data_config(train: object, **options: object) -> ImageDataConfig:
    """A small training config over a source."""
    return ImageDataConfig(**{"train": str(train), "size": 16, "workers": 0, "shuffle_buffer": 5, **options})   # type: ignore[arg-type]
