"""What a generator takes from its data: whose latents they are, and the statistics that normalise them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.latent_manifest import find_latent_manifest
from tokenizers_lab.data.loader import validation_batches
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.eval.latents import LatentMoments, as_vectors

STATISTICS_IMAGES, STATISTICS_BATCH = 1000, 16


@dataclass
class LatentsAbout:
    """Where latents come from."""

    tokenizer: dict[str, Any]         # name, and the SHA-256 of its weights
    data: str                         # the images
    mean: Tensor | None = None        # (C,) of the latents; none: the tokenizer normalises them
    std: Tensor | None = None
    classes: tuple[str, ...] = ()     # names by label, where they are known


def describe_latents(cfg: Any) -> LatentsAbout:
    """Of a run's config (`RunConfig`).

    A tokenizer that has no latent statistics of its own gets those of STATISTICS_IMAGES training images. Raises ConfigError if
    data.train holds images and no tokenizer is named, or latents of another shape.
    """
    from tokenizers_lab.hub import load, resolve_folder, weights_sha256

    manifest = find_latent_manifest(cfg.data.train)
    if manifest is not None:
        wanted = (cfg.model.channels, cfg.model.grid, cfg.model.grid)
        if manifest.shape != wanted:
            raise ConfigError(f"data.train holds latents {manifest.shape}, but model.channels and model.grid say {wanted}")
        return LatentsAbout({"name": manifest.tokenizer, "sha256": manifest.weights_sha256}, manifest.source,
                            manifest.mean.float(), manifest.std.float(), tuple(manifest.classes))
    name = cfg.objective.tokenizer
    if name is None:
        raise ConfigError("data.train holds images: name the tokenizer that encodes them in objective.tokenizer, or cache their "
                          "latents with toklab latents")
    folder = resolve_folder(name)
    about = LatentsAbout({"name": name, "sha256": weights_sha256(folder)}, str(cfg.data.train))
    tokenizer: Any = load(folder)
    if bool(tokenizer.latent_mean.any()) or bool((tokenizer.latent_std != 1).any()):
        return about
    about.mean, about.std = image_statistics(tokenizer, cfg.data)
    return about


@torch.inference_mode()
def image_statistics(tokenizer: Any, data: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C,) each, of the latents of evenly spaced training images, as validation crops them."""
    source = f"{data.train}/train" if data.train.startswith("sample:") and "/" not in data.train else data.train
    moments = LatentMoments()
    for batch in validation_batches(replace(data, val=source, val_limit=STATISTICS_IMAGES), STATISTICS_BATCH):
        moments.add(as_vectors(tokenizer.encode(batch.images).latents))
    return torch.from_numpy(moments.mean).float(), torch.from_numpy(moments.std).float()
