"""Normalisation layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019), computed in float32 or wider.

    Half-precision inputs come back in their own type; the mean of squares never is half precision.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width). Returns the same shape and type."""
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


@torch.no_grad()
def scale_weight_norms(module: nn.Module, factor: float) -> None:
    """Multiply the weights of every weight-normed layer inside `module` by a factor, in place."""
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            layer.parametrizations["weight"].original0.mul_(factor)      # type: ignore[index,union-attr]
