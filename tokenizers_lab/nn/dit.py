"""Parts of class-conditioned diffusion transformers (DiT: Peebles and Xie 2023; SiT: Ma et al.; LightningDiT: Yao et al. 2025):
blocks and final layer that a condition modulates, embeddings of time and class, and their first weights.

A condition is one vector an image, (B, width), or one a token, (B, N, width). Tokens go row by row.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import ConfigError

from .norm import RMSNorm
from .patch import PatchEmbed
from .rope import apply_paired
from .transformer import SwiGLU

NORMS = ("rms_norm", "layer_norm")
EPS = 1e-6               # of the norms of blocks and final layer
QK_LAYER_EPS = 1e-5      # of layer norms of queries and keys, which are torch's own
FREQUENCIES = 128        # of the time embedding by sinusoids
LONGEST = 10_000.0       # its longest period over 2π
FOURIER = 256            # frequencies of the time embedding by random Fourier features
INIT_STD = 0.02          # of label tables and time embeddings


def mlp_hidden(width: int, ratio: float, swiglu: bool) -> int:
    """Hidden channels of a block's MLP: int(ratio · width), of which a SwiGLU takes two thirds, cut off after each product."""
    hidden = int(width * ratio)
    return int(2 / 3 * hidden) if swiglu else hidden


