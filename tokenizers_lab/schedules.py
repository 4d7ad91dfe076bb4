"""Values that change over training, as functions of the share of it that is over."""

import math


def half_cosine(start: float, end: float, share: float) -> float:
    """From start (share 0) to end (share 1, and beyond) along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def ramp(start: float, end: float, share: float) -> float:
    """From start (share 0) to end (share 1, and beyond) along a line."""
    return start + (end - start) * min(share, 1.0)
