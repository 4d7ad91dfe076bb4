"""Which sample stands where: pure functions of the seed and the position, so that a resumed run reads what it would have read.

A position counts the training samples from the start of the run, over all ranks; epoch = position // number of samples.
"""

from functools import lru_cache

import numpy as np

from tokenizers_lab.draw import Draw, stable_seed


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 … n − 1 of an epoch, int64 (n,)."""
    return Draw(seed, step=epoch).permutation("order", n).numpy()


def sample_index(position: int, n: int, seed: int) -> int:
    """Which of n samples stands at a position; each stands once in an epoch."""
    epoch, place = divmod(position, n)
    return int(epoch_order(n, seed, epoch)[place])


def substitute_index(position: int, attempt: int, n: int, seed: int) -> int:
    """Which sample stands in where the one at a position, and the substitutes before this attempt, were unreadable."""
    return stable_seed(seed, "substitute", position, attempt) % n


def batch_positions(step: int, batch_size: int, rank: int, world: int) -> range:
    """The positions of a rank's batch at a micro-step: the ranks' batches follow one another."""
    first = (step * world + rank) * batch_size
    return range(first, first + batch_size)


def view_numbers(seed: int, *place: int | str) -> tuple[float, float, float, float]:
    """Four uniform numbers in [0, 1) that decide the crop and the mirror of the sample at a place.

    Straight from the hash: seeding a generator for each sample would take as long as 1 % of its decoding.
    """
    side, left, top, mirror = ((stable_seed(seed, "view", *place, i) >> 10) / 2**53 for i in range(4))
    return side, left, top, mirror


def spread(n: int, limit: int | None) -> range | list[int]:
    """At most limit of 0 … n − 1, in order and evenly spaced, so that a few samples stand for all classes of a folder."""
    if limit is None or limit >= n:
        return range(n)
    return [i * n // limit for i in range(limit)]
