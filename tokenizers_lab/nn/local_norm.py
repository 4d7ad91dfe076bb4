"""Batch norm within small groups of a batch, as StyleGAN-T's discriminator has it."""

import torch
from torch import Tensor, nn

GROUP = 8      # items that share their statistics, at most


class LocalBatchNorm(nn.Module):
    """Normalises each channel over the positions of a few consecutive items; no running statistics, the same in eval mode.

    The batch is cut into ⌈B / 8⌉ groups, or more until they are equal.
    """

    def __init__(self, channels: int, group: int = GROUP, eps: float = 1e-5):
        super().__init__()
        self.group, self.eps = group, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, ...)."""
        groups = -(-len(x) // self.group)
        while len(x) % groups:
            groups += 1
        split = x.unflatten(0, (groups, -1)).flatten(3)                                   # (groups, items, channels, positions)
        variance, mean = torch.var_mean(split, dim=(1, 3), keepdim=True, correction=0)
        normed = ((split - mean) * (variance + self.eps).rsqrt()).reshape(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return normed * self.weight.view(shape) + self.bias.view(shape)
