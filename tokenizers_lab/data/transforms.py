"""From an image of any size to a square: the centre crop of ADM, the random crop of training, the mirror."""

from dataclasses import replace

from PIL import Image

from tokenizers_lab.data.decode import MAX_PIXELS, to_rgb, upright_size
from tokenizers_lab.errors import ConfigError, DataError
from tokenizers_lab.settings import ImageDataConfig

Numbers = tuple[float, float, float, float]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def fit_image(image: Image.Image, size: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol 2021), the protocol of the field: an RGB image of size × size pixels.

    Halved with a box filter while the short side is at least twice the size, then scaled (bicubic) until the short side
    is the size, then cropped. Raises DataError if the image is so elongated that scaling it gives over max_pixels pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max_pixels:
        raise DataError(f"{image.width} × {image.height} pixels are too elongated to be scaled to a short side of {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def validation_view(image: Image.Image, cfg: ImageDataConfig, name: str) -> Image.Image:
    """The centre crop of an opened image (`open_image`), decoded in full. Raises DataError."""
    return _fit(to_rgb(image, name), cfg, name)


def training_view(image: Image.Image, cfg: ImageDataConfig, numbers: Numbers, name: str) -> Image.Image:
    """Decode, crop as cfg.crop says, and mirror an opened image (`open_image`); an RGB image of train_size pixels a side.

    numbers: four uniform in [0, 1), for the crop's side, left and top, and for the mirror (`sampling.view_numbers`).
    Raises DataError if the image is damaged.
    """
    side, left, top, mirror = numbers
    cfg = cfg if cfg.train_size is None else replace(cfg, size=cfg.train_size)
    if cfg.crop == "random":
        view = _random_square(image, cfg, (side, left, top), name)
    else:
        view = _fit(to_rgb(image, name), cfg, name)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if cfg.flip and mirror < 0.5 else view


def check_crop(cfg: ImageDataConfig) -> None:
    """Raises ConfigError if the crop's options contradict each other."""
    if cfg.crop not in ("center", "random"):
        raise ConfigError(f"data.crop is '{cfg.crop}'; it can be center or random")
    size = cfg.size if cfg.train_size is None else cfg.train_size
    if cfg.crop_filter not in FILTERS:
        raise ConfigError(f"data.crop_filter is '{cfg.crop_filter}'; it can be {' or '.join(FILTERS)}")
    if not 0 <= cfg.crop_share <= 1 or (cfg.crop_share and cfg.crop_min):
        raise ConfigError("data.crop_share must be in [0, 1], and stands in place of data.crop_min")
    if min(cfg.size, size) < 1 or cfg.crop_min < 0 or cfg.crop_max < 0:
        raise ConfigError("data.size and data.train_size must be positive, data.crop_min and data.crop_max at least 0")
    low = 1 if cfg.crop_share else cfg.crop_min or size
    if cfg.crop == "random" and cfg.crop_max and low > cfg.crop_max:
        raise ConfigError(f"data.crop_max ({cfg.crop_max}) is smaller than the smallest crop ({low}); raise it or lower crop_min")


def _fit(image: Image.Image, cfg: ImageDataConfig, name: str) -> Image.Image:
    try:
        return fit_image(image, cfg.size, cfg.max_pixels)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _random_square(image: Image.Image, cfg: ImageDataConfig, u: tuple[float, float, float], name: str) -> Image.Image:
    width, height = upright_size(image)
    high = min(cfg.crop_max or min(width, height), width, height)
    low = min(cfg.crop_min or cfg.size, high)
    side = low + int(u[0] * (high - low + 1))
    if cfg.crop_share:
        side = max(1, int(high * (cfg.crop_share + (1 - cfg.crop_share) * u[0])))
    left, top = int(u[1] * (width - side + 1)), int(u[2] * (height - side + 1))
    reduced = _draft(image, side // (2 * cfg.size))
    box = tuple(edge / reduced for edge in (left, top, left + side, top + side))
    rgb = to_rgb(image, name)
    if reduced == 1 and rgb.size != (width, height):   # an orientation that stands after the pixels: never in a JPEG
        return _fit(rgb, cfg, name)
    return rgb.resize((cfg.size, cfg.size), FILTERS[cfg.crop_filter], box=box)   # type: ignore[arg-type]


def _draft(image: Image.Image, factor: int) -> int:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster; how far it was reduced.

    The factor leaves at least twice the pixels that the view needs, so that the antialiased scaling still decides.
    """
    if factor < 2 or image.format not in ("JPEG", "MPO"):
        return 1
    width = image.width
    image.draft(image.mode, (image.width // factor, image.height // factor))
    return next(k for k in (1, 2, 4, 8) if -(-width // k) == image.width)
