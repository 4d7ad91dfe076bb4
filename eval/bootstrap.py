"""Uncertainty of means."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from tokenizers_lab.errors import InputError

CHUNK = 2_000_000     # resampled values held at once


@dataclass(frozen=True)
class Interval:
    """A confidence interval and how it was made."""

    low: float
    high: float
    level: float
    method: str


def exact_mean(values: Sequence[float]) -> float:
    """The mean, correctly rounded: the same bits in any order of the values."""
    return math.fsum(values) / len(values)


def mean_interval(values: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Bootstrap confidence interval of the mean of independent values.

    The percentile interval, expanded so that it is as wide as Student's for small samples, where the plain one is too
    narrow by sqrt((n - 1) / n) and by normal instead of t quantiles (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", sec. 5). The values are sorted first: their order does not matter. None for fewer than two values.
    Raises InputError if a value is not finite.
    """
    array = np.sort(np.asarray(values, dtype=np.float64))
    n = len(array)
    if not np.isfinite(array).all():
        raise InputError("the interval of a mean needs finite values")
    if n < 2:
        return None
    return resampled_interval(lambda drawn: array[drawn].mean(axis=1), n, level, resamples, seed)


def resampled_interval(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, level: float = 0.95, resamples: int = 2000, seed: int = 0,
    what: str = "",
) -> Interval:
    """Expanded percentile bootstrap interval of a statistic of n ≥ 2 independent items.

    statistic: numbers of the drawn items (rows, n) -> its value for each row. what: which items are drawn, for the method.
    """
    tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    rng = np.random.Generator(np.random.PCG64(seed))
    values = np.empty(resamples)
    step = max(1, CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        values[start : start + rows] = statistic(rng.integers(0, n, (rows, n)))
    low, high = np.quantile(values, [tail, 1 - tail])
    method = f"expanded percentile bootstrap{what and f' of {what}'}, {resamples} resamples, seed {seed}"
    return Interval(float(low), float(high), level, method)


def mean_summary(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The mean and its interval, as a result has them. Raises InputError on values that are not finite."""
    interval = mean_interval(values, seed=seed)
    return {"value": exact_mean(values), "uncertainty": None if interval is None else asdict(interval)}
