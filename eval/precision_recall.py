"""Improved precision and recall (Kynkäänniemi et al. 2019), with ADM's squared distances."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from tokenizers_lab.errors import InputError

from .bootstrap import Interval
from .deterministic import map_in_order
from .statistics import check_two_sets

Arithmetic = Literal["float32", "float64", "adm-float16"]
ROWS = 512             # rows of distances that one thread holds at a time
ADM_BLOCK = 10_000     # ADM's blocks: in half precision unless one entry of a block overflows, then in float32


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1], each with an interval that takes the other set as given."""

    precision: float                     # of the samples that lie in the reference manifold
    recall: float                        # of the reference that lies in the samples' manifold
    precision_interval: Interval
    recall_interval: Interval
    k: int
    arithmetic: str


def precision_recall(
    features: Tensor, reference: Tensor, k: int = 3, arithmetic: Arithmetic = "float32"
) -> PrecisionRecall:
    """Precision and recall of features (N, D) against reference features (M, D).

    A set's manifold is the union of balls around its points, each as large as the distance to the k-th neighbour; the rim
    belongs to it. `adm-float16` reproduces the half precision of ADM's evaluator, whose third decimals are noise.
    Raises InputError where a set has fewer than k + 1 points or features are not finite.
    """
    check_two_sets(features, reference)
    features, reference = features.detach().cpu(), reference.detach().cpu()
    inside_reference = in_manifold(features, reference, manifold_radii(reference, k, arithmetic), arithmetic)
    inside_samples = in_manifold(reference, features, manifold_radii(features, k, arithmetic), arithmetic)
    counts = [(int(inside.sum()), len(inside)) for inside in (inside_reference, inside_samples)]
    precision, recall = (count / n for count, n in counts)
    of_precision, of_recall = (wilson_interval(count, n) for count, n in counts)
    return PrecisionRecall(precision, recall, of_precision, of_recall, k, arithmetic)


def wilson_interval(count: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval (1927) of a share count / n of independent samples; it stays wide where all or none are in."""
    z, share = float(stats.norm.ppf((1 + level) / 2)), count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))      # rounding aside
    return Interval(low, high, level, "Wilson, the other set taken as given")


def manifold_radii(points: Tensor, k: int = 3, arithmetic: Arithmetic = "float32") -> Tensor:
    """Squared distance (N,) of each point (N, D) to its k-th neighbour; the point itself is the zeroth.

    Raises InputError for fewer than k + 1 points.
    """
    if k < 1 or len(points) < k + 1:
        raise InputError(f"precision and recall with k = {k} need at least {k + 1} points in each set, not {len(points)}")
    return torch.cat(list(_map_rows(lambda rows: rows.kthvalue(k + 1, dim=1).values, points, points, arithmetic)))


def in_manifold(points: Tensor, centres: Tensor, radii: Tensor, arithmetic: Arithmetic = "float32") -> Tensor:
    """Whether each point (N, D) lies in the ball of at least one centre (M, D) with squared radii (M,): bool (N,)."""
    return torch.cat(list(_map_rows(lambda rows: (rows <= radii).any(dim=1), points, centres, arithmetic)))


def _map_rows(
    function: Callable[[Tensor], Tensor], points: Tensor, centres: Tensor, arithmetic: Arithmetic
) -> Iterator[Tensor]:
    """function(squared distances (rows, M)) for blocks of rows of all distances (N, M), in order."""
    if arithmetic == "adm-float16":
        for block in points.split(ADM_BLOCK):
            distances = torch.cat([_adm_block(block, columns) for columns in centres.split(ADM_BLOCK)], dim=1)
            yield from map_in_order(function, distances.split(ROWS))
    elif arithmetic in ("float32", "float64"):
        dtype = getattr(torch, arithmetic)
        centres = centres.to(dtype)
        norms = centres.square().sum(dim=1)
        yield from map_in_order(lambda rows: function(_squared_distances(rows.to(dtype), centres, norms)), points.split(ROWS))
    else:
        raise InputError(f"precision and recall have no arithmetic '{arithmetic}'; known: float32, float64, adm-float16")


def _squared_distances(points: Tensor, centres: Tensor, norms: Tensor) -> Tensor:
    """|u|² − 2 u·v + |v|², not below 0, in the points' precision."""
    return (points.square().sum(dim=1, keepdim=True) - 2 * (points @ centres.T) + norms).clamp_min_(0)


def _adm_block(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances float32 (n, m) of a block, rounded to half precision at each step if all of them stay finite."""
    u, v = points.half(), centres.half()
    norms = v.square().float().sum(dim=1).half()

    def rows(part: Tensor) -> Tensor:
        own = part.square().float().sum(dim=1, keepdim=True).half()
        products = (part.float() @ v.float().T).half()      # half inputs, summed in float32 as half kernels do
        return (own - 2 * products + norms).clamp_min(0)

    distances = torch.cat(list(map_in_order(rows, u.split(ROWS))))
    if distances.isfinite().all():
        return distances.float()
    points, centres = points.float(), centres.float()
    exact = centres.square().sum(dim=1)
    return torch.cat(list(map_in_order(lambda part: _squared_distances(part, centres, exact), points.split(ROWS))))
