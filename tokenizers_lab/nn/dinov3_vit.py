"""Vision transformers of DINOv3's shape (Siméoni et al. 2025): pre-norm blocks with rotary positions by halves, a class token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .norm import RMSNorm
from .patch import PatchEmbed
from .rope import apply_by_halves, centred_table
from .transformer import BlockStack, SwiGLU
from .vit import MLP, build_norm, init_linear

NORM_EPS = {"layer_norm": 1e-6, "rms_norm": 1e-5}
FFNS = ("swiglu", "mlp")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INIT_STD = 0.02


@dataclass
class RotaryConfig:
    """In which types the tables of rotary positions are made. What they turn is rounded to the tables' type, and back."""

    periods: str = "float32"          # type that holds the periods: float32, bfloat16
    coordinates: str = "float32"      # type in which periods and coordinates are computed: float32, bfloat16


@dataclass
class BlocksConfig:
    """Sizes and kinds of a stack of blocks."""

    width: int = 1024                 # channels of a token
    depth: int = 24                   # transformer blocks
    heads: int = 16                   # attention heads
    mlp_ratio: float = 4.0            # hidden channels of the feed-forward by the width; a swiglu has two thirds of them
    ffn: str = "swiglu"               # swiglu, mlp
    norm: str = "rms_norm"            # rms_norm, layer_norm
    qk_norm: bool = False             # RMS norm of queries and keys, a head
    layer_scale: float = 0.0          # first value of the layer scales; 0: there are none
    rotary: RotaryConfig = field(default_factory=RotaryConfig)


def check_blocks(cfg: BlocksConfig) -> str | None:
    """What is wrong with the sizes, in words; none: nothing."""
    if min(cfg.width, cfg.depth, cfg.heads) < 1 or cfg.width % (4 * cfg.heads):
        return f"width {cfg.width} must be a multiple of 4 × heads ({cfg.heads}), and depth at least 1"
    if cfg.ffn not in FFNS or cfg.norm not in NORM_EPS:
        return f"ffn must be {' or '.join(FFNS)} and norm {' or '.join(NORM_EPS)}, not '{cfg.ffn}' and '{cfg.norm}'"
    if cfg.rotary.periods not in PRECISIONS or cfg.rotary.coordinates not in PRECISIONS:
        return f"rotary.periods and rotary.coordinates must be {' or '.join(PRECISIONS)}"
    if cfg.mlp_ratio * cfg.width < 1 or cfg.layer_scale < 0:
        return "mlp_ratio must be above 0 and layer_scale not negative"
    return None


