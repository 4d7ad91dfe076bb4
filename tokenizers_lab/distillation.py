"""Losses by which students follow the features of frozen teachers."""

from torch import Tensor
from torch.nn import functional as F


def cosine_distance(target: Tensor, prediction: Tensor) -> Tensor:
    """Mean of 1 − cos over all vectors of the last axis; in [0, 2]."""
    return (1 - (F.normalize(target, dim=-1) * F.normalize(prediction, dim=-1)).sum(-1)).mean()


def feature_distance(target: Tensor, prediction: Tensor, kind: str) -> Tensor:
    """Distance of features (..., C): `cosine` (mean of 1 − cos), `l2` (mean square), `l1` (mean absolute).

    Raises ValueError on another kind.
    """
    if kind == "cosine":
        return cosine_distance(target, prediction)
    if kind == "l2":
        return F.mse_loss(prediction, target)
    if kind == "l1":
        return F.l1_loss(prediction, target)
    raise ValueError(f"unknown distillation loss '{kind}'; known: cosine, l2, l1")
