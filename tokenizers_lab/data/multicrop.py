"""Crops of batches of images, on their device: random resized crops, and the distorted global and local ones of DINOv2.

Images are float (B, 3, H, W) in [0, 1]. Every item has a box, a mirror and colours of its own, all from a `Draw`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.draw import Draw

ASPECTS = (3 / 4, 4 / 3)                # of a crop, width by height
BOX_TRIES = 10                          # boxes drawn for a crop until one fits
CUBIC = -0.5                            # parameter of the bicubic filter of antialiased scaling
BLUR_TAPS, BLUR_SIGMA = 9, (0.1, 2.0)
GREY = (0.2989, 0.587, 0.114)           # of red, green and blue
SOLARISE_FROM = 128 / 255


@dataclass
class CropConfig:
    """The crops of self-distillation. Defaults are DINOv2's, with sizes that a patch of 16 divides."""

    global_size: int = 256                          # pixels a side of the two global crops
    local_size: int = 96                            # pixels a side of the local ones
    local_crops: int = 8                            # local crops of an image
    global_scale: tuple[float, float] = (0.32, 1.0)      # share of the image's area that a global crop shows
    local_scale: tuple[float, float] = (0.05, 0.32)      # share that a local one shows
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)      # most change of brightness, contrast, saturation, hue
    jitter_share: float = 0.8                       # share of the crops with changed colours
    grey_share: float = 0.2                         # share without colours
    blur_shares: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.5])      # blurred ones: first, second global, local
    solarise_share: float = 0.2                     # share of the second global crops whose bright half is inverted


def multi_crops(images: Tensor, cfg: CropConfig, draw: Draw) -> tuple[Tensor, Tensor | None]:
    """(global crops (2B, 3, g, g), local crops (n · B, 3, l, l) or none), crop-major, in [0, 1]."""

    def view(name: str, size: int, scale: tuple[float, float], blur: float, solarise: float = 0.0) -> Tensor:
        own = draw.within(name)
        mirrored = own.uniform("mirror", (len(images),)) < 0.5
        return distort(random_crop(images, size, scale, own, mirrored), cfg, blur, solarise, own)

    first, second, local = cfg.blur_shares
    both = [view("global0", cfg.global_size, cfg.global_scale, first),
            view("global1", cfg.global_size, cfg.global_scale, second, cfg.solarise_share)]
    locals_ = [view(f"local{i}", cfg.local_size, cfg.local_scale, local) for i in range(cfg.local_crops)]
    return torch.cat(both), torch.cat(locals_) if locals_ else None


# --- where ----------------------------------------------------------------------------------------------------------------


def random_crop(images: Tensor, size: int, scale: tuple[float, float], draw: Draw, mirrored: Tensor | None = None) -> Tensor:
    """A random part of each image at size × size pixels. scale: smallest and largest share of its area; mirrored: (B,) bool."""
    return resized_crop(images, draw_boxes(len(images), (images.shape[2], images.shape[3]), scale, draw), size, mirrored)


