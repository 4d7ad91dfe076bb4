"""Transformer stacks of Whisper's shape (Radford et al. 2022): pre-norm layers over a table of sinusoids, with masks.

Modules and parameters have the names of transformers' `WhisperEncoder`, so that its weights fit key for key; only its
`embed_positions.weight` is our `positional_embedding`. Keys behind an item's end are masked: an item of a padded batch comes
out as if it were alone.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.errors import CheckpointError

from .transformer import BlockStack

STRIDE = 2      # mel frames of a token
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu,
}
TABLE, WHISPER_TABLE = "positional_embedding", "embed_positions.weight"


def sinusoids(positions: int, width: int) -> Tensor:
    """Whisper's table (positions, width), float32: sines of width / 2 frequencies from 1 to 1 / 10,000, then cosines."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, dtype=torch.float32))
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * rates                    # (positions, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def valid_tokens(lengths: Tensor | None, tokens: int) -> Tensor | None:
    """(B, tokens) bool, true before each item's end; none without lengths."""
    return None if lengths is None else torch.arange(tokens, device=lengths.device) < lengths[:, None]


class WhisperAttention(nn.Module):
    """Full self-attention; keys have no bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, T, width). mask: (B, 1, 1, T) bool, true where a key counts."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class WhisperLayer(nn.Module):
    """x + attention(norm(x)), then x + fc2(activation(fc1(norm(x))))."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.self_attn = WhisperAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, T, width). mask: see WhisperAttention."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        x = x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        if x.dtype == torch.float16:      # as in Whisper: it overflows there
            x = x.clamp(-torch.finfo(x.dtype).max + 1000, torch.finfo(x.dtype).max - 1000)
        return x


class WhisperStack(BlockStack):
    """Positions, layers, norm; 0 behind an item's end."""

    positional_embedding: Tensor

    def __init__(self, width: int, layers: int, heads: int, hidden: int, positions: int, activation: str = "gelu"):
        """positions: tokens of the longest input."""
        super().__init__()
        self.register_buffer(TABLE, sinusoids(positions, width))
        self.layers = nn.ModuleList(WhisperLayer(width, heads, hidden, activation) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)

    def attend(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, T, width); lengths: (B,) tokens of each item, none: all T. Returns the same shape.

        Raises ValueError if there are more tokens than positions.
        """
        tokens = x.shape[1]
        if tokens > len(self.positional_embedding):
            raise ValueError(f"{tokens} tokens, but the table has {len(self.positional_embedding)} positions")
        x = (x + self.positional_embedding[:tokens]).to(x.dtype)
        valid = valid_tokens(lengths, tokens)
        # an item without tokens attends to the first one: softmax over nothing would be NaN
        mask = () if lengths is None else (valid_tokens(lengths.clamp_min(1), tokens)[:, None, None],)      # type: ignore[index]
        for layer in self.layers:
            x = self.run(layer, x, *mask)
        x = self.layer_norm(x)
        return x if valid is None else x * valid[..., None]


class WhisperEncoder(WhisperStack):
    """Log-mels to tokens, 50 a second."""

    def __init__(self, bands: int, width: int, layers: int, heads: int, hidden: int, positions: int, activation: str = "gelu"):
        super().__init__(width, layers, heads, hidden, positions, activation)
        self.conv1 = nn.Conv1d(bands, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, STRIDE, padding=1)

    def forward(self, mel: Tensor, lengths: Tensor | None = None, tokens: int | None = None) -> Tensor:
        """Tokens (B, T, width) of log-mels (B, bands, F), 0 behind `lengths` (B,) tokens.

        tokens: only the first T of the F / 2. The convolutions see the mel frame behind an item's end, as in Whisper, whose
        windows are padded to 30 s: F = 2 · T + 2 frames give what a longer padding gives.
        """
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel.to(self.conv1.weight.dtype))))).transpose(1, 2)      # (B, F / 2, width)
        return self.attend(x if tokens is None else x[:, :tokens], lengths)


class WhisperAdapter(WhisperStack):
    """Tokens to tokens of the same rate, with a linear layer at either end where the width changes."""

    def __init__(
        self, width_in: int, width_out: int, width: int, layers: int, heads: int, hidden: int, positions: int,
        activation: str = "gelu",
    ):
        super().__init__(width, layers, heads, hidden, positions, activation)
        self.proj = nn.Identity() if width_in == width else nn.Linear(width_in, width)
        self.out_proj = nn.Identity() if width_out == width else nn.Linear(width, width_out)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, T, width_in). Returns (B, T, width_out); behind an item's end it is what the last layer makes of 0."""
        return self.out_proj(self.attend(self.proj(x), lengths))


class WhisperDecoder(WhisperStack):
    """Tokens to frames of features, two for each token, each of which sees no later token but through attention."""

    def __init__(self, bands: int, width: int, layers: int, heads: int, hidden: int, positions: int, activation: str = "gelu"):
        super().__init__(width, layers, heads, hidden, positions, activation)
        self.deconv1 = nn.ConvTranspose1d(width, width, 3, STRIDE)
        self.deconv2 = nn.ConvTranspose1d(width, bands, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, bands, 2 · T) of tokens (B, T, width), with a GELU behind them; lengths: (B,) tokens of each item."""
        x = self.attend(x, lengths).transpose(1, 2)
        return F.gelu(self.deconv2(F.gelu(self.deconv1(x))))[..., : STRIDE * x.shape[2]]


def encoder_state(network: Any, positions: int) -> dict[str, Tensor]:
    """State of our encoder with so many positions from transformers' `WhisperEncoder`, whose table may be longer.

    Raises CheckpointError if it is shorter.
    """
    state: Mapping[str, Tensor] = network.state_dict()
    table = state[WHISPER_TABLE]
    if len(table) < positions:
        raise CheckpointError(f"that Whisper has {len(table)} positions, fewer than the {positions} of a window")
    found = {key: value for key, value in state.items() if key != WHISPER_TABLE}
    return found | {TABLE: table[:positions].clone()}