def check_heads(width: int, heads: int, rope: bool, where: str) -> None:
    """Raise ConfigError unless the width splits into the heads, and into the four parts of position tables.

    where: path of the options in front of `width` and `heads`.
    """
    if width % heads or width % 4:
        raise ConfigError(f"{where}width {width} must be a multiple of {where}heads {heads} and of 4")
    if rope and width // heads % 4:
        raise ConfigError(f"{where}width {width} over {where}heads {heads} must be a multiple of 4 for rotary positions")


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift. x: (B, N, D); shift, scale: (B, 1 or N, D)."""
    return x * (1 + scale) if shift is None else x * (1 + scale) + shift


def over_tokens(condition: Tensor) -> Tensor:
    """A condition (B, D) as (B, 1, D); one of each token (B, N, D) as it is."""
    return condition[:, None] if condition.dim() == 2 else condition


def modulated_norm(kind: str, width: int) -> nn.Module:
    """The norm in front of a modulation: RMS norm with a weight, or layer norm without weight and bias.

    Raises ValueError on another kind.
    """
    if kind == "rms_norm":
        return RMSNorm(width, EPS)
    if kind == "layer_norm":
        return nn.LayerNorm(width, EPS, elementwise_affine=False)
    raise ValueError(f"unknown norm '{kind}'; known: {', '.join(NORMS)}")


class GELUMLP(nn.Module):
    """Linear, GELU in its tanh form, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTAttention(nn.Module):
    """Full self-attention; queries and keys are optionally normalised a head, then turned by a rotary table if there is one."""

    def __init__(self, width: int, heads: int, norm: str = "rms_norm", qk_norm: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm, self.k_norm = (self._norm(width // heads, norm, qk_norm) for _ in range(2))

    @staticmethod
    def _norm(width: int, kind: str, on: bool) -> nn.Module:
        if not on:
            return nn.Identity()
        return RMSNorm(width, EPS) if kind == "rms_norm" else nn.LayerNorm(width, QK_LAYER_EPS)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised, and values of x (B, N, width): each (B, heads, N, head width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> Tensor:
        """(B, N, width), heads one after the other, before the output projection."""
        if rope is not None:
            q, k = apply_paired(q, rope), apply_paired(k, rope)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """x: (B, N, width); rope: (N, 2 · head width), see nn/rope.py."""
        return self.out(self.attend(*self.project(x), rope))


class DiTBlock(nn.Module):
    """x + gate · attention(modulated norm(x)), then x + gate · MLP(modulated norm(x)).

    Linear(SiLU(condition)) gives shift, scale and gate of the attention, then those of the MLP; without `shifts` only scale and
    gate of each. The gates start at 0 (`init_dit`), so a block starts as the identity.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, norm: str = "rms_norm", qk_norm: bool = False, swiglu: bool = True,
        shifts: bool = True,
    ):
        """hidden: channels inside the MLP, see `mlp_hidden`. norm: rms_norm or layer_norm, also of queries and keys."""
        super().__init__()
        self.shifts = shifts
        self.norm1, self.norm2 = modulated_norm(norm, width), modulated_norm(norm, width)
        self.attn = DiTAttention(width, heads, norm, qk_norm)
        self.mlp = SwiGLU(width, hidden) if swiglu else GELUMLP(width, hidden)
        self.modulation = nn.Linear(width, (6 if shifts else 4) * width)

    def modulations(self, condition: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Shift, scale and gate of the attention, shift, scale and gate of the MLP: (B, 1 or N, width) each."""
        made = self.modulation(F.silu(over_tokens(condition)))
        if self.shifts:
            shift1, scale1, gate1, shift2, scale2, gate2 = made.chunk(6, dim=-1)
            return shift1, scale1, gate1, shift2, scale2, gate2
        scale1, gate1, scale2, gate2 = made.chunk(4, dim=-1)
        return None, scale1, gate1, None, scale2, gate2

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor | None = None) -> Tensor:
        """x: (B, N, width); condition: (B, width) or (B, N, width); rope: (N, 2 · head width) or none."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulations(condition)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm (shift, scale), then a linear map to what a token stands for."""

    def __init__(self, width: int, out: int, norm: str = "rms_norm"):
        super().__init__()
        self.norm = modulated_norm(norm, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)

    def modulated(self, x: Tensor, condition: Tensor) -> Tensor:
        """The modulated norm of x (B, N, width)."""
        shift, scale = self.modulation(F.silu(over_tokens(condition))).chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: (B, N, width); condition: (B, width) or (B, N, width). Returns (B, N, out)."""
        return self.linear(self.modulated(x, condition))


class LabelEmbedding(nn.Embedding):
    """A vector for each class; the last row is no class, where there is such a row."""

    def __init__(self, classes: int, width: int, unconditional: bool = True):
        super().__init__(classes + unconditional, width)


class TimeEmbedding(nn.Module):
    """Cosines, then sines of the time at fixed frequencies, then linear, SiLU, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, time: Tensor) -> Tensor:
        """(B, 2 · FREQUENCIES) of times (B,), float32: half precision would lose the time."""
        index = torch.arange(FREQUENCIES, device=time.device, dtype=torch.float32)
        angles = time.float()[:, None] * torch.exp(-math.log(LONGEST) * index / FREQUENCIES)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, time: Tensor) -> Tensor:
        """time: (B,), in whatever unit the network was trained in. Returns (B, width)."""
        return self.mlp(self.features(time).to(next(self.mlp.parameters()).dtype))


class FourierTimeEmbedding(nn.Module):
    """Sines, then cosines of 2π · t · W, then linear, SiLU, linear. W: random frequencies that stay as drawn (Tancik et al.
    2020), a parameter without gradients since it belongs to the weights."""

    def __init__(self, width: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(FOURIER), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * FOURIER, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, time: Tensor) -> Tensor:
        """(B, 2 · FOURIER) of times (B,), float32 or wider."""
        wide = torch.promote_types(torch.float32, self.frequencies.dtype)
        angles = time.to(wide)[:, None] * self.frequencies.to(wide) * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, time: Tensor) -> Tensor:
        """time: (B,) in [0, 1]. Returns (B, width)."""
        return self.mlp(self.features(time).to(next(self.mlp.parameters()).dtype))


@torch.no_grad()
def init_dit(network: nn.Module, xavier: bool = True) -> None:
    """First weights of a diffusion transformer, in place: its blocks are the identity and its output is 0.

    Patch embeddings are Xavier-uniform over the flattened patch, label tables and time embeddings N(0, 0.02²), modulations and
    final linear maps 0. Every other linear map is Xavier-uniform with bias 0 (DiT, LightningDiT), or without `xavier`
    torch's own, as the time embeddings' biases are then (DiT-DH).
    """
    for module in network.modules():
        if xavier and isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, PatchEmbed):
            nn.init.xavier_uniform_(module.weight.flatten(1))      # a view
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        elif isinstance(module, TimeEmbedding | FourierTimeEmbedding):
            for layer in module.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=INIT_STD)
        elif isinstance(module, DiTBlock | FinalLayer):
            zeros = [module.modulation, module.linear] if isinstance(module, FinalLayer) else [module.modulation]
            for linear in zeros:
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
