"""Reconstruction quality of image tokenizers: one streaming pass over the images, each counted exactly once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.metrics import patch_mean
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.tokenizer import ImageTokenizer

from .bootstrap import exact_mean, mean_interval
from .image_metrics import METRICS, PSNR_CAP, PairMetric, build_metrics
from .provenance import environment, pixels_sha256, text_sha256, weights_sha256

UNTRAINED_LABEL = "untrained (random weights)"


@dataclass
class Candidate:
    """Something that reconstructs images: a row of the result."""

    label: str
    role: str                                               # model, untrained or baseline
    reconstruct: Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W) in [0, 1], keys -> the same shape
    description: dict[str, Any]


def model_candidate(
    tokenizer: ImageTokenizer, label: str = "model", role: str = "model", sample: bool = False, seed: int = 0
) -> Candidate:
    """A tokenizer as a row. Draws of a stochastic encoder or decoder depend on the seed and the image's key alone."""
    dtype = next(tokenizer.parameters()).dtype

    def reconstruct(images: Tensor, keys: Sequence[str]) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(stable_seed(seed, "evaluate", *keys))
        encoding = tokenizer.encode(images.to(dtype), sample=sample, generator=generator)
        latents = encoding.codes if encoding.latents is None else encoding.latents
        if latents is None:
            raise InputError(f"{label} encodes to neither latents nor codes")
        return tokenizer.decode(latents, generator=generator).float()

    description = {
        "system": getattr(tokenizer, "system", type(tokenizer).__name__),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "weights_sha256": weights_sha256(tokenizer),
        "weights": "random weights" if role == "untrained" else getattr(tokenizer, "provenance", {}),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Candidate(label, role, reconstruct, description)


def untrained_copy(tokenizer: ImageTokenizer, seed: int = 0) -> ImageTokenizer:
    """The same network with new, seeded random weights, in eval mode; global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(tokenizer)(tokenizer.cfg)
    return fresh.to(tokenizer.device, next(tokenizer.parameters()).dtype).eval().requires_grad_(False)


def patch_mean_candidate(patch: int) -> Candidate:
    """The trivial baseline: each patch replaced by its mean colour."""
    label = f"patch mean ({patch}×{patch})"
    return Candidate(label, "baseline", lambda images, keys: patch_mean(images, patch), {"patch": patch})


def data_protocol(cfg: ImageDataConfig) -> dict[str, Any]:
    """How validation images of a data config are prepared, for the result."""
    resize = f"ADM centre crop to {cfg.size} px (halved by box filter while twice as large, then bicubic)"
    return {"source": cfg.val, "resize": resize, "limit": cfg.val_limit}


def evaluate_images(
    tokenizer: ImageTokenizer,
    batches: Iterable[ImageBatch],
    metrics: Sequence[str] = ("psnr", "ssim", "lpips"),
    *,
    label: str = "model",
    data: dict[str, Any] | None = None,
    baselines: bool = True,
    forward_batch: int = 1,
    round_uint8: bool = True,
    sample: bool = False,
    seed: int = 0,
    allow_missing: bool = False,
    skipped: Sequence[str] = (),
    together: bool = True,
    observe: Callable[[Candidate, Tensor, Tensor, Sequence[str]], None] | None = None,
) -> dict[str, Any]:
    """Reconstruct every image and measure it; the result is JSON data.

    batches: ImageBatch with images (B, 3, H, W) in [0, 1]; under torch.distributed each process passes its own share and
        gets the whole result (unless not `together`: then this process is alone). Batch sizes and shares do not change a
        value: the network sees `forward_batch` images at a time, however they arrive (1 by default: exact; more is faster
        on a GPU and may change last digits).
    metrics: names of `image_metrics.METRICS`. With `allow_missing`, one whose weights are not here becomes a row that says why.
    baselines: also measure the mean colour of each patch and the same network with random weights.
    round_uint8: compare images as they would be saved; sample: draw latents instead of their mode.
    data: the protocol of the images (`data_protocol`). observe: called with (candidate, originals, reconstructions, keys).
    Raises DataError without images, InputError on another size or non-finite output, WeightsMissing.
    """
    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    candidates = [model_candidate(tokenizer, label, sample=sample, seed=seed)]
    if baselines:
        if hasattr(tokenizer, "cfg"):
            candidates.append(model_candidate(untrained_copy(tokenizer, seed), UNTRAINED_LABEL, "untrained", sample, seed))
        candidates.append(patch_mean_candidate(tokenizer.downsample))
    pair_metrics, missing = build_metrics(metrics, device, allow_missing)
    records, size = _measure(candidates, pair_metrics, batches, device, forward_batch, round_uint8, observe)
    records, size = _gather(records, size) if together else (sorted(records), size)
    if not records:
        raise DataError("there are no images to evaluate")
    return {
        "kind": "image reconstruction",
        "n": len(records),
        "keys": [key for key, _, _ in records],
        "skipped": list(skipped),
        "rows": [_row(candidate, i, pair_metrics, missing, records, seed) for i, candidate in enumerate(candidates)],
        "margins": _margins(candidates, pair_metrics, records, seed),
        "protocol": {
            **(data or {"source": "given batches", "resize": "as given"}),
            "images_sha256": text_sha256([digest for _, digest, _ in records]),
            "size": list(size or ()), "range": "[0, 1]", "rounding": "uint8" if round_uint8 else "none, clamped to [0, 1]",
            "latents": "sampled" if sample else "mode", "forward_batch": forward_batch, "psnr_cap_db": PSNR_CAP, "seed": seed,
        },
        "environment": environment(device),
    }


Record = tuple[str, str, list[list[float]]]     # key, SHA-256 of the original's pixels, values[candidate][metric]


@torch.inference_mode()
def _measure(
    candidates: list[Candidate],
    metrics: list[PairMetric],
    batches: Iterable[ImageBatch],
    device: torch.device,
    forward_batch: int,
    round_uint8: bool,
    observe: Callable[[Candidate, Tensor, Tensor, Sequence[str]], None] | None,
) -> tuple[list[Record], tuple[int, ...] | None]:
    """Values of this process's images, and their (height, width)."""
    records: list[Record] = []
    size: tuple[int, ...] | None = None
    for keys, images in _rebatch(batches, forward_batch):
        if size is not None and tuple(images.shape[2:]) != size:
            raise InputError(f"images of {tuple(images.shape[2:])} after images of {size}: evaluate each size by itself")
        size = tuple(images.shape[2:])
        images = images.to(device)
        original = to_uint8_grid(images) if round_uint8 else images
        values: list[list[list[float]]] = [[[] for _ in candidates] for _ in keys]
        for c, candidate in enumerate(candidates):
            output = checked_output(candidate.reconstruct(images, keys), images, keys, candidate.label)
            output = to_uint8_grid(output) if round_uint8 else output
            if observe is not None:
                observe(candidate, original, output, keys)
            for metric in metrics:
                for i, value in enumerate(metric.compute(output, original).double().tolist()):
                    values[i][c].append(value)
        records += zip(keys, map(pixels_sha256, original), values)
    return records, size


def _rebatch(batches: Iterable[ImageBatch], count: int) -> Iterable[tuple[list[str], Tensor]]:
    """Keys and images, `count` at a time, however they arrive; sizes are not mixed."""
    keys: list[str] = []
    images: list[Tensor] = []
    for batch in batches:
        if len(batch.keys) != len(batch.images):
            raise InputError(f"a batch has {len(batch.images)} images and {len(batch.keys)} keys")
        for key, image in zip(batch.keys, batch.images):
            if images and image.shape != images[0].shape:
                yield keys, torch.stack(images)
                keys, images = [], []
            keys.append(key)
            images.append(image)
            if len(images) == count:
                yield keys, torch.stack(images)
                keys, images = [], []
    if images:
        yield keys, torch.stack(images)


def to_uint8_grid(images: Tensor) -> Tensor:
    """Values as they would be saved: clamped and rounded to multiples of 1/255, still float in [0, 1]."""
    return (images.clamp(0, 1) * 255).round() / 255


def checked_output(output: Tensor, images: Tensor, keys: Sequence[str], label: str) -> Tensor:
    """The reconstructions, clamped to [0, 1]. Raises InputError on another shape or a value that is not finite."""
    if output.shape != images.shape:
        raise InputError(f"{label} gave {tuple(output.shape)} for images {tuple(images.shape)}: a reconstruction has their size")
    finite = torch.isfinite(output).flatten(1).all(dim=1)
    if not finite.all():
        bad = [key for key, ok in zip(keys, finite.tolist()) if not ok]
        raise InputError(f"{label} gave NaN or infinite pixels for {bad[0]}: its weights or its precision are broken")
    return output.clamp(0, 1)


def _gather(records: list[Record], size: tuple[int, ...] | None) -> tuple[list[Record], tuple[int, ...] | None]:
    """Records of all processes in an order that does not depend on who measured what."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (records, size))
        sizes = {share[1] for share in shares if share[1] is not None}
        if len(sizes) > 1:
            raise InputError(f"processes saw images of different sizes: {sorted(sizes)}")
        records, size = [r for share in shares for r in share[0]], next(iter(sizes), None)
    return sorted(records), size


def _summary(values: list[float], seed: int) -> dict[str, Any]:
    """Mean and its interval."""
    interval = mean_interval(values, seed=seed)
    return {"value": exact_mean(values), "uncertainty": None if interval is None else asdict(interval)}


def _row(
    candidate: Candidate, index: int, metrics: list[PairMetric], missing: dict[str, str], records: list[Record], seed: int
) -> dict[str, Any]:
    """A candidate's results by metric, with the value of every image in the order of `keys`."""
    results: dict[str, Any] = {}
    for m, metric in enumerate(metrics):
        values = [measured[index][m] for _, _, measured in records]
        results[metric.spec.name] = {
            "title": metric.spec.title, "unit": metric.spec.unit, "better": metric.spec.better, "network": metric.network,
            "n": len(values), **_summary(values, seed), "per_image": values,
        }
    for name, reason in missing.items():
        results[name] = {"title": METRICS[name].title, "value": None, "missing": reason}
    return {"label": candidate.label, "role": candidate.role, **candidate.description, "metrics": results}


def _margins(candidates: list[Candidate], metrics: list[PairMetric], records: list[Record], seed: int) -> list[dict[str, Any]]:
    """How much better the model is than each other row, image by image: positive is better."""
    margins = []
    for c, other in enumerate(candidates[1:], start=1):
        for m, metric in enumerate(metrics):
            sign = 1 if metric.spec.better == "higher" else -1
            values = [sign * (measured[0][m] - measured[c][m]) for _, _, measured in records]
            margins.append({"metric": metric.spec.name, "over": other.label, "role": other.role, **_summary(values, seed)})
    return margins
