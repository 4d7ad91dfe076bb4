"""What a generator takes from its data: whose latents they are, and the statistics that normalise them."""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenizers_lab.errors import ConfigError


@dataclass
class LatentsAbout:
    """Where latents come from."""

    tokenizer: dict[str, Any]         # name, and the SHA-256 of its weights
    data: str                         # the images
    mean: Tensor | None = None        # (C,) of the latents; none: the tokenizer normalises them
    std: Tensor | None = None
    classes: tuple[str, ...] = ()     # names by label, where they are known


def describe_latents(cfg: Any) -> LatentsAbout:
    """Of a run's config (`RunConfig`). Raises ConfigError if data.train holds images and no tokenizer is named, or latents of
    another shape."""
    from tokenizers_lab.data.latent_manifest import find_latent_manifest
    from tokenizers_lab.hub import load, resolve_folder, weights_sha256

    manifest = find_latent_manifest(cfg.data.train)
    if manifest is not None:
        wanted = (cfg.model.channels, cfg.model.grid, cfg.model.grid)
        if manifest.shape != wanted:
            raise ConfigError(f"data.train holds latents {manifest.shape}, but model.channels and model.grid say {wanted}")
        return LatentsAbout({"name": manifest.tokenizer, "sha256": manifest.weights_sha256}, manifest.source,
                            manifest.mean.float(), manifest.std.float())
    name = cfg.objective.tokenizer
    if name is None:
        raise ConfigError("data.train holds images: name the tokenizer that encodes them in objective.tokenizer, or cache their "
                          "latents with toklab latents")
    folder = resolve_folder(name)
    tokenizer: Any = load(str(folder))
    if not bool(tokenizer.latent_mean.any()) and bool((tokenizer.latent_std == 1).all()):
        warnings.warn(f"{name} has no latent statistics: its latents are used as they are; toklab latent-stats collects them",
                      stacklevel=2)
    return LatentsAbout({"name": name, "sha256": weights_sha256(folder)}, str(cfg.data.train))