def ffn_hidden(cfg: BlocksConfig) -> int:
    """Hidden channels: mlp_ratio · width; of a swiglu two thirds of that, rounded up to a multiple of 8."""
    hidden = int(cfg.width * cfg.mlp_ratio)
    return hidden if cfg.ffn == "mlp" else -(-int(hidden * 2 / 3) // 8) * 8


class TokenFeatures(NamedTuple):
    """What a transformer says of images, normed."""

    class_token: Tensor       # (B, width)
    patch_tokens: Tensor      # (B, N, width), row by row


class RotaryAttention(nn.Module):
    """Self-attention of all to all; queries and keys are turned in the type of the table."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads, NORM_EPS["rms_norm"]) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads, NORM_EPS["rms_norm"]) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x: (B, N, width); rope: (N, 2·head width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # each (B, heads, N, head width)
        q, k = (apply_by_halves(t.to(rope.dtype), rope).to(v.dtype) for t in (self.q_norm(q), self.k_norm(k)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """x · gamma, a factor for each channel."""

    def __init__(self, width: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        return x * self.gamma


class RotaryBlock(nn.Module):
    """x + scale1(attention(norm1(x))), then x + scale2(ffn(norm2(x)))."""

    def __init__(self, cfg: BlocksConfig):
        super().__init__()
        eps, hidden = NORM_EPS[cfg.norm], ffn_hidden(cfg)
        self.norm1 = build_norm(cfg.norm, cfg.width, eps)
        self.attention = RotaryAttention(cfg.width, cfg.heads, cfg.qk_norm)
        self.scale1 = LayerScale(cfg.width, cfg.layer_scale) if cfg.layer_scale else nn.Identity()
        self.norm2 = build_norm(cfg.norm, cfg.width, eps)
        self.mlp = SwiGLU(cfg.width, hidden) if cfg.ffn == "swiglu" else MLP(cfg.width, hidden, cfg.width)
        self.scale2 = LayerScale(cfg.width, cfg.layer_scale) if cfg.layer_scale else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor, kept: Tensor | None = None) -> Tensor:
        """x: (B, N, width); kept: (2, k) the samples that each branch runs on, none: all (see `add_branch`)."""
        first, second = (None, None) if kept is None else kept
        x = add_branch(x, lambda t: self.scale1(self.attention(self.norm1(t), rope)), first)
        return add_branch(x, lambda t: self.scale2(self.mlp(self.norm2(t))), second)


def add_branch(x: Tensor, branch: Any, kept: Tensor | None) -> Tensor:
    """x + branch(x); or, on k of the B samples only, x + B / k · branch(x): stochastic depth that saves the work (DINOv2)."""
    if kept is None:
        return x + branch(x)
    change = branch(x[kept]).to(x.dtype)
    return x.index_add(0, kept, change, alpha=x.shape[0] / kept.shape[0])


class RotaryBlocks(BlockStack):
    """Blocks and a norm, over the tokens of a grid, with `prefix` tokens without a place before them."""

    prefix = 0

    def __init__(self, cfg: BlocksConfig):
        """Raises ValueError if the sizes do not fit."""
        super().__init__()
        if (wrong := check_blocks(cfg)) is not None:
            raise ValueError(wrong)
        self.rotary, self.width, self.depth, self.head_dim = cfg.rotary, cfg.width, cfg.depth, cfg.width // cfg.heads
        self.blocks = nn.ModuleList(RotaryBlock(cfg) for _ in range(cfg.depth))
        self.norm = build_norm(cfg.norm, cfg.width, NORM_EPS[cfg.norm])

    def table(self, rows: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
        """The rotary table of a grid, (prefix + rows·cols, 2·head width)."""
        types = (PRECISIONS[self.rotary.periods], PRECISIONS[self.rotary.coordinates])
        return centred_table(self.head_dim, rows, cols, device, self.prefix, *types)

    def outputs(
        self, x: Tensor, grid: tuple[int, int], kept: Tensor | None = None, only: frozenset[int] | None = None
    ) -> list[Tensor]:
        """What the blocks of these numbers (none: the last) give, before the norm, from x (B, prefix + rows·cols, width).

        kept: (depth, 2, k) samples that each residual branch runs on; none: all.
        """
        wanted = frozenset({self.depth - 1}) if only is None else only
        rope, found = self.table(*grid, x.device), []
        x = x.to(next(self.norm.parameters()).dtype)      # under autocast the sum of the branches stays float32
        for number, block in enumerate(self.blocks[: max(wanted) + 1]):
            given: Any = (rope, None if kept is None else kept[number])
            x = self.run(block, x, *given)
            if number in wanted:
                found.append(x)
        return found


class RotaryViT(RotaryBlocks):
    """Patches and a class token through the blocks. Positions are rotary: images of any multiple of the patch go in."""

    prefix = 1

    def __init__(self, cfg: BlocksConfig, patch: int):
        super().__init__(cfg)
        self.patch = patch
        self.class_token = nn.Parameter(torch.empty(1, 1, cfg.width).normal_(std=INIT_STD))
        self.mask_token = nn.Parameter(torch.zeros(1, cfg.width))
        self.embed = PatchEmbed(3, cfg.width, patch)      # torch's initialisation: uniform, ±1 / √(3 · patch²)
        self.blocks.apply(init_linear)

    def tokens(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 1 + N, width) before the blocks. mask: (B, N) bool, true where the mask token stands instead of the patch."""
        x = self.embed(pixels.to(self.embed.weight.dtype))                                  # (B, N, width)
        first = self.class_token.expand(x.shape[0], -1, -1)
        if mask is None:
            first = first + 0 * self.mask_token      # which thus always has a gradient
        else:
            x = torch.where(mask[..., None], self.mask_token, x)
        return torch.cat([first, x], dim=1)

    def forward(self, pixels: Tensor, mask: Tensor | None = None, kept: Tensor | None = None) -> TokenFeatures:
        """Class and patch tokens of normalised pixels (B, 3, H, W).

        mask: see `tokens`; kept: (depth, 2, k) samples that each residual branch runs on; none: all.
        """
        return self.features(self.outputs(self.tokens(pixels, mask), self.grid(pixels), kept)[0])

    def intermediate(self, pixels: Tensor, blocks: Sequence[int]) -> list[TokenFeatures]:
        """As `forward`, after each of these blocks (from 0; negative: from the end), in the order asked for."""
        places = [number % self.depth for number in blocks]
        found = dict(zip(sorted(set(places)), self.outputs(self.tokens(pixels), self.grid(pixels), only=frozenset(places))))
        return [self.features(found[place]) for place in places]

    def features(self, x: Tensor) -> TokenFeatures:
        """The final norm of what a block gives, (B, 1 + N, width)."""
        x = self.norm(x)
        return TokenFeatures(x[:, 0], x[:, 1:])

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """(rows, columns) of the images' tokens."""
        return pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
