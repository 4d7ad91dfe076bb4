"""Spectral norm of a layer's weight (Miyato et al. 2018)."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

Layer = TypeVar("Layer", bound=nn.Module)
EPS = 1e-12


class SpectralNorm(nn.Module):
    """weight / σ with σ = uᵀ W v, W being the weight as (out, rest). In training each use makes one power iteration first:
    v from u, then u from v.

    torch's own parametrization goes the other way round and so lags half an iteration behind torch's hook of the same name,
    with which released discriminators were trained.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.register_buffer("u", F.normalize(torch.randn(rows), dim=0, eps=EPS))
        self.register_buffer("v", F.normalize(torch.randn(columns), dim=0, eps=EPS))

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (out, …)."""
        matrix = weight.flatten(1)
        if self.training:
            with torch.no_grad():
                self.v.copy_(F.normalize(matrix.t() @ self.u, dim=0, eps=EPS))
                self.u.copy_(F.normalize(matrix @ self.v, dim=0, eps=EPS))
        u, v = self.u.clone(), self.v.clone()      # another use may move them before backward
        return weight / torch.dot(u, matrix @ v)


def spectral_norm(layer: Layer) -> Layer:
    """The layer with its weight under spectral norm."""
    weight = layer.get_parameter("weight")
    register_parametrization(layer, "weight", SpectralNorm(weight))
    return layer