def draw_boxes(items: int, size: tuple[int, int], scale: tuple[float, float], draw: Draw) -> Tensor:
    """(items, 4) int64: top, left, height, width in images of a size (H, W); the whole image where no drawn box fits."""
    rows, columns = size
    area = rows * columns * draw.uniform("box.area", (items, BOX_TRIES), *scale)
    aspect = draw.uniform("box.aspect", (items, BOX_TRIES), math.log(ASPECTS[0]), math.log(ASPECTS[1])).exp()
    widths, heights = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (widths >= 1) & (widths <= columns) & (heights >= 1) & (heights <= rows)      # (items, tries)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1)
    width = widths.gather(1, first)[:, 0].masked_fill(none, columns)
    height = heights.gather(1, first)[:, 0].masked_fill(none, rows)
    place = draw.uniform("box.place", (2, items))
    top, left = (place[0] * (rows - height + 1)).long(), (place[1] * (columns - width + 1)).long()
    return torch.stack([top, left, height, width], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, size: int, mirrored: Tensor | None = None) -> Tensor:
    """The boxes (B, 4) of images, scaled to (B, 3, size, size): bicubic, antialiased, clamped to [0, 1]."""
    down = scaling(boxes[:, 0], boxes[:, 2], images.shape[2], size)                       # (B, size, H)
    across = scaling(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    if mirrored is not None:
        across = torch.where(mirrored[:, None, None], across.flip(1), across)
    with torch.autocast(images.device.type, enabled=False):
        return (down[:, None] @ images.float() @ across[:, None].transpose(2, 3)).clamp(0, 1)


def scaling(starts: Tensor, lengths: Tensor, size_in: int, size_out: int) -> Tensor:
    """Weights (B, size_out, size_in) that scale `lengths` pixels from `starts` on, each (B,), to size_out ones."""
    starts, lengths = (x[:, None, None].float() for x in (starts, lengths))
    step = lengths / size_out
    centres = starts + step * (torch.arange(size_out, device=starts.device)[:, None] + 0.5)
    pixels = torch.arange(size_in, device=starts.device) + 0.5
    weights = cubic((pixels - centres) / step.clamp_min(1))      # smaller: the filter becomes wider
    weights = weights * ((pixels > starts) & (pixels < starts + lengths))
    return weights / weights.sum(2, keepdim=True)


def cubic(x: Tensor) -> Tensor:
    """Keys' filter, 0 beyond ±2."""
    x = x.abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


# --- colours --------------------------------------------------------------------------------------------------------------


def distort(images: Tensor, cfg: CropConfig, blur_share: float, solarise_share: float, draw: Draw) -> Tensor:
    """Colour jitter, grey, blur, solarisation, in this order, each for a random share of the images."""
    items = len(images)

    def chosen(purpose: str, share: float) -> Tensor:
        return draw.uniform(purpose, (items,)) < share

    def where(mask: Tensor, changed: Tensor, plain: Tensor) -> Tensor:
        return torch.where(mask[:, None, None, None], changed, plain)

    x = where(chosen("jitter", cfg.jitter_share), jittered(images, cfg.jitter, draw), images)
    x = where(chosen("grey", cfg.grey_share), grey(x).expand_as(x), x)
    if blur_share:
        x = where(chosen("blur", blur_share), blurred(x, draw.uniform("blur.sigma", (items,), *BLUR_SIGMA)), x)
    if solarise_share:
        x = where(chosen("solarise", solarise_share), torch.where(x >= SOLARISE_FROM, 1 - x, x), x)
    return x


def jittered(images: Tensor, most: tuple[float, float, float, float], draw: Draw) -> Tensor:
    """Brightness, contrast, saturation and hue changed by random amounts, in a random order of each image's own."""
    items = len(images)
    amounts = draw.uniform("jitter.amount", (items, 4), -1.0, 1.0) * torch.tensor(most, device=images.device)
    order = draw.uniform("jitter.order", (items, 4)).argsort(1).tolist()      # on the CPU once, not at every use
    changes: list[Callable[[Tensor, Tensor], Tensor]] = [brighter, contrasted, saturated, turned_hue]
    x = images.clone()
    for turn in range(4):
        for number, change in enumerate(changes):
            rows = [item for item in range(items) if order[item][turn] == number]
            if rows and most[number]:
                x[rows] = change(x[rows], amounts[rows, number].view(-1, 1, 1, 1))
    return x


def grey(images: Tensor) -> Tensor:
    """Brightness (B, 1, H, W)."""
    return (images * images.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)


def brighter(images: Tensor, amount: Tensor) -> Tensor:
    """Times 1 + amount; amount: (B, 1, 1, 1), as below."""
    return (images * (1 + amount)).clamp(0, 1)


def contrasted(images: Tensor, amount: Tensor) -> Tensor:
    """Further from the mean brightness of the image by 1 + amount."""
    mean = grey(images).mean((1, 2, 3), keepdim=True)
    return (mean + (images - mean) * (1 + amount)).clamp(0, 1)


def saturated(images: Tensor, amount: Tensor) -> Tensor:
    """Further from grey by 1 + amount."""
    plain = grey(images)
    return (plain + (images - plain) * (1 + amount)).clamp(0, 1)


def turned_hue(images: Tensor, amount: Tensor) -> Tensor:
    """The hue turned by that share of the circle, at equal saturation and value."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(value == red, (green - blue) / safe,
                      torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))      # sixths of the circle
    sector = (hue[:, None] + 6 * amount + images.new_tensor([5, 3, 1]).view(3, 1, 1)) % 6                # (B, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(sector, 4 - sector).clamp(0, 1)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of 9 × 9 pixels; sigma: (B,)."""
    x = torch.arange(BLUR_TAPS, device=images.device) - BLUR_TAPS // 2
    taps = (-0.5 * (x / sigma[:, None]).square()).softmax(1).repeat_interleave(3, 0)      # (3B, taps)
    flat = F.pad(images, (BLUR_TAPS // 2,) * 4, mode="reflect").flatten(0, 1)[None]       # (1, 3B, H, W)
    groups = flat.shape[1]
    flat = F.conv2d(F.conv2d(flat, taps[:, None, :, None], groups=groups), taps[:, None, None, :], groups=groups)
    return flat[0].unflatten(0, (len(images), 3))
