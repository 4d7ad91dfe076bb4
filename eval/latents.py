"""What the latents of an image tokenizer look like: per-channel statistics, active units, rate, PCA as colours.

Sums are streamed in float64, so that any number of images takes the memory of one batch.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.tokenizer import ImageEncoding, ImageTokenizer

from .gather import all_processes

ACTIVE_VARIANCE = 0.01     # a unit is active if its posterior mean varies by more over the data (Burda et al. 2016, sec. 5.2)
SMALLEST_STD = 1e-6        # a channel that never moves is not divided by zero
COLOUR_SPAN = 2.0          # standard deviations on either side that the colour range covers


class LatentMoments:
    """Running count, sum and second moments of vectors, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = np.zeros(0)
        self.square = np.zeros((0, 0))

    def add(self, vectors: Tensor) -> None:
        """vectors: (N, C), any float type."""
        values = vectors.detach().double().cpu().numpy()
        if not self.count:
            self.total, self.square = np.zeros(values.shape[1]), np.zeros((values.shape[1],) * 2)
        self.count += len(values)
        self.total = self.total + values.sum(axis=0)
        self.square = self.square + values.T @ values

    def merge(self, other: "LatentMoments") -> "LatentMoments":
        """Moments of both sets of vectors together."""
        if not self.count or not other.count:
            return self if self.count else other
        both = LatentMoments()
        both.count, both.total, both.square = self.count + other.count, self.total + other.total, self.square + other.square
        return both

    @property
    def mean(self) -> np.ndarray:
        """(C,)"""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """(C, C), divided by the count: E[z zᵀ] − mean meanᵀ."""
        return self.square / self.count - np.outer(self.mean, self.mean)

    @property
    def std(self) -> np.ndarray:
        """(C,): sqrt(E[z²] − mean²)."""
        return np.sqrt(np.clip(np.diag(self.covariance), 0, None))

    @property
    def unbiased_std(self) -> np.ndarray:
        """(C,): the same, divided by the count less one, as LightningDiT's latents are normalised."""
        return self.std * math.sqrt(self.count / max(self.count - 1, 1))


@dataclass(frozen=True)
class LatentColours:
    """The first three principal axes of latent vectors, shown as red, green and blue."""

    mean: np.ndarray          # (C,)
    axes: np.ndarray          # (3, C) orthonormal; zero rows where C < 3
    scale: np.ndarray         # (3,) standard deviation along each axis
    explained: list[float]    # share of the variance along every axis, largest first

    def paint(self, latents: Tensor) -> np.ndarray:
        """(B, C, h, w) -> uint8 (B, h, w, 3); two standard deviations reach the ends of the range."""
        centred = latents.detach().double().cpu().permute(0, 2, 3, 1).numpy() - self.mean
        coordinates = centred @ self.axes.T / np.where(self.scale > 0, self.scale, 1)
        return np.clip((coordinates / COLOUR_SPAN + 1) * 127.5, 0, 255).round().astype(np.uint8)


def principal_colours(moments: LatentMoments) -> LatentColours:
    """PCA of the accumulated vectors. Each axis points to where its largest component is positive, so colours are stable."""
    values, vectors = np.linalg.eigh(moments.covariance)
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1].T
    axes, scale = np.zeros((3, len(values))), np.zeros(3)
    k = min(3, len(values))
    axes[:k], scale[:k] = vectors[:k], np.sqrt(values[:k])
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    total = values.sum()
    explained = (values / total).tolist() if total > 0 else [0.0] * len(values)
    return LatentColours(moments.mean, axes * np.where(signs == 0, 1, signs), scale, explained)


