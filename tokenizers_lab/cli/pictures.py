"""Images of any size for a tokenizer that takes multiples of its patch."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.transforms import fit_image
from tokenizers_lab.errors import InputError


@dataclass(frozen=True)
class Geometry:
    """How an image was brought to the size that the network saw. All in pixels."""

    file_height: int       # of the file, after EXIF rotation
    file_width: int
    height: int            # what decoding gives back: the file's size, or the crop's
    width: int
    crop: int              # side of the centre crop; 0: the whole image, padded by reflection
    top: int               # rows of padding above
    left: int              # columns of padding at the left

    def texts(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {key: str(value) for key, value in asdict(self).items()}

    def undo(self, images: Tensor) -> Tensor:
        """Crop decoded images (B, 3, H, W) back to height × width."""
        return images[:, :, self.top : self.top + self.height, self.left : self.left + self.width]


def open_picture(file: str, multiple: int, size: int | None) -> tuple[Tensor, Geometry]:
    """An image (1, 3, H, W) in [0, 1] whose sides are multiples of `multiple`: padded by reflection, or with `size` the centre
    crop scaled to size × size. Raises DataError if it cannot be read, InputError on a size that does not fit."""
    pixels, geometry = fit_picture(read_image(file), multiple, size)
    return pixels.float() / 255, geometry


def fit_picture(image: Image.Image, multiple: int, size: int | None) -> tuple[Tensor, Geometry]:
    """The same of an RGB image that was read, as uint8. Raises InputError on a size that does not fit."""
    file_height, file_width = image.height, image.width
    if size is not None:
        if size < 1 or size % multiple:
            raise InputError(f"--size must be a multiple of {multiple} for this model, not {size}")
        return to_tensor(fit_image(image, size)), Geometry(file_height, file_width, size, size, size, 0, 0)
    pixels = to_tensor(image)
    top, left = -file_height % multiple // 2, -file_width % multiple // 2
    padded = reflect(reflect(pixels, 2, multiple, top), 3, multiple, left)
    return padded, Geometry(file_height, file_width, file_height, file_width, 0, top, left)


def reflect(pixels: Tensor, axis: int, multiple: int, before: int) -> Tensor:
    """Pad an axis to a multiple by reflection at the border pixels, again and again where the image is smaller than the pad."""
    n = pixels.shape[axis]
    total = n + -n % multiple
    places = np.abs(np.arange(-before, total - before))
    period = max(2 * (n - 1), 1)
    places = places % period
    places = np.minimum(places, period - places) if n > 1 else np.zeros_like(places)
    return pixels.index_select(axis, torch.from_numpy(places))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to uint8 (1, 3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def save_png(images: Tensor, path: Path) -> None:
    """Write the first of (B, 3, H, W) in [0, 1] as an 8-bit PNG."""
    array = (images[0].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path)
