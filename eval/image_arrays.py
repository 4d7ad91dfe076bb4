"""Images as ADM's evaluator reads them: an NPZ file whose `arr_0` is uint8 (N, H, W, 3), read and written piece by piece.

50,000 images of 256 pixels are 9.8 GB: neither side holds them all. A file may hold statistics of a reference beside them.
"""

import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError

IMAGES = "arr_0"                 # ADM's name
SKIP = 2**24                     # bytes that are read at a time to get past images of other processes
BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class ImageArray:
    """The images of an NPZ file, of which only the header was read."""

    path: Path
    shape: tuple[int, int, int, int]      # (N, H, W, 3)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.shape[1], self.shape[2]

    def pieces(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images start … stop − 1 in order, uint8 (at most size, H, W, 3). Raises DataError on a file that ends early."""
        stop = len(self) if stop is None else stop
        bytes_each = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
                _read_header(file)
                _skip(file, start * bytes_each)
                for first in range(start, stop, size):
                    count = min(size, stop - first)
                    data = file.read(count * bytes_each)      # zipfile compares the check sum at the member's end
                    if len(data) < count * bytes_each:
                        raise DataError(f"{self.path} is damaged: it ends before image {first + count} of {len(self)}")
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])
        except BROKEN as error:
            raise DataError(f"{self.path} is damaged: {error}") from error

    def batches(self, size: int, rank: int = 0, world: int = 1) -> Iterator[ImageBatch]:
        """This process's share, a stretch of the file, as batches of images (B, 3, H, W) in [0, 1]; keys sort in file order."""
        start, stop = (len(self) * place // world for place in (rank, rank + 1))
        for piece in self.pieces(size, start, stop):
            keys = [image_key(start + i) for i in range(len(piece))]
            start += len(piece)
            yield ImageBatch(to_images(piece), keys)


def to_images(array: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(array.copy()).permute(0, 3, 1, 2).float() / 255


def image_key(index: int) -> str:
    """Name of the image of that number; names sort as numbers do."""
    return f"{index:08d}"


def open_image_array(path: str | Path) -> ImageArray:
    """The images of an NPZ file. Raises DataError if the file is missing or damaged, or holds no uint8 (N, H, W, 3)."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = array_names(path)
            if IMAGES not in names:
                raise DataError(f"{path} has no images: it needs {IMAGES}, it holds {', '.join(names[:4]) or 'nothing'}")
            with archive.open(f"{IMAGES}.npy") as file:
                shape, fortran, dtype = _read_header(file)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except BROKEN as error:
        raise DataError(f"{path} is not a readable NPZ file: {error}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
        raise DataError(f"{path}: {IMAGES} must be uint8 (N, H, W, 3), not {dtype} {tuple(shape)}"
                        + (" in Fortran order" if fortran else ""))
    return ImageArray(path, shape)


def array_names(path: str | Path) -> list[str]:
    """Names of the arrays in an NPZ file. Raises DataError if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except BROKEN as error:
        raise DataError(f"{path} is not a readable NPZ file: {error}") from error


def write_image_array(path: str | Path, shape: tuple[int, int, int, int], pieces: Iterable[np.ndarray]) -> Path:
    """Write uint8 pieces (n, H, W, 3) one after another as `arr_0` of an NPZ file, aside and then renamed.

    shape: of all of them together. Raises DataError if the pieces are not so many or not of that size.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    aside = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False)      # noqa: SIM115
    try:
        with aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                written = 0
                for piece in pieces:
                    if piece.dtype != np.uint8 or piece.shape[1:] != shape[1:]:
                        raise DataError(f"images must be uint8 {shape[1:]}, not {piece.dtype} {piece.shape[1:]}")
                    file.write(np.ascontiguousarray(piece).data)
                    written += len(piece)
        if written != shape[0]:
            raise DataError(f"{path} was to hold {shape[0]} images, there were {written}")
        os.chmod(aside.name, 0o644)
        os.replace(aside.name, path)
    except BaseException:
        Path(aside.name).unlink(missing_ok=True)
        raise
    return path


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type of an opened .npy; the file stands at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _skip(file: IO[bytes], count: int) -> None:
    """Go on by so many bytes; what is compressed must be read for it."""
    while count > 0:
        got = len(file.read(min(count, SKIP)))
        if not got:
            return      # the next read says that the file ends
        count -= got
