"""Transformers over mel frames (arXiv 2508.16790, sec. 3): an encoder, and a flow's network that reads text, codes and time.

Llama's blocks without a causal mask: RMS norms without weights, rotary positions by halves, gated MLPs, no biases. In the flow's
network every norm is scaled by the time embedding. Text stands before the frames as a prefix.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.diffusion.flow import frame_mask
from tokenizers_lab.nn.rope import apply_by_halves, rotary_table
from tokenizers_lab.nn.transformer import BlockStack

NORM_EPS, INIT_STD, MLP_RATIO = 1e-6, 0.02, 4


class ScaledNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) over the last axis; times a scale made of the time embedding, if it is timed."""

    def __init__(self, width: int, timed: bool):
        super().__init__()
        self.width = width
        self.to_scale = nn.Linear(width, width) if timed else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: (B, N, width); time: (B, width), where it is timed. Returns x's shape and type; half precision is left inside."""
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        normed = F.rms_norm(wide, (self.width,), None, NORM_EPS).to(x.dtype)
        return normed if self.to_scale is None else normed * self.to_scale(time)[:, None]


class Attention(nn.Module):
    """Self-attention of all to all."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, N, width); mask: (B, 1, 1, N) bool, true where a position is seen."""
        # each (B, heads, N, d)
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(apply_by_halves(q, table), apply_by_halves(k, table), v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, MLP_RATIO * width, bias=False) for _ in range(2))
        self.down = nn.Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, timed: bool):
        super().__init__()
        self.attention_norm = ScaledNorm(width, timed)
        self.attention = Attention(width, heads)
        self.mlp_norm = ScaledNorm(width, timed)
        self.mlp = GatedMLP(width)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, time: Tensor | None) -> Tensor:
        """x: (B, N, width); see Tower."""
        x = x + self.attention(self.attention_norm(x, time), table, mask)
        return x + self.mlp(self.mlp_norm(x, time))


class Tower(BlockStack):
    """Layers and a norm."""

    def __init__(self, width: int, layers: int, heads: int, timed: bool = False):
        """Raises ValueError if heads of even width do not fit."""
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width {width} does not make {heads} heads of an even width")
        self.head_dim = width // heads
        self.layers = nn.ModuleList(Layer(width, heads, timed) for _ in range(layers))
        self.norm = ScaledNorm(width, timed)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """x: (B, N, width); positions: (N,) or (B, N); mask: (B, N) bool, true where a position is seen, none: all are; time:
        (B, width) the embedding, for timed towers. What is not seen is computed, and says nothing."""
        seen = None if mask is None else mask[:, None, None]
        given: Any = (rotary_table(positions, self.head_dim), seen, time)
        for layer in self.layers:
            x = self.run(layer, x, *given)
        return self.norm(x, time)


class MelEncoder(nn.Module):
    """Mel frames (B, T, bands) to hidden states (B, T, width)."""

    def __init__(self, bands: int, width: int, layers: int, heads: int):
        super().__init__()
        self.inward = nn.Linear(bands, width)
        self.tower = Tower(width, layers, heads)
        self.apply(init_weights)

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """mel: (B, T, bands); mask: (B, T) bool, true where a frame is sound; none: all are."""
        return self.tower(self.inward(mel), torch.arange(mel.shape[1], device=mel.device), mask)


class FlowDecoder(nn.Module):
    """The velocity of a flow over mel frames, given a condition for each frame, and a text."""

    def __init__(self, bands: int, width: int, layers: int, heads: int, text: bool = True, identity_norms: bool = False):
        """text: whether it reads any. identity_norms: the norms' scale is 1 at first; else about N(0, 0.02² · width · e²), e
        the time embedding's size."""
        super().__init__()
        self.width = width
        self.inward = nn.Linear(bands, width)
        self.text_mlp = small_mlp(width) if text else None
        self.time_mlp = small_mlp(width)
        self.condition_mlp = small_mlp(width)
        self.tower = Tower(width, layers, heads, timed=True)
        self.out = nn.Linear(width, bands)
        self.apply(init_weights)
        if identity_norms:
            for module in self.modules():
                if isinstance(module, ScaledNorm) and module.to_scale is not None:
                    nn.init.zeros_(module.to_scale.weight)
                    nn.init.ones_(module.to_scale.bias)

    def embed_time(self, time: Tensor) -> Tensor:
        """The time embedding (B, width) of times (B,) in [0, 1]."""
        return self.time_mlp(sinusoidal(time, self.width).to(self.inward.weight.dtype))

    def forward(
        self, x: Tensor, time: Tensor, condition: Tensor, mask: Tensor | None = None, text: Tensor | None = None,
        text_lengths: Tensor | None = None, text_padding_counts: bool = False,
    ) -> Tensor:
        """The velocity (B, T, bands) at x (B, T, bands) and times (B,).

        condition: (B, T, width); zeros are a condition too (its MLP has biases). mask: (B, T) bool, true where a frame is
        sound; none: all are. text: (B, L, width) embedded, text_lengths (B,) of which are real; none: no prefix.
        Positions count the text, then the frames from there on. text_padding_counts: frames stand behind the longest text of
        the batch, as in TaDiCodec's code, so that an item depends on its batch.
        """
        frames = x.shape[1]
        x = self.inward(x) + self.condition_mlp(condition)
        positions, length = torch.arange(frames, device=x.device), 0
        if text is not None and text.shape[1]:
            assert self.text_mlp is not None and text_lengths is not None
            length = text.shape[1]
            x = torch.cat([self.text_mlp(text).to(x.dtype), x], dim=1)                       # (B, L + T, width)
            if mask is None:
                mask = torch.ones(x.shape[0], frames, dtype=torch.bool, device=x.device)
            mask = torch.cat([frame_mask(text_lengths, length), mask], dim=1)
            starts = torch.full_like(text_lengths, length) if text_padding_counts else text_lengths
            places = torch.arange(length, device=x.device).expand(x.shape[0], -1)
            positions = torch.cat([places, starts[:, None] + positions], dim=1)              # (B, L + T)
        return self.out(self.tower(x, positions, mask, self.embed_time(time))[:, length:])


def sinusoidal(time: Tensor, width: int) -> Tensor:
    """(B, width) sines, then cosines, of times (B,) at width / 2 frequencies from 1 down to 1/10,000, float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=time.device) * (-math.log(10_000) / (half - 1)))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def small_mlp(width: int) -> nn.Sequential:
    """Linear, SiLU, linear."""
    return nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.SiLU(), nn.Linear(MLP_RATIO * width, width))


def init_weights(module: nn.Module) -> None:
    """Linear layers and embeddings: normal of deviation 0.02, biases 0 (TaDiCodec's)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
