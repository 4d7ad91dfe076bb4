"""The head of self-distillation: from tokens to the logits of prototypes (Caron et al. 2021; DINOv2's, one for all tokens)."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

INIT_STD = 0.02


class DINOHead(nn.Module):
    """Linear maps with GELU between them, L2 norm, and a linear map whose rows are weight-normalised prototypes.

    Row k of the last map is g_k · v_k / ‖v_k‖; g starts as 1. Tokens of any kind go through the same head.
    """

    def __init__(self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, layers: int = 3):
        """width: channels of a token; layers: linear maps before the prototypes. Raises ValueError on sizes below 1."""
        super().__init__()
        if min(width, prototypes, hidden, bottleneck, layers) < 1:
            raise ValueError("width, prototypes, hidden, bottleneck and layers of a DINO head must be at least 1")
        widths = [width] + [hidden] * (layers - 1) + [bottleneck]
        maps: list[nn.Module] = []
        for inward, outward in itertools.pairwise(widths):
            maps += [nn.Linear(inward, outward), nn.GELU()]
        self.mlp = nn.Sequential(*maps[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        self.last = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))      # v: torch's initialisation of a linear map
        nn.init.ones_(self.last.parametrizations.weight.original0)      # type: ignore[union-attr,index,arg-type]

    def project(self, tokens: Tensor) -> Tensor:
        """What meets the prototypes: (..., bottleneck) of length 1, from tokens (..., width)."""
        x = self.mlp(tokens)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (..., prototypes) of tokens (..., width)."""
        return self.last(self.project(tokens))
