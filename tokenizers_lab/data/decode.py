"""Reads one image, however it is stored, as 8-bit RGB. Whatever cannot be read is a DataError of one line.

Handled: grey, palette, 1-bit, CMYK, 16 bits a channel, alpha (over white), EXIF rotation (applied), animations (first frame).
Colour profiles are not applied, as is usual in the field.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# The plugins register their format when they are imported. Only these may open a file: Pillow knows 40 more,
# some of which start other programs (EPS: Ghostscript).
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from tokenizers_lab.errors import DataError

MAX_PIXELS = 100_000_000
EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "avif"})
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF") if f in Image.OPEN)

_header_lock = threading.Lock()


def read_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """The image of a file or of a file's bytes, decoded whole, mode RGB (8 bits), turned as its EXIF says.

    name: what an error calls the image; by default the path. Raises DataError if the image is missing, damaged, truncated,
    not an image, or has more than max_pixels pixels (read from its header, before decoding).
    """
    with open_image(source, max_pixels, name) as image:
        return to_rgb(image, name or _name(source))


def open_bytes(source: str | Path | bytes, name: str) -> io.BufferedIOBase:
    """A stream over a file, or over bytes. name: what errors call it. Raises DataError if it cannot be opened."""
    try:
        return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


@contextmanager
def open_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Iterator[Image.Image]:
    """The image with only its header read: `size`, `format` and `draft` work, `to_rgb` decodes it.

    Raises DataError if there is no such file, it is no image, or its header says more than max_pixels pixels.
    """
    name = name or _name(source)
    with open_bytes(source, name) as handle:
        image = _read_header(handle, name)
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"{name}: {width} × {height} pixels are more than max_pixels ({max_pixels:,}); "
                "scale the image down, or raise data.max_pixels if it is to be trusted"
            )
        yield image


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Decode an opened image to mode RGB, 8 bits, turned as its EXIF says. Raises DataError if it is damaged."""
    try:
        image.load()
        return _convert(_upright(image))
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    # Damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error, zlib.error, IndexError, MemoryError, …
    except Exception as error:
        raise DataError(f"{name}: truncated or damaged ({_one_line(error)})") from error


def converted_from(image: Image.Image) -> str | None:
    """What an opened image (`open_image`), not decoded yet, is converted from to 8-bit RGB; None if it is that already."""
    if image.mode.startswith(("I", "F")):
        return "grey, 16 bits or more"
    if _is_deep(image):
        return "16 bits a channel"
    if image.mode in ("1", "L"):
        return "grey"
    if image.has_transparency_data:
        return "transparency, over white"
    return {"RGB": None, "P": "palette", "YCbCr": None}.get(image.mode, image.mode)


def _is_deep(image: Image.Image) -> bool:
    """Whether an opened colour image has 16 bits a channel, which Pillow's mode RGB does not tell."""
    tiles = [str(tile) for tile in getattr(image, "tile", ())]
    return any(";16" in tile for tile in tiles) or (image.format == "PPM" and any("65535" in tile for tile in tiles))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the rotation that the EXIF header asks for. Exact for JPEG, whose header precedes its pixels."""
    width, height = image.size
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:   # a damaged EXIF block says nothing about the pixels
        turned = False
    return (height, width) if turned and image.format != "TIFF" else (width, height)   # Pillow's TIFF size is upright already


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels of an RGB image as uint8 (3, H, W), a view without a copy of its own."""
    return np.asarray(image).transpose(2, 0, 1)


def _read_header(handle: io.BufferedIOBase, name: str) -> Image.Image:
    # Pillow's own limit is a global and lower than what max_pixels may ask for; ours is checked right after.
    with _header_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(handle, formats=FORMATS)   # type: ignore[arg-type]
        except UnidentifiedImageError:
            what = "not an image" if handle.seek(0, io.SEEK_END) else "an empty file"
            raise DataError(f"{name}: {what} (known: {', '.join(FORMATS)})") from None
        except Exception as error:
            raise DataError(f"{name}: damaged header ({_one_line(error)})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:   # a damaged EXIF block says nothing about the pixels
        return image
    if orientation in range(2, 9):
        return ImageOps.exif_transpose(image)
    return image        # exif_transpose would copy it


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _scaled(np.asarray(image), 65535)
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("32-bit integers of unknown range; save it with 8 or 16 bits a channel")
        return _scaled(values, 65535)
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise DataError("floating point values outside [0, 1]; save it with 8 or 16 bits a channel")
        return _scaled(values, 1)
    if image.has_transparency_data:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)   # from premultiplied alpha
        pixels = (image.convert(straight) if straight else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")


def _scaled(values: np.ndarray, top: int) -> Image.Image:
    grey = np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _name(source: str | Path | bytes) -> str:
    return "image" if isinstance(source, bytes) else str(source)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
