"""Losses by which students follow the features of frozen teachers."""

import torch
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


def negative_log_cosine(target: Tensor, prediction: Tensor, dim: int) -> Tensor:
    """Mean of −log σ(cos) along `dim`; between 0.313 (same direction) and 1.313."""
    return -F.logsigmoid(F.cosine_similarity(target, prediction, dim=dim)).mean()


def dimension_distance(target: Tensor, prediction: Tensor, as_released: bool = False) -> Tensor:
    """−log σ(cos) over *time* for each feature dimension, mean over items and dimensions (DM-Codec, SpeechTokenizer: "d-axis").

    target, prediction: (B, T, D), cut to the shorter. as_released: accept a target (B, 1, T, D), as the authors' feature files
    give it; the cosine then runs over the batch, a fault of theirs. Raises ValueError on other shapes.
    """
    target, prediction = shorter(target, prediction, as_released)
    return negative_log_cosine(target, prediction, dim=1)


def frame_distance(target: Tensor, prediction: Tensor, similarity: float = 1.0, as_released: bool = False) -> Tensor:
    """mean |target − prediction| + similarity · mean −log σ(cos) of each frame (DM-Codec, "t-axis"; DistilHuBERT's form).

    Shapes as in `dimension_distance`.
    """
    target, prediction = shorter(target, prediction, as_released)
    return F.l1_loss(*torch.broadcast_tensors(prediction, target)) + similarity * negative_log_cosine(target, prediction, dim=-1)


def shorter(target: Tensor, prediction: Tensor, as_released: bool = False) -> tuple[Tensor, Tensor]:
    """Both (B, T, D) cut to the shorter T. Raises ValueError unless they fit."""
    if not as_released and (target.dim() != 3 or prediction.dim() != 3 or target.shape[::2] != prediction.shape[::2]):
        raise ValueError(f"features must be (B, T, D) and alike, not {tuple(target.shape)} and {tuple(prediction.shape)}")
    frames = min(target.shape[1], prediction.shape[1])
    return target[:, :frames], prediction[:, :frames]
