"""CKNNA and SE-CKNNA of image tokenizers: whether images are neighbours in the latent space as they are for a frozen teacher,
also when they are noisy, turned and scaled (VFM-VAE, arXiv 2510.18457).

The sets of transformed images and their seeds are the authors'; SE-CKNNA is the plain mean over them. Both sides see the same
transformed images.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.metrics import patch_mean
from tokenizers_lab.teachers.vision import VisionTeacher
from tokenizers_lab.tokenizer import ImageTokenizer

from .candidates import untrained_copy
from .cknna import (
    K,
    Neighbours,
    align,
    check_count,
    find_neighbours,
    jackknife_interval,
    leave_out,
    neighbours_kept,
    prepare,
)
from .deterministic import exact_convolutions, map_in_order
from .gather import gather_rows, in_step, on_first
from .image_features import PIXELS, ImageFeatures, latent_features, pixel_features, teacher_features

METRICS = {"cknna": "CKNNA", "se_cknna": "SE-CKNNA"}
DEFAULT_TEACHER = "transformers:facebook/dinov2-giant"
SEED = 42                                         # of the authors' sets: 42 + place of the image among the sorted names
NOISE_LEVELS = (0.05, 0.1, 0.15, 0.2)             # standard deviations
ROTATIONS, SCALES = (0, 90, 180, 270), (1.0, 0.75, 0.5, 0.25)
CLEAN, EQUIVARIANCE = "clean", "rotation and scale"
SETS = {f"noise {level:g}": level for level in NOISE_LEVELS}
MANY = 0.05                                       # of all images as neighbours, above which chance is no longer small
DEGENERATE = "the features do not differ between images"


def sets_of(names: Sequence[str]) -> list[str]:
    """The sets of transformed images that these metrics need."""
    return [CLEAN] * ("cknna" in names) + [*SETS, EQUIVARIANCE] * ("se_cknna" in names)


def transform_image(image: Tensor, which: str, index: int, multiple: int = 1) -> Tensor:
    """An image (3, H, W) in [0, 1] as it is in a set, as float32 on the CPU.

    noise: of the 8-bit image, clipped and truncated to 8 bits. rotation and scale: both drawn for each image by itself, turned
    counter-clockwise by right angles, then scaled bilinearly (antialiased); sides are rounded up to multiples of `multiple`.
    index: place of the image among the sorted names, which seeds the draws.
    """
    image = image.detach().float().cpu()
    if which == CLEAN:
        return image
    draws = np.random.RandomState(SEED + index)
    if which in SETS:
        pixels = (image * 255).round().permute(1, 2, 0).double().numpy()                          # (H, W, 3), as it was drawn for
        noisy = pixels + draws.normal(0, SETS[which], pixels.shape) * 255
        return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).float() / 255
    turned = torch.rot90(image, int(draws.choice(ROTATIONS)) // 90, (1, 2))
    scale = float(draws.choice(SCALES))
    sides = [-(-max(1, int(side * scale)) // multiple) * multiple for side in turned.shape[1:]]
    if scale == 1 or sides == list(turned.shape[1:]):
        return turned.contiguous()
    return F.interpolate(turned[None], sides, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def compute_vectors(source: ImageFeatures, images: Sequence[Tensor], keys: Sequence[str], forward_batch: int = 1) -> Tensor:
    """(B, D) float32 on the CPU of images (3, h, w) of any sizes; so many of one size at a time, 1: each by itself."""
    groups: list[list[int]] = []
    for i, image in enumerate(images):
        last = groups[-1] if groups else []
        if last and len(last) < forward_batch and images[last[0]].shape == image.shape:
            last.append(i)
        else:
            groups.append([i])

    @torch.inference_mode()      # thread-local: it must be entered where the work is done
    def one(group: list[int]) -> Tensor:
        stacked = torch.stack([images[i] for i in group]).to(source.device)
        return source.compute(stacked, [keys[i] for i in group]).float().cpu().clone()

    with exact_convolutions():
        found = list(map_in_order(one, groups) if source.device.type == "cpu" else map(one, groups))
    vectors = torch.cat(found)
    if not vectors.isfinite().all():
        bad = keys[int((~vectors.isfinite().all(dim=1)).nonzero()[0])]
        raise InputError(f"{source.label} gave NaN or infinite features for {bad}: its weights or its precision are broken")
    return vectors


def alignment_sources(
    model: ImageTokenizer, rows: Sequence[dict[str, Any]], sample: bool = False, seed: int = 0
) -> list[ImageFeatures]:
    """What each row of `evaluate_images` is compared by: latents of networks, pixels of the patch means."""
    found = []
    for row in rows:
        if row["role"] == "baseline":
            found.append(_patch_means(row["label"], int(row["patch"])))
        else:
            network = model if row["role"] == "model" else untrained_copy(model, seed)
            found.append(latent_features(network, row["label"], row["role"], sample=sample, seed=seed))
    return found


def _patch_means(label: str, patch: int) -> ImageFeatures:
    def compute(images: Tensor, keys: Sequence[str]) -> Tensor:
        return pixel_features().compute(patch_mean(images, patch), keys)

    return ImageFeatures(label, "baseline", f"patch means, averaged to {PIXELS} × {PIXELS} pixels", compute, multiple=patch)


def measure_alignment(
    sources: Sequence[ImageFeatures], teacher: ImageFeatures, batches: Iterable[ImageBatch], keys: Sequence[str],
    names: Sequence[str], k: int = K, forward_batch: int = 1, together: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """label -> metric -> result, of images of whom `keys` are all sorted names; the same on all processes.

    batches: this process's share. Each image is transformed and seen by itself (or `forward_batch` of one size at a time), so
    that neither batches nor processes change a value. Raises InputError for too few images, features that are not finite.
    """
    check_count(len(keys), k)
    place = {key: i for i, key in enumerate(keys)}
    multiple = math.lcm(*(source.multiple for source in sources))
    every = [*sources, teacher]
    wanted = sets_of(names)

    def share() -> tuple[list[str], dict[str, Tensor]]:
        seen: list[str] = []
        pieces: dict[str, list[Tensor]] = {}
        for batch in batches:
            for key in batch.keys:
                if key not in place:
                    raise DataError(f"{key} was not there when the images were measured: files changed meanwhile")
            for which in wanted:
                images = [transform_image(image, which, place[key], multiple) for key, image in zip(batch.keys, batch.images)]
                for number, source in enumerate(every):
                    pieces.setdefault(f"{which}/{number}", []).append(compute_vectors(source, images, batch.keys, forward_batch))
            seen += batch.keys
        return seen, {name: torch.cat(found) for name, found in pieces.items()}

    gathered = gather_rows(*in_step(share, together), together)

    def compute() -> dict[str, dict[str, dict[str, Any]]]:
        assert gathered is not None      # the first process has all
        found, vectors = gathered
        if found != list(keys):
            raise DataError("the images are not those that were measured: files changed meanwhile")
        theirs = {which: _neighbours(vectors[f"{which}/{len(sources)}"], k) for which in wanted}
        return {
            source.label: _results(source, teacher, names, {which: vectors[f"{which}/{number}"] for which in wanted}, theirs, k)
            for number, source in enumerate(sources)
        }

    return on_first(compute, together)


def _neighbours(vectors: Tensor, k: int) -> Neighbours:
    return find_neighbours(prepare(vectors), neighbours_kept(len(vectors), k))


def _results(
    source: ImageFeatures, teacher: ImageFeatures, names: Sequence[str], vectors: dict[str, Tensor],
    theirs: dict[str, Neighbours], k: int,
) -> dict[str, dict[str, Any]]:
    """Each metric of one row. A set's value and its jackknife's, then their mean over the sets of the metric."""
    values: dict[str, tuple[float, list[float]]] = {}
    for which, mine in vectors.items():
        ours = _neighbours(mine, k)
        values[which] = align(ours, theirs[which], k), leave_out(ours, theirs[which], k)
    results = {}
    n = len(next(iter(vectors.values())))
    for name in names:
        parts = {which: values[which] for which in sets_of([name])}
        value = fmean(part for part, _ in parts.values())
        without = [fmean(group) for group in zip(*(left for _, left in parts.values()))]
        results[name] = {
            "title": METRICS[name], "unit": "", "better": "higher", "network": teacher.description.get("network", teacher.label),
            "n": n, "reference": teacher.label, "features": source.name, "k": k, "warnings": [],
            "value": value if math.isfinite(value) else None, "uncertainty": jackknife_interval(value, without),
            "parts": {which: part if math.isfinite(part) else None for which, (part, _) in parts.items()},
        }
        if not math.isfinite(value):
            results[name]["missing"] = DEGENERATE
        if teacher.description.get("random"):
            results[name]["warnings"].append("the teacher has random weights")
        if k > MANY * (n - 1):
            results[name]["warnings"].append(f"few images: {k} neighbours among {n - 1} others agree by chance alone")
    return results


def alignment_protocol(teacher: ImageFeatures, names: Sequence[str], multiple: int, k: int = K) -> dict[str, Any]:
    """What determines the values, as JSON data."""
    described: dict[str, Any] = {"teacher": teacher.label, "teacher_features": teacher.name, **teacher.description, "k": k}
    if "se_cknna" in names:
        described |= {
            "sets": [*SETS, EQUIVARIANCE], "mean": "plain, over the sets", "rotations": list(ROTATIONS), "scales": list(SCALES),
            "seed": f"{SEED} + place of the image among the sorted names", "multiple_of_sides": multiple}
    return described


def add_alignment(
    model: ImageTokenizer, teacher: VisionTeacher, teacher_label: str, batches: Callable[[], Iterable[ImageBatch]],
    result: dict[str, Any], names: Sequence[str], *, sample: bool = False, seed: int = 0, forward_batch: int = 1, k: int = K,
    together: bool = True,
) -> None:
    """Measure the rows of a result of `evaluate_images` by these metrics, and say how in its protocol.

    batches: gives this process's share of the same images when called. Raises as `measure_alignment`.
    """
    reference = teacher_features(teacher, teacher_label)
    if reference.description["random"]:
        reference = teacher_features(teacher, f"{teacher_label} (random weights)")
    sources = in_step(lambda: alignment_sources(model, result["rows"], sample, seed), together)
    found = measure_alignment(sources, reference, batches(), result["keys"], names, k, forward_batch, together)
    for row in result["rows"]:
        row["metrics"] |= found[row["label"]]
    result["protocol"]["alignment"] = alignment_protocol(reference, names, math.lcm(*(s.multiple for s in sources)), k)

