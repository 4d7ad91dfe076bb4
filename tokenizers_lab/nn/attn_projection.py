"""Attention projection: transformer blocks that change the width of tokens by a whole factor, as VFM-VAE compresses features."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .transformer import BlockStack

INNER_EPS = 1e-6      # of the feed-forward's own norm; the others have torch's 1e-5


class GeGLU(nn.Module):
    """w2(GELU(w0(v)) · w1(v)) with v = norm(x), tanh form of GELU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, INNER_EPS)
        self.w0, self.w1 = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        v = self.norm(x)
        return self.w2(F.gelu(self.w0(v), approximate="tanh") * self.w1(v))


class ProjectionAttention(nn.Module):
    """Self-attention at the larger of both widths. On the way down the heads are averaged, on the way up concatenated."""

    zero_k_bias: Tensor

    def __init__(self, width: int, width_out: int, heads: int):
        super().__init__()
        inner = max(width, width_out)
        self.heads, self.width_out, self.shrinks = heads, width_out, width > width_out
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.register_buffer("zero_k_bias", torch.zeros(inner))
        self.proj = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width). Returns (B, N, width_out)."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias.to(self.qkv.weight.dtype))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)           # each (B, heads, N, head width)
        found = F.scaled_dot_product_attention(q, k, v)
        if not self.shrinks:
            return self.proj(found.transpose(1, 2).flatten(2))
        found = found.mean(1)                                                             # (B, N, head width)
        if found.shape[-1] != self.width_out:
            found = F.adaptive_avg_pool1d(found, self.width_out)
        return self.proj(found)


class ProjectionBlock(nn.Module):
    """proj(norm3(x)) + attention(norm1(x)), then + GeGLU(norm2(·))."""

    def __init__(self, width: int, width_out: int, heads: int):
        super().__init__()
        self.norm1, self.norm3, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width_out)
        self.proj = nn.Linear(width, width_out)
        self.attn = ProjectionAttention(width, width_out, heads)
        self.mlp = GeGLU(width_out, 2 * width_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width). Returns (B, N, width_out)."""
        y = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))


class AttnProjection(BlockStack):
    """Blocks of which one changes the width: the last on the way down, the first on the way up. No position enters.

    The heads are as many as the larger width holds the smaller. Raises ValueError unless they divide the larger.
    """

    def __init__(self, width: int, width_out: int, layers: int = 1):
        super().__init__()
        large, small = max(width, width_out), min(width, width_out)
        heads = large // max(small, 1)
        if small < 1 or layers < 1 or large % heads:
            raise ValueError(f"attention from {width} to {width_out} channels would have {heads} heads, which do not divide")
        down = width > width_out
        widths = [width] * layers + [width_out] if down else [width] + [width_out] * layers
        self.width, self.width_out = width, width_out
        self.blocks = nn.ModuleList(ProjectionBlock(a, b, heads) for a, b in pairwise(widths))
        self.apply(init_projection)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width). Returns (B, N, width_out)."""
        for block in self.blocks:
            x = self.run(block, x)
        return x


def init_projection(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 (cut at ±2), biases 0, for a linear map."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
