"""Inception Score (Salimans et al. 2016): exp of the mean KL divergence between p(class | image) and its mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import InputError

from .bootstrap import Interval
from .deterministic import one_thread
from .statistics import check_features

ADM_SPLIT_SIZE = 5000      # ADM: consecutive splits of this size, the last one shorter and counting as much


@dataclass(frozen=True)
class InceptionScore:
    """Mean score of the splits."""

    value: float
    interval: Interval | None     # for the expected value at these split sizes; None: one image
    splits: tuple[float, ...]     # score of each split
    protocol: str                 # how the splits were made


def inception_score(
    logits: Tensor, split_size: int | None = ADM_SPLIT_SIZE, splits: int | None = None, shuffle_seed: int | None = None,
    level: float = 0.95, keys: Sequence[str] | None = None,
) -> InceptionScore:
    """Score of class logits (N, K), which both protocols take without the classifier's bias; float64 inside.

    ADM's protocol is the default: consecutive splits of 5,000 images, in order, so images must not be sorted by class:
    keys, the images' names, put them in the order of a hash of their names first (rows and keys may come in any order).
    torch-fidelity's is `splits=10, shuffle_seed=2020` (`split_size` is then not used).
    The interval is the infinitesimal jackknife's: a sample's influence on a split's score is score · (KL − mean KL).
    Raises InputError on non-finite logits or fewer images than splits.
    """
    check_features(logits, "logits")
    n = len(logits)
    if splits is not None:
        bounds = [i * n // splits for i in range(splits + 1)]
        order = "in order" if shuffle_seed is None else f"shuffled with seed {shuffle_seed} (torch-fidelity)"
        protocol = f"{splits} splits, {order}"
    elif split_size is not None and split_size > 0:
        bounds = [*range(0, n, split_size), n]
        protocol = f"consecutive splits of {split_size} (ADM)"
    else:
        raise InputError("the Inception Score needs a positive split_size or a number of splits")
    if splits is not None and n < splits:
        raise InputError(f"the Inception Score needs at least as many images as splits: {n} < {splits}")
    logits = logits.detach().cpu()
    if keys is not None:
        if len(keys) != n:
            raise InputError(f"{n} rows of logits for {len(keys)} keys")
        logits = logits[torch.tensor(sorted(range(n), key=lambda i: (stable_seed(keys[i]), keys[i])), dtype=torch.int64)]
        protocol += ", images in the order of a hash of their names"
    if shuffle_seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(n))]
    scores, variances = [], []
    with one_thread():
        for start, end in pairwise(bounds):
            log_p = logits[start:end].double().log_softmax(dim=1)                        # (n, K)
            p = log_p.exp()
            divergence = (p * (log_p - p.mean(dim=0).log().clamp_min(-1e300))).sum(dim=1)   # 0 · −inf would be NaN
            scores.append(float(divergence.mean().exp()))
            variances.append(scores[-1] ** 2 * float(divergence.var(correction=0)) / max(1, end - start - 1))
    value, error = float(np.mean(scores)), math.sqrt(sum(variances)) / len(scores)
    half = float(stats.norm.ppf((1 + level) / 2)) * error
    interval = Interval(value - half, value + half, level, "infinitesimal jackknife") if n > len(scores) else None
    return InceptionScore(value, interval, tuple(scores), protocol)
