"""Kernel distance between two sets of features (Bińkowski et al. 2018): KID, by the features given."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from tokenizers_lab.errors import InputError

from .bootstrap import Interval
from .deterministic import map_in_order
from .statistics import check_two_sets

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020      # torch-fidelity's protocol


@dataclass(frozen=True)
class KernelDistance:
    """Mean over random subsets of the unbiased squared maximum mean discrepancy."""

    value: float                  # may be slightly negative: the estimate is unbiased
    subset_std: float             # spread between subsets, which papers print behind ±; no error of the value
    interval: Interval | None     # of the value; None where a subset is the whole set
    subsets: int
    subset_size: int


def squared_mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of two sets (N, D) and (M, D) with the kernel (x·y / D + 1)³, in float64. N, M ≥ 2."""
    x, y = first.double(), second.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> float:
        matrix = kernel(a, a)
        return float(matrix.sum() - matrix.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def kernel_distance(
    features: Tensor, reference: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED,
    level: float = 0.95,
) -> KernelDistance:
    """KID of features (N, D) and reference (M, D), torch-fidelity's subsets in float64.

    The interval follows from subsampling: n times the variance of the estimate tends to a constant, which the subsets'
    spread gives, corrected for their being drawn without replacement; the finite number of subsets adds to it. Pairs are
    treated as independent sets, which makes their interval too wide. Raises InputError on sets smaller than a subset.
    """
    check_two_sets(features, reference)
    if subset_size < 2 or subsets < 1 or min(len(features), len(reference)) < subset_size:
        raise InputError(f"KID needs at least {max(2, subset_size)} samples in each set (the subset size), not "
                         f"{len(features)} and {len(reference)}: choose a smaller subset size")
    rng = np.random.RandomState(seed)
    features, reference = features.detach().cpu(), reference.detach().cpu()
    drawn = (
        (torch.from_numpy(rng.choice(len(features), subset_size, replace=False)),
         torch.from_numpy(rng.choice(len(reference), subset_size, replace=False)))
        for _ in range(subsets)
    )
    values = np.array(list(map_in_order(lambda pair: squared_mmd(features[pair[0]], reference[pair[1]]), drawn)))
    smaller = min(len(features), len(reference))
    interval = None
    if subsets > 1 and subset_size < smaller:
        spread = float(values.var(ddof=1))
        share = subset_size / smaller
        error = math.sqrt(spread * share / (1 - share) + spread / subsets)
        half = float(stats.norm.ppf((1 + level) / 2)) * error
        interval = Interval(float(values.mean()) - half, float(values.mean()) + half, level, "subsampling")
    return KernelDistance(float(values.mean()), float(values.std()), interval, subsets, subset_size)
