"""PatchGANs on an image pyramid, with the feature maps that feature matching compares (pix2pixHD, Wang et al. 2018)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.nn.local_norm import LocalBatchNorm

from .result import Judgement

WIDEST, SLOPE, KERNEL, PADDING = 512, 0.2, 4, 2


class PatchLayers(nn.Module):
    """`layers` halvings of the image and one more convolution, doubling the channels up to 512, then one logit a patch."""

    def __init__(self, colours: int, width: int, layers: int):
        super().__init__()
        widths = [min(width * 2**n, WIDEST) for n in range(layers + 1)]
        self.first = nn.Conv2d(colours, width, KERNEL, 2, PADDING)
        self.middle = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, KERNEL, 2 if n < layers else 1, PADDING), LocalBatchNorm(b))
            for n, (a, b) in enumerate(pairwise(widths), 1))
        self.last = nn.Conv2d(widths[-1], 1, KERNEL, 1, PADDING)
        for conv in (self.first, *(layer[0] for layer in self.middle), self.last):      # type: ignore[index]
            nn.init.normal_(conv.weight, std=0.02)

    def forward(self, images: Tensor) -> Judgement:
        """images: (B, colours, H, W)."""
        features = [F.leaky_relu(self.first(images), SLOPE)]
        for layer in self.middle:
            features.append(F.leaky_relu(layer(features[-1]), SLOPE))
        return Judgement(self.last(features[-1]), features)


class MultiScalePatchGAN(nn.Module):
    """One network for each size of the image: the last sees it whole, the one before at half the size, and so on."""

    def __init__(self, colours: int = 3, width: int = 64, layers: int = 3, scales: int = 3):
        super().__init__()
        self.members = nn.ModuleList(PatchLayers(colours, width, layers) for _ in range(scales))

    def forward(self, images: Tensor) -> list[Judgement]:
        """images: (B, colours, H, W), about [−1, 1]. The judgement of the whole image comes first."""
        found = []
        for member in reversed(self.members):
            found.append(member(images))
            images = F.avg_pool2d(images, 3, 2, 1, count_include_pad=False)
        return found


def patch_feature_matching(real: Sequence[Judgement], fake: Sequence[Judgement]) -> Tensor:
    """Mean over the scales of 4 / (feature maps of a scale) · Σ mean |fake − real|, the real ones without gradient."""
    total = fake[0].logits.new_zeros(())
    for r, f in zip(real, fake, strict=True):
        maps = [F.l1_loss(b, a.detach()) for a, b in zip(r.features, f.features, strict=True)]
        total = total + sum(maps, total.new_zeros(())) * (4 / len(maps))
    return total / len(fake)


def patch_loss(judgements: Sequence[Judgement], target: str, kind: str = "mse") -> Tensor:
    """Mean over the scales of a loss of the logits (mse, bce or hinge).

    target: `real` and `fake` for the discriminator (1 and 0), `generator` for who wants fakes to look real (1; of hinge −mean).
    """
    found = [logit_loss(j.logits, target, kind) for j in judgements]
    return torch.stack(found).mean()


def logit_loss(logits: Tensor, target: str, kind: str) -> Tensor:
    """See `patch_loss`. Raises ValueError on another target or kind."""
    if target not in ("real", "fake", "generator") or kind not in ("mse", "bce", "hinge"):
        raise ValueError(f"no loss '{kind}' for '{target}'; known: mse, bce, hinge for real, fake, generator")
    if kind == "hinge":
        return -logits.mean() if target == "generator" else F.relu(1 - logits if target == "real" else 1 + logits).mean()
    wanted = torch.zeros_like(logits) if target == "fake" else torch.ones_like(logits)
    return F.mse_loss(logits, wanted) if kind == "mse" else F.binary_cross_entropy_with_logits(logits, wanted)
