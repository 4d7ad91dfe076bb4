"""CKNNA: how far two sets of features agree about which images are neighbours (Huh et al. 2024, "The Platonic Representation
Hypothesis": centred kernel alignment of the entries that are nearest neighbours in both, unbiased)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from tokenizers_lab.errors import InputError

K = 10                          # neighbours
QUANTILE = 0.95                 # of |features|, to which they are clamped
EPSILON = 1e-6                  # under the fraction
SAME = 1e-12                    # 1 − cosine of neighbours, below which all items are the same
ROWS = 512                      # rows of a kernel that are in memory at a time
GROUPS, SPARE = 20, 30          # of the jackknife; neighbours kept beyond k and a group's size at most


@dataclass(frozen=True)
class Neighbours:
    """The others most similar to each of n items, most similar first."""

    index: Tensor               # (n, m) int64
    similarity: Tensor          # (n, m) float64: inner products

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class SparseKernel:
    """A kernel (n, n) of which each row keeps k entries; all others are 0."""

    n: int
    places: Tensor              # (entries,) int64, row · n + column, ascending
    values: Tensor              # (entries,) float64

    def at(self, places: Tensor) -> Tensor:
        """Entries at these places, 0 where none is kept."""
        if not len(self.places):
            return torch.zeros(places.shape, dtype=torch.float64)
        found = torch.searchsorted(self.places, places).clamp(max=len(self.places) - 1)
        return torch.where(self.places[found] == places, self.values[found], 0.0)


def prepare(features: Tensor) -> Tensor:
    """Features (n, D) as float64, clamped to the 0.95 quantile of their absolute values, rows of length 1.

    The quantile is the entry int(0.95 · n · D) of the ascending sort. Raises InputError on other shapes and non-finite features.
    """
    if features.dim() != 2 or 0 in features.shape:
        raise InputError(f"CKNNA needs a vector for each image, (n, D), not {tuple(features.shape)}")
    if not features.isfinite().all():
        raise InputError("features for CKNNA are not finite")
    wide = features.detach().cpu().double()
    limit = wide.abs().flatten().kthvalue(int(QUANTILE * wide.numel()) + 1).values
    return torch.nn.functional.normalize(wide.clamp(-limit, limit), dim=1, eps=1e-12)


def find_neighbours(prepared: Tensor, count: int) -> Neighbours:
    """The `count` most similar others of each row of (n, D), by inner product; `ROWS` rows of the kernel at a time."""
    index, similarity = [], []
    for start in range(0, len(prepared), ROWS):
        kernel = prepared[start : start + ROWS] @ prepared.T                     # (rows, n)
        kernel[torch.arange(len(kernel)), torch.arange(start, start + len(kernel))] = -math.inf
        best = kernel.topk(count, dim=1)
        index.append(best.indices)
        similarity.append(best.values)
    return Neighbours(torch.cat(index), torch.cat(similarity))


def keep_nearest(neighbours: Neighbours, k: int, kept: Tensor) -> SparseKernel:
    """The kernel of the items that `kept` (n,) says, each row with its k nearest of them."""
    n = int(kept.sum())
    number = kept.cumsum(0) - 1                                                  # of each kept item among the kept
    index, similarity = neighbours.index[kept], neighbours.similarity[kept]
    there = kept[index]
    row, column = (there & (there.cumsum(1) <= k)).nonzero(as_tuple=True)
    places, order = (row * n + number[index[row, column]]).sort()
    return SparseKernel(n, places, similarity[row, column][order])


def hsic(one: SparseKernel, other: SparseKernel) -> float:
    """Unbiased HSIC of two kernels with zero diagonals, in general asymmetric (Song et al. 2012, eq. 5)."""
    n = one.n
    row, column = one.places // n, one.places % n
    crossed = (one.values * other.at(column * n + row)).sum()                                    # Σ_ij M_ij N_ji
    into = torch.bincount(column, one.values, n)
    outof = torch.bincount(other.places // n, other.values, n)                                   # Σ_ij (M N)_ij = into · outof
    sums = one.values.sum() * other.values.sum() / ((n - 1) * (n - 2))
    return float(crossed + sums - 2 / (n - 2) * (into @ outof)) / (n * (n - 3))


def align(one: Neighbours, other: Neighbours, k: int = K, kept: Tensor | None = None) -> float:
    """CKNNA of two sets of neighbours of the same items; NaN where a set's items do not differ enough for one.

    kept: (n,) the items that count; none: all.
    """
    kept = torch.ones(len(one), dtype=torch.bool) if kept is None else kept
    if any(float(1 - neighbours.similarity.min()) < SAME for neighbours in (one, other)):
        return math.nan                                                          # who is a neighbour would be chance
    a, b = keep_nearest(one, k, kept), keep_nearest(other, k, kept)
    common = a.places[torch.isin(a.places, b.places)]                            # neighbours in both
    of_one, of_other = hsic(a, a), hsic(b, b)
    if of_one <= 0 or of_other <= 0:
        return math.nan
    both = hsic(SparseKernel(a.n, common, a.at(common)), SparseKernel(a.n, common, b.at(common)))
    return both / (math.sqrt(of_one * of_other) + EPSILON)


def check_count(n: int, k: int = K) -> None:
    """Raise InputError unless n images are enough for k neighbours."""
    if k < 1 or n < k + 2 or n < 4:
        raise InputError(f"CKNNA with {k} neighbours needs at least {max(k + 2, 4)} images, not {n}")


def cknna(one: Tensor, other: Tensor, k: int = K) -> float:
    """CKNNA of features (n, C) and (n, D) of the same n images: 1 if all agree, about 0 if the two have nothing in common.

    float64; memory of n · `ROWS` + n · k numbers beside the features. NaN where features do not differ between images.
    Raises InputError for too few images, other shapes, features that are not finite.
    """
    if len(one) != len(other):
        raise InputError(f"CKNNA compares features of the same images, not of {len(one)} and {len(other)}")
    check_count(len(one), k)
    return align(find_neighbours(prepare(one), k), find_neighbours(prepare(other), k), k)


def jackknife_groups(n: int) -> int:
    """How many groups of n items are left out in turn."""
    return min(GROUPS, n)


def neighbours_kept(n: int, k: int = K) -> int:
    """Neighbours to find, so that each item still has k when a group of the jackknife is left out (or all but surely)."""
    return min(n - 1, k + min(-(-n // jackknife_groups(n)), SPARE))


def leave_out(one: Neighbours, other: Neighbours, k: int = K) -> list[float]:
    """CKNNA without each group of items: i, i + G, i + 2 G, …"""
    groups = jackknife_groups(len(one))
    member = torch.arange(len(one)) % groups
    return [align(one, other, k, member != group) for group in range(groups)]


def jackknife_interval(value: float, without: Sequence[float], level: float = 0.95) -> dict[str, Any] | None:
    """Student's interval around a value by its values without each group; None where one of them does not exist."""
    groups = len(without)
    if not math.isfinite(value) or not all(map(math.isfinite, without)):
        return None
    mean = math.fsum(without) / groups
    error = math.sqrt((groups - 1) / groups * math.fsum((one - mean) ** 2 for one in without))
    half = float(stats.t.ppf((1 + level) / 2, groups - 1)) * error
    return {"low": value - half, "high": value + half, "level": level,
            "method": f"jackknife, {groups} groups of images left out in turn, neighbours found anew"}
