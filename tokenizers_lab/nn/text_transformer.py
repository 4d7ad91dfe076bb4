"""The causal text encoder of CLIP (Radford et al. 2021): a text's embedding is that of its token with the largest id, its end."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .transformer import BlockStack

NORM_EPS = 1e-5


class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, width)."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). quick_gelu: x · sigmoid(1.702 x) instead of the exact GELU."""

    def __init__(self, width: int, heads: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.attention = CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, width)."""
        x = x + self.attention(self.norm1(x))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden))


class TextTransformer(BlockStack):
    """Token ids to one embedding a text. Padding behind the end needs no mask: nothing before it sees it."""

    def __init__(
        self, width: int, depth: int, heads: int, context: int, vocabulary: int, mlp_ratio: float = 4.0,
        quick_gelu: bool = False, projection_bias: bool = False,
    ):
        """context: most tokens of a text. Raises ValueError if heads do not divide the width."""
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.context, self.width = context, width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads, int(width * mlp_ratio), quick_gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.projection = nn.Linear(width, width, bias=projection_bias)
        self.initialise()

    def initialise(self) -> None:
        """CLIP's: by width and depth."""
        width, depth = self.width, len(self.blocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.zeros_(block.attention.out.bias)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (B, width), not normalised, of ids (B, L) int64, L at most `context`."""
        x = self.token_embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = self.run(block, x)
        ends = ids.argmax(dim=1)                        # the first of the largest id
        return self.projection(self.norm(x[torch.arange(x.shape[0], device=x.device), ends]))
