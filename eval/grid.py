"""A picture of originals above their reconstructions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokenizers_lab.errors import InputError

INK, PAPER = (60, 60, 60), (255, 255, 255)
TARGET = 128          # tiles are enlarged by a whole factor to at least this height, so that pixels stay square and sharp
LABEL_SIZE = 15


@dataclass(frozen=True)
class GridGeometry:
    """Where the tiles are, in pixels."""

    tile: tuple[int, int]       # width, height of a tile
    origin: tuple[int, int]     # left, top of the first tile
    gap: int                    # between tiles
    block_gap: int              # between one block of rows and the next
    columns: int
    blocks: int                 # times that all labels repeat
    labels: int                 # rows of a block

    def box(self, index: int, label: int) -> tuple[int, int]:
        """Left and top of image `index` in the row of label number `label`."""
        block, column = divmod(index, self.columns)
        left = self.origin[0] + column * (self.tile[0] + self.gap)
        top = self.origin[1] + block * self._block_height() + label * (self.tile[1] + self.gap)
        return left, top

    def _block_height(self) -> int:
        return self.labels * (self.tile[1] + self.gap) - self.gap + self.block_gap

    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        width = self.origin[0] + self.columns * (self.tile[0] + self.gap)
        return width, self.origin[1] + self.blocks * self._block_height() - self.block_gap + self.gap


def to_pixels(images: Tensor) -> np.ndarray:
    """float (N, 3, H, W) in [0, 1] to uint8 (N, H, W, 3). Raises InputError on another shape or on NaN."""
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise InputError(f"a grid needs images (N, 3, H, W), not {tuple(images.shape)}")
    if not images.isfinite().all():
        raise InputError("an image for the grid has NaN or infinite pixels")
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def save_grid(
    originals: Tensor,
    reconstructions: Tensor,
    path: str | Path,
    columns: int = 8,
    extra: Mapping[str, Tensor] | None = None,
) -> GridGeometry:
    """Write a PNG: originals above reconstructions (above further labelled rows), `columns` pictures wide.

    All images: float (N, 3, H, W) in [0, 1], N alike. Returns the geometry. Raises InputError on other shapes or NaN.
    """
    return save_rows({"original": originals, "reconstruction": reconstructions, **(extra or {})}, path, columns)


def save_rows(rows: Mapping[str, Tensor], path: str | Path, columns: int = 8) -> GridGeometry:
    """Write a PNG of rows of images under labels, `columns` pictures wide; longer rows go on below, all labels together.

    rows: label → float (N, 3, H, W) in [0, 1], all of one shape. Returns the geometry. Raises InputError on other shapes or NaN.
    """
    first, shape = next((name, images.shape) for name, images in rows.items())
    for name, images in rows.items():
        if images.shape != shape:
            raise InputError(f"the grid's row '{name}' is {tuple(images.shape)}, the row '{first}' is {tuple(shape)}")
    pixels = {name: to_pixels(images) for name, images in rows.items()}
    n, height, width = pixels[first].shape[:3]
    scale = max(1, -(-TARGET // height))
    font = ImageFont.load_default(LABEL_SIZE)
    gap = 4
    left = max(int(font.getlength(name)) for name in rows) + 4 * gap
    columns = min(columns, n)
    geometry = GridGeometry((width * scale, height * scale), (left, gap), gap, 4 * gap, columns, -(-n // columns), len(rows))
    picture = Image.new("RGB", geometry.size(), PAPER)
    pen = ImageDraw.Draw(picture)
    for label, (name, arrays) in enumerate(pixels.items()):
        for index, array in enumerate(arrays):
            tile = Image.fromarray(array).resize(geometry.tile, Image.Resampling.NEAREST)
            picture.paste(tile, geometry.box(index, label))
        for block in range(geometry.blocks):
            top = geometry.box(block * columns, label)[1]
            pen.text((left - 2 * gap, top + geometry.tile[1] // 2), name, INK, font, anchor="rm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
    return geometry