def raw_latents(tokenizer: ImageTokenizer, encoding: ImageEncoding) -> Tensor | None:
    """Un-normalised latents (B, C, h, w): the posterior's mean where there is one; None for a purely discrete tokenizer."""
    if encoding.latents is None:
        return None
    mean = getattr(encoding.posterior, "mean", None)
    if isinstance(mean, Tensor):
        return as_map(mean, encoding.latents)
    shift, scale = getattr(tokenizer, "latent_mean", None), getattr(tokenizer, "latent_std", None)
    if isinstance(shift, Tensor) and isinstance(scale, Tensor):
        return encoding.latents * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
    return encoding.latents


def as_map(values: Tensor, like: Tensor) -> Tensor:
    """Tokens (B, N, C), or a map, as a map (B, C, h, w) of the shape of `like`."""
    return values.transpose(1, 2).reshape(like.shape) if values.dim() == 3 else values


def as_vectors(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C)"""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


@torch.inference_mode()
def collect_latent_stats(tokenizer: ImageTokenizer, batches: Iterable[ImageBatch]) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the posterior means over all positions, set on the tokenizer.

    Streams float64 sums; std = sqrt(E[z²] − mean²), at least 1e-6. Returns float32 (C,), (C,), which
    `tokenizer.set_latent_statistics(mean, std)` has taken. Raises DataError without images, InputError if the tokenizer has
    no continuous latents or they are not finite.
    """
    remember = getattr(tokenizer, "set_latent_statistics", None)
    if not callable(remember):
        raise InputError(f"{type(tokenizer).__name__} does not normalise its latents: there are no statistics to set")
    moments = LatentMoments()
    tokenizer.eval()
    for batch in batches:
        latents = raw_latents(tokenizer, tokenizer.encode(batch.images.to(tokenizer.device)))
        if latents is None:
            raise InputError("latent statistics are for continuous latents; this tokenizer gives codes only")
        moments.add(as_vectors(latents))
    moments = reduce(LatentMoments.merge, all_processes(moments))
    if not moments.count:
        raise DataError("there are no images to collect latent statistics from")
    if not np.isfinite(moments.square).all():
        raise InputError("the latents are not finite: statistics cannot be collected")
    mean = torch.from_numpy(moments.mean).float()
    std = torch.from_numpy(np.maximum(moments.std, SMALLEST_STD)).float()
    remember(mean, std)
    return mean, std


@dataclass
class LatentTally:
    """What is summed over images for `latent_statistics`."""

    raw: LatentMoments = field(default_factory=LatentMoments)          # un-normalised posterior means
    shown: LatentMoments = field(default_factory=LatentMoments)        # latents as encode gives them
    images: int = 0
    kl_nats: float | None = 0.0                                        # none: there is no posterior
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)  # (codebook, code): how often
    shape: tuple[int, ...] = ()                                        # of the latents or codes of an image
    pixels: int = 0                                                    # values of an image

    def add_encoding(self, tokenizer: Any, encoding: ImageEncoding, images: Tensor) -> None:
        """Add what the tokenizer gave for a batch (B, 3, H, W)."""
        self.images += len(images)
        self.pixels = images[0].numel()
        latents = raw_latents(tokenizer, encoding)
        if latents is not None and encoding.latents is not None:
            self.raw.add(as_vectors(latents))
            self.shown.add(as_vectors(encoding.latents))
            self.shape = tuple(encoding.latents.shape[1:])
            logvar = getattr(encoding.posterior, "logvar", None)
            if isinstance(logvar, Tensor) and self.kl_nats is not None:
                mean, logvar = latents.double(), as_map(logvar, encoding.latents).double()
                self.kl_nats += 0.5 * float((mean.square() + logvar.exp() - 1 - logvar).sum())
            else:
                self.kl_nats = None
        elif encoding.codes is not None:
            self.shape = tuple(encoding.codes.shape[1:])
            for book in range(self.shape[0]):
                values, n = encoding.codes[:, book].unique(return_counts=True)
                self.counts.update({(book, v): c for v, c in zip(values.tolist(), n.tolist())})

    def merge(self, other: "LatentTally") -> "LatentTally":
        """Both sets of images together."""
        if not self.images or not other.images:
            return self if self.images else other
        kl = None if self.kl_nats is None or other.kl_nats is None else self.kl_nats + other.kl_nats
        return LatentTally(self.raw.merge(other.raw), self.shown.merge(other.shown), self.images + other.images, kl,
                           self.counts + other.counts, self.shape, self.pixels)


