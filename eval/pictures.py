"""A grid of originals, reconstructions and latents, for a person's own eyes."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer

from .candidates import Candidate, all_candidates
from .grid import save_grid
from .latents import latent_statistics
from .measure import checked_output


@torch.inference_mode()
def save_pictures(
    model: ImageTokenizer | Candidate, data: ImageDataConfig, path: Path, count: int = 8, steps: int | None = None
) -> Path:
    """Write a PNG of the first images, of their reconstructions from mode latents, and of continuous latents as colours.

    The colours are the first three principal axes of these images' latent vectors (`latents.principal_colours`), enlarged to
    the images' size. steps: of a decoder that samples; none: its own number. Raises as evaluation does.
    """
    batch = next(iter(validation_batches(data, count)))
    candidate = all_candidates(model, "model", False, False, 0, steps)[0]
    originals: list[Tensor] = []
    outputs: list[Tensor] = []
    for key, image in zip(batch.keys[:count], batch.images):
        made = candidate.reconstruct(image[None].to(candidate.device), [key])
        originals.append(image[None])
        outputs.append(checked_output(made.images, image[None], [key], candidate.label).cpu())
    extra = {}
    if isinstance(model, ImageTokenizer):
        _, colours = latent_statistics(model, [batch], together=False)
        latents = model.encode(batch.images.to(model.device)).latents
        if colours is not None and latents is not None:
            painted = torch.from_numpy(colours.paint(latents)).permute(0, 3, 1, 2).float() / 255
            extra["latents"] = F.interpolate(painted, batch.images.shape[2:])
    save_grid(torch.cat(originals), torch.cat(outputs), path, extra=extra)
    return path
