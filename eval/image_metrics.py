"""Metrics between an image and its reconstruction, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizers_lab.errors import InputError, WeightsMissing
from tokenizers_lab.metrics import psnr, ssim

PSNR_CAP = 100.0     # dB, given to identical images, whose PSNR is infinite and would make every mean infinite
MS_SSIM_SMALLEST = 160     # pixels: window 11 on the smallest of five scales (Wang et al. 2003)
ALIASES = {"lpips": ("lpips_alex", "lpips_vgg")}


@dataclass(frozen=True)
class MetricSpec:
    """A metric's name and how to read it."""

    name: str
    title: str
    unit: str
    better: str                                   # higher or lower
    build: Callable[[torch.device], "PairMetric"]


@dataclass(frozen=True)
class PairMetric:
    """A metric ready to use: a number for each pair of images (B, 3, H, W) in [0, 1]."""

    spec: MetricSpec
    compute: Callable[[Tensor, Tensor], Tensor]   # (reconstruction, original) -> (B,)
    network: str | None = None                    # provenance of the pretrained network that it needs


def _psnr(device: torch.device) -> PairMetric:
    return PairMetric(METRICS["psnr"], lambda x, y: psnr(x, y).clamp(max=PSNR_CAP))


def _ssim(device: torch.device) -> PairMetric:
    return PairMetric(METRICS["ssim"], ssim)


def _ms_ssim(device: torch.device) -> PairMetric:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        if min(x.shape[-2:]) <= MS_SSIM_SMALLEST:
            raise InputError(f"MS-SSIM needs more than {MS_SSIM_SMALLEST} pixels a side, not {tuple(x.shape[-2:])}")
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure

        values = [measure(a[None], b[None], data_range=1.0, normalize="relu") for a, b in zip(x.float(), y.float())]
        return torch.stack([torch.as_tensor(v).reshape(()) for v in values])

    return PairMetric(METRICS["ms_ssim"], compute)


def _lpips(backbone: str) -> Callable[[torch.device], PairMetric]:
    def build(device: torch.device) -> PairMetric:
        from tokenizers_lab.losses.perceptual import LPIPS

        network = LPIPS(backbone).eval().requires_grad_(False).to(device)
        return PairMetric(METRICS[f"lpips_{backbone}"], network, str(network.provenance))

    return build


METRICS = {spec.name: spec for spec in (
    MetricSpec("psnr", "PSNR", "dB", "higher", _psnr),
    MetricSpec("ssim", "SSIM", "", "higher", _ssim),
    MetricSpec("ms_ssim", "MS-SSIM", "", "higher", _ms_ssim),
    MetricSpec("lpips_alex", "LPIPS (AlexNet)", "", "lower", _lpips("alex")),
    MetricSpec("lpips_vgg", "LPIPS (VGG)", "", "lower", _lpips("vgg")),
)}


def expand_names(names: Sequence[str]) -> list[str]:
    """Metric names with aliases replaced (`lpips`: both backbones), each once. Raises InputError on an unknown name."""
    expanded = [part for name in names for part in ALIASES.get(name, (name,))]
    for name in expanded:
        if name not in METRICS:
            raise InputError(f"there is no image metric '{name}'; known: {', '.join([*METRICS, *ALIASES])}")
    return list(dict.fromkeys(expanded))


def build_metrics(
    names: Sequence[str], device: torch.device, allow_missing: bool = False
) -> tuple[list[PairMetric], dict[str, str]]:
    """The metrics of these names, and for those whose weights are not here the reason.

    Raises InputError on an unknown name; WeightsMissing where weights are missing, unless `allow_missing`.
    """
    built, missing = [], {}
    for name in expand_names(names):
        try:
            built.append(METRICS[name].build(device))
        except WeightsMissing as error:
            if not allow_missing:
                raise
            missing[name] = str(error)
    return built, missing
