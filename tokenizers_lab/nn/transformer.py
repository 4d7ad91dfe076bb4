"""Pre-norm transformer of the vision systems: RMS norm, attention with rotary positions, SwiGLU."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .norm import RMSNorm
from .rope import apply_paired

QK_NORM_EPS = torch.finfo(torch.float32).eps      # torch's own default for RMS norms of float32, which official codes rely on


def swiglu_hidden(width: int, ratio: float = 4.0) -> int:
    """Hidden channels of a SwiGLU that costs as much as a plain feed-forward of `ratio` · width.

    Evaluated from left to right in floating point, since released weights have the sizes that this rounding gives.
    """
    return int(2 / 3 * width * ratio)


class SwiGLU(nn.Module):
    """down(silu(a) · b), where one linear gives a and b (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Full self-attention; queries and keys are optionally RMS-normalised a head, then turned by the rotary table."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads, QK_NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x: (B, N, width); rope: (N, 2·head width) or (B, N, 2·head width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # each (B, heads, N, head width)
        q, k = apply_paired(self.q_norm(q), rope), apply_paired(self.k_norm(k), rope)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads, qk_norm)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, swiglu_hidden(width))

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x: (B, N, width)."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class BlockStack(nn.Module):
    """Runs blocks one after the other. `checkpointing` recomputes their activations in the backward pass."""

    checkpointing: bool = False

    def run(self, block: nn.Module, x: Tensor, *given: Tensor | None) -> Tensor:
        """block(x, *given)."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *given, use_reentrant=False)      # keeps the random state: blocks may drop paths
        return block(x, *given)


class Transformer(BlockStack):
    """Norm, blocks, norm."""

    def __init__(self, width: int, depth: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.head_dim = width // heads
        self.norm_in = RMSNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
        self.norm_out = RMSNorm(width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x: (B, N, width); rope: (N, 2·head_dim) or (B, N, 2·head_dim)."""
        return self.intermediate(x, rope, [len(self.blocks) - 1])[0]

    def intermediate(self, x: Tensor, rope: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """As `forward`, after each of these blocks (from 0), in the order asked for."""
        x, found = self.norm_in(x), {}
        for number, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = self.run(block, x, rope)
            if number in blocks:
                found[number] = self.norm_out(x)
        return [found[number] for number in blocks]


def set_activation_checkpointing(module: nn.Module, on: bool) -> int:
    """Switch activation checkpointing of every stack of blocks inside `module`; returns how many there are."""
    stacks = [m for m in module.modules() if isinstance(m, BlockStack)]
    for stack in stacks:
        stack.checkpointing = on
    return len(stacks)
