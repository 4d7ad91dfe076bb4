"""Latents and codes as pictures."""

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..latents import LatentMoments, as_vectors, principal_colours
from ..sounds import mel_levels, save_mels

SMALLEST = 320                 # pixels of height to which small pictures are enlarged by a whole factor, with sharp edges
MOST_BOOKS = 16                # codebooks of an image that are drawn
SPREAD = 2.5                   # standard deviations on either side of 0 that the colours of speech latents span
CODES, LATENTS = colormaps["turbo"], colormaps["RdBu_r"]


def enlarged(image: Image.Image) -> Image.Image:
    """By a whole factor to at least 320 pixels of height: pixels stay square and sharp where a browser would blur them."""
    factor = -(-SMALLEST // image.height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image


def latent_image(latents: Tensor) -> Image.Image:
    """Latents (C, h, w) in the colours of their own three principal axes, one pixel a position."""
    moments = LatentMoments()
    moments.add(as_vectors(latents[None]))
    return Image.fromarray(principal_colours(moments).paint(latents[None])[0])


def code_image(codes: Tensor, size: int | None) -> Image.Image:
    """Codes (K, h, w) of an image: a picture of each codebook, one beside the other, one pixel a code. size: of a codebook."""
    books = codes[:MOST_BOOKS].double().numpy()
    painted = CODES(books / max(1, (size or int(codes.max()) + 1) - 1))[..., :3]                # (K, h, w, 3)
    gap = np.ones((books.shape[1], 1, 3))
    columns = [column for book in painted for column in (gap, book)][1:]
    return Image.fromarray((np.concatenate(columns, axis=1) * 255).round().astype(np.uint8))


def code_chart(stored: Tensor, sizes: list[int], seconds: float) -> Image.Image:
    """Codes (K, T) of a sound over time, a row for each codebook, coloured by their number; or latents (C, T) by their value.

    sizes: entries of each codebook; none: latents, in the colours of ± 2.5 standard deviations of all of them.
    """
    rows = len(stored)
    if sizes:
        values = stored.double() / torch.tensor([max(1, size - 1) for size in sizes[:rows]], dtype=torch.float64)[:, None]
        colours, low, high = CODES, 0.0, 1.0
        name, title = "codebook", "codes, coloured by their number"
    else:
        values = stored.double()
        high = SPREAD * float(values.std()) if values.numel() > 1 else 1.0
        colours, low, high = LATENTS, -(high or 1.0), high or 1.0
        name, title = "channel", f"latents, from {low:.2g} (blue) to {high:.2g} (red)"
    figure = Figure(figsize=(9, min(3.2, 1.0 + 0.22 * rows)), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none",
                extent=(0, seconds, rows + 0.5, 0.5))
    axes.set_title(title, fontsize=9, loc="left", pad=3)
    axes.set_xlabel("s", fontsize=8)
    axes.set_ylabel(name, fontsize=8)
    axes.set_yticks([1, rows] if rows > 12 else range(1, rows + 1))
    axes.tick_params(labelsize=8)
    return _image(figure)


def mel_chart(sounds: dict[str, tuple[Tensor, int]], folder: Path) -> Image.Image:
    """Mel spectrograms of sounds (channels, samples) with their rates in Hz, one below the other, in the first one's colours."""
    path = folder / "mel.png"
    save_mels({name: mel_levels(audio, rate) for name, (audio, rate) in sounds.items()}, path)
    with Image.open(path) as image:
        return image.convert("RGB")


def _image(figure: Figure) -> Image.Image:
    """A matplotlib figure as an RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