@torch.inference_mode()
def latent_statistics(
    tokenizer: ImageTokenizer, batches: Iterable[ImageBatch], together: bool = True
) -> tuple[dict[str, Any], LatentColours | None]:
    """Statistics of the latents or codes over the images as JSON data, and the colours of continuous latents.

    mean, std: of each channel as `encode` gives it (normalised). active_units: channels whose un-normalised posterior mean
    has a variance above 0.01. floats_per_image or bits_per_image: the size of what is stored; kl_bits_per_image: the
    posterior's KL to N(0, I). Numbers have six decimals, within which the order of the images does not matter.
    Under torch.distributed each process passes its share (unless not `together`) and gets the whole.
    Raises DataError without images, InputError on latents that are not finite.
    """
    tokenizer.eval()
    mine = LatentTally()
    for batch in batches:
        images = batch.images.to(tokenizer.device)
        mine.add_encoding(tokenizer, tokenizer.encode(images), images)
    return tally_statistics(tokenizer, mine, together)


def tally_statistics(tokenizer: Any, mine: LatentTally, together: bool = True) -> tuple[dict[str, Any], LatentColours | None]:
    """`latent_statistics` of what this process has added to its tally."""
    tally = reduce(LatentTally.merge, all_processes(mine, together))
    if not tally.images:
        raise DataError("there are no images to collect latent statistics from")
    result: dict[str, Any] = {"n": tally.images, "shape": list(tally.shape)}
    if not tally.raw.count:
        return {**result, **_code_statistics(tokenizer, tally)}, None
    raw, shown = tally.raw, tally.shown
    if not (np.isfinite(raw.square).all() and np.isfinite(shown.square).all()):
        raise InputError("the latents are not finite: the model's weights or its precision are broken")
    colours = principal_colours(shown)
    floats = math.prod(tally.shape)
    kl = None if tally.kl_nats is None else round(tally.kl_nats / tally.images / math.log(2), 6)
    result |= {
        "kind": "continuous", "floats_per_image": floats, "values_per_float": tally.pixels / floats,
        "mean": six_decimals(shown.mean), "std": six_decimals(shown.std),
        "raw_mean": six_decimals(raw.mean), "raw_std": six_decimals(raw.std),
        "active_units": int((np.square(raw.std) > ACTIVE_VARIANCE).sum()), "active_variance": ACTIVE_VARIANCE,
        "kl_bits_per_image": kl, "explained_variance": six_decimals(colours.explained),
    }
    return result, colours


def six_decimals(values: Iterable[float]) -> list[float]:
    """Rounded: the last bits of a sum depend on its order, and a deviation near 0 loses half of its digits."""
    return [round(float(value), 6) + 0.0 for value in values]      # + 0.0: no sign of a zero


def _code_statistics(tokenizer: ImageTokenizer, tally: LatentTally) -> dict[str, Any]:
    """Usage, perplexity and rate of discrete codes."""
    size = getattr(tokenizer, "codebook_size", None)
    used, perplexity = [], []
    for book in range(tally.shape[0]):
        n = np.array(sorted(c for (b, _), c in tally.counts.items() if b == book), dtype=np.float64)
        p = n / n.sum()
        used.append(len(n))
        perplexity.append(float(np.exp(-(p * np.log(p)).sum())))
    bits = math.prod(tally.shape) * math.log2(size) if size else None
    return {
        "kind": "codes", "codebook_size": size, "codes_used": used,
        "perplexity": six_decimals(perplexity), "bits_per_image": bits,
    }
