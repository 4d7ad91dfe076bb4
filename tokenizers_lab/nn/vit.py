"""Plain vision transformers: the encoder of InternViT's shape, and the pre-norm block that it shares with timm's."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from .norm import RMSNorm
from .patch import PatchEmbed, resize_positions
from .transformer import BlockStack

NORMS = ("layer_norm", "rms_norm")
POSITION_STD = 0.02      # of class token and position table before weights are loaded


def build_norm(kind: str, width: int, eps: float) -> nn.Module:
    """LayerNorm or RMS norm over the last axis. Raises ValueError on another kind."""
    if kind == "layer_norm":
        return nn.LayerNorm(width, eps)
    if kind == "rms_norm":
        return RMSNorm(width, eps)
    raise ValueError(f"unknown norm '{kind}'; known: {', '.join(NORMS)}")


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and biases 0, for a linear map; `nn.Module.apply` takes it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, width_out: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width). Returns (..., width_out)."""
        return self.fc2(F.gelu(self.fc1(x)))


class ViTAttention(nn.Module):
    """Full self-attention without positions; queries and keys optionally RMS-normalised over all heads together."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True, qk_norm: bool = False, eps: float = 1e-6):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))     # from (B, heads, N, head width)


class ViTBlock(nn.Module):
    """x + attention(norm(x)) · ls1, then x + MLP(norm(x)) · ls2. layer_scale: first value of ls1 and ls2; none: without."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        norm: str = "layer_norm",
        eps: float = 1e-6,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = build_norm(norm, width, eps)
        self.attn = ViTAttention(width, heads, qkv_bias, qk_norm, eps)
        self.norm2 = build_norm(norm, width, eps)
        self.mlp = MLP(width, hidden, width)
        self.ls1 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
        self.ls2 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        change = self.attn(self.norm1(x))
        x = x + self.drop_path(change if self.ls1 is None else change * self.ls1)
        change = self.mlp(self.norm2(x))
        return x + self.drop_path(change if self.ls2 is None else change * self.ls2)


class InternViT(BlockStack):
    """The vision transformer of InternVL (Chen et al. 2023): class token, learned positions, layer scale, no final norm.

    drop_path: share of dropped residual branches, growing linearly from 0 at the first layer to this at the last.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        norm: str = "layer_norm",
        eps: float = 1e-6,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float = 1.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.patch, self.width, self.depth = patch, width, depth
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width).normal_(std=POSITION_STD))
        self.patch_embedding = PatchEmbed(3, width, patch)
        positions = torch.empty(1, (image_size // patch) ** 2 + 1, width)        # the class token's first
        self.position_embedding = nn.Parameter(positions.normal_(std=POSITION_STD))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(
            ViTBlock(width, heads, hidden, norm, eps, qkv_bias, qk_norm, layer_scale, rate) for rate in rates
        )
        self.layers.apply(init_linear)

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W), normalised, any multiple of the patch. Returns (B, 1 + N, width), the class token first."""
        rows, cols = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        tokens = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))                     # (B, N, width)
        own, patches = self.position_embedding[:, :1], resize_positions(self.position_embedding[:, 1:], rows, cols)
        return torch.cat([(self.class_embedding + own).expand(tokens.shape[0], -1, -1), tokens + patches], dim=1)

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """The embeddings and every layer's output: depth + 1 times (B, 1 + N, width)."""
        states = [self.embed(pixels)]
        for layer in self.layers:
            states.append(self.run(layer, states[-1]))
        return states

    def forward(self, pixels: Tensor, every_layer: bool = False) -> list[Tensor]:
        """Patch tokens (B, N, width) of the last layer, or of each layer, from normalised pixels (B, 3, H, W)."""
        x, states = self.embed(pixels), []
        for number, layer in enumerate(self.layers, 1):
            x = self.run(layer, x)
            if every_layer or number == self.depth:
                states.append(x[:, 1:])
        return states
