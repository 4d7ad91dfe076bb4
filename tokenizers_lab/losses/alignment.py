"""Alignment of latents with a vision foundation model's features (VA-VAE, Yao et al. 2025, arXiv 2501.01423, sec. 3)."""

import torch
from torch import Tensor
from torch.nn import functional as F

ADAPTIVE_MAX, ADAPTIVE_EPS = 1e8, 1e-4


def distance_matrix_loss(features: Tensor, latents: Tensor, margin: float = 0.0) -> Tensor:
    """Mean over items and pairs of positions of relu(|difference of both cosines| − margin).

    features: (B, D, h, w); latents: (B, C, h, w). Holds two matrices (h·w, h·w) an item.
    """
    def cosines(x: Tensor) -> Tensor:
        rows = F.normalize(x.flatten(2), dim=1)                                           # (B, channels, h·w)
        return rows.transpose(1, 2) @ rows

    return F.relu((cosines(latents) - cosines(features)).abs() - margin).mean()


def marginal_cosine_loss(features: Tensor, latents: Tensor, margin: float = 0.0) -> Tensor:
    """Mean over items and positions of relu(1 − margin − cos); both (B, D, h, w)."""
    return F.relu(1 - margin - F.cosine_similarity(features, latents, dim=1)).mean()


def pool_to(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features (B, D, rows, columns) averaged to a grid of another size."""
    return features if tuple(features.shape[2:]) == tuple(grid) else F.adaptive_avg_pool2d(features, grid)


def adaptive_weight(reference: Tensor, loss: Tensor, parameter: Tensor) -> Tensor:
    """‖∂reference/∂parameter‖ / (‖∂loss/∂parameter‖ + 1e-4), at most 1e8, without gradient (Esser et al. 2021, eq. 7).

    The graphs are kept. Of this process and micro-batch alone.
    """
    norms = [torch.autograd.grad(term, parameter, retain_graph=True)[0].norm() for term in (reference, loss)]
    return (norms[0] / (norms[1] + ADAPTIVE_EPS)).clamp(0, ADAPTIVE_MAX).detach()
