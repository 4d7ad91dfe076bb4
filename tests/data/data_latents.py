"""A tokenizer whose latents are known without it, and caches of what it makes."""

from pathlib import Path

import torch
from data_images import jpeg
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.eval.latent_cache import CacheOptions, write_latents
from tokenizers_lab.quantizers.gaussian import DiagonalGaussian
from tokenizers_lab.settings import ImageDataConfig, LatentDataConfig
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

CLASSES = ("ant", "bee", "cat")


class Toy(ImageTokenizer):
    """Latents are mean colours of patches of 4 × 4, normalised; tokens as the posterior, unless it has none."""

    system, downsample = "toy", 4

    def __init__(self, kind: str = "gaussian"):
        super().__init__(None)
        self.kind, self.weight = kind, nn.Parameter(torch.ones(3))
        self.add_latent_statistics(3)
        self.set_latent_statistics(torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 2.0]))

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        self.check_images(images)
        if self.kind == "codes":
            return ImageEncoding(codes=F.avg_pool2d(images, 4).long())
        mean = F.avg_pool2d(images, 4) * self.weight[:, None, None]
        latents = (mean - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        tokens = DiagonalGaussian(mean.flatten(2).transpose(1, 2), (mean - 3).flatten(2).transpose(1, 2))
        return ImageEncoding(latents, posterior=tokens if self.kind == "gaussian" else None)


def image_folder(root: Path, n: int = 11, bad: tuple[int, ...] = ()) -> Path:
    """n images in the folders of three classes, in turn; those in `bad` are no images."""
    for i in range(n):
        folder = root / CLASSES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"a.{i}.jpg").write_bytes(b"no image" if i in bad else jpeg(i))
    return root


def cache(source: Path | str, out: Path, batch_size: int = 3, kind: str = "gaussian", limit: int | None = None, workers: int = 0,
          **options) -> Path:
    """A cache of the images' latents, 4 images a shard unless said otherwise."""
    data = ImageDataConfig(train=str(source), size=16, workers=workers, val_limit=limit)
    write_latents(Toy(kind), data, out, CacheOptions(**{"shard_size": 4, "flips": True, **options}), name="toys/one",
                  source="images", batch_size=batch_size, bad_fraction=1.0)
    return out


def latent_config(train: object, **options) -> LatentDataConfig:
    """A small training config over a source."""
    return LatentDataConfig(**{"train": str(train), "size": 16, "workers": 0, "shuffle_buffer": 3, **options})
