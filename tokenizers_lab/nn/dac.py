"""Encoder and decoder convolutions of the Descript audio codec (arXiv 2306.06546), non-causal as published or causal.

Every layer is exact in a padded batch: with `lengths`, what lies behind an item's end is set to 0 wherever a convolution
would see it, which is the zero padding that the item would have alone.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .streams import ConvStream, InTurn, Pointwise, Stream, Together, UpConvStream, stream_of

Length = TypeVar("Length", int, Tensor)


class Snake(nn.Module):
    """x + sin²(αx) / (α + 1e-9), one α a channel, 1 at the start (Ziyin et al. 2020). Keeps zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, T)."""
        return x + (self.alpha + 1e-9).reciprocal() * (self.alpha * x).sin().square()

    def stream(self) -> Stream:
        """It in pieces."""
        return Pointwise(self)


class Conv(nn.Conv1d):
    """A convolution over time with zero padding.

    Not causal: `padding` on both sides. Causal: (extent of the kernel − stride) on the left, and on the right what makes the
    length a multiple of the stride, so that ⌈L / stride⌉ steps leave and none of them sees a later stride.
    """

    def __init__(
        self, width_in: int, width_out: int, kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0,
        causal: bool = False,
    ):
        super().__init__(width_in, width_out, kernel, stride, 0 if causal else padding, dilation)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, width_in, L). Returns (B, width_out, out_length(L))."""
        if self.causal:
            extent = (self.kernel_size[0] - 1) * self.dilation[0] + 1
            x = F.pad(x, (extent - self.stride[0], -x.shape[-1] % self.stride[0]))
        return super().forward(x)

    def out_length(self, length: Length) -> Length:
        """Steps that leave for `length` that enter."""
        kernel, stride, dilation, padding = self.kernel_size[0], self.stride[0], self.dilation[0], int(self.padding[0])
        if self.causal:
            return -(-length // stride)
        return (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1

    def stream(self) -> Stream:
        """It in pieces."""
        padding, stride = int(self.padding[0]), self.stride[0]
        if self.causal:
            return ConvStream(self, (self.kernel_size[0] - 1) * self.dilation[0] + 1 - stride, lambda length: -length % stride)
        return ConvStream(self, padding, lambda length: padding)


class UpConv(nn.ConvTranspose1d):
    """A transposed convolution, kernel 2 · stride. Not causal: L · stride steps leave, one less for an odd stride, as in DAC.
    Causal: L · stride."""

    def __init__(self, width_in: int, width_out: int, stride: int, causal: bool = False):
        super().__init__(width_in, width_out, 2 * stride, stride, 0 if causal else -(-stride // 2))
        self.causal = causal

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x: (B, width_in, L). Returns (B, width_out, out_length(L))."""
        y = super().forward(x, output_size)
        return y[..., : -self.stride[0]] if self.causal else y

    def out_length(self, length: Length) -> Length:
        """Steps that leave for `length` that enter."""
        return length * self.stride[0] - (0 if self.causal else self.stride[0] % 2)

    def stream(self) -> Stream:
        """It in pieces."""
        return UpConvStream(self, int(self.padding[0]), self.out_length)


class Chain(nn.Sequential):
    """Layers one after another, with the lengths of a padded batch's items."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, C, L), 0 behind the items' ends; lengths: (B,), none: all items are whole. The output is 0 behind them too."""
        for layer in self:
            x = layer(x, lengths) if isinstance(layer, Chain) else layer(x)
            if lengths is not None and isinstance(layer, Conv | UpConv):
                lengths = layer.out_length(lengths)
                x = zero_behind(x, lengths)
            elif lengths is not None and isinstance(layer, Chain):
                lengths = layer.out_length(lengths)
        return x

    def out_length(self, length: Length) -> Length:
        """Steps that leave for `length` that enter."""
        for layer in self:
            if isinstance(layer, Conv | UpConv | Chain):
                length = layer.out_length(length)
        return length

    def stream(self) -> Stream:
        """All layers in pieces."""
        return InTurn([stream_of(layer) for layer in self])


class ResidualUnit(Chain):
    """Snake, dilated convolution, Snake, 1 × 1 convolution, plus the input."""

    def __init__(self, width: int, kernel: int, dilation: int, causal: bool = False):
        """Raises ValueError on an even kernel, which would change the length."""
        if kernel % 2 == 0:
            raise ValueError(f"the kernel of a residual unit must be odd, not {kernel}")
        super().__init__(
            Snake(width), conv(width, width, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2, causal=causal),
            Snake(width), conv(width, width, 1, causal=causal))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, width, L). Returns the same shape."""
        return x + super().forward(x, lengths)

    def stream(self) -> Stream:
        """It in pieces."""
        return Together([Pointwise(nn.Identity()), super().stream()], torch.add)


class EncoderBlock(Chain):
    """Residual units, then a strided convolution that doubles the width."""

    def __init__(self, width: int, stride: int, kernel: int, dilations: Sequence[int], causal: bool = False):
        units = [ResidualUnit(width, kernel, dilation, causal) for dilation in dilations]
        down = conv(width, 2 * width, 2 * stride, stride, padding=-(-stride // 2), causal=causal)
        super().__init__(*units, Snake(width), down)


class DecoderBlock(Chain):
    """A transposed convolution, then residual units."""

    def __init__(self, width_in: int, width_out: int, stride: int, kernel: int, dilations: Sequence[int], causal: bool = False):
        units = [ResidualUnit(width_out, kernel, dilation, causal) for dilation in dilations]
        super().__init__(Snake(width_in), weight_norm(UpConv(width_in, width_out, stride, causal)), *units)


class Encoder(Chain):
    """Audio (B, 1, L) to latents (B, latent, T); the width doubles at every stride."""

    def __init__(
        self, width: int, strides: Sequence[int], latent: int, kernel: int = 7, dilations: Sequence[int] = (1, 3, 9),
        causal: bool = False,
    ):
        blocks = [EncoderBlock(width << i, stride, kernel, dilations, causal) for i, stride in enumerate(strides)]
        last = width << len(strides)
        super().__init__(
            conv(1, width, 7, padding=3, causal=causal), *blocks, Snake(last), conv(last, latent, 3, padding=1, causal=causal))


class Decoder(Chain):
    """Latents (B, latent, T) to audio (B, 1, out_length(T)) in (−1, 1); the width halves, rounded down, at every stride."""

    def __init__(
        self, latent: int, width: int, strides: Sequence[int], kernel: int = 7, dilations: Sequence[int] = (1, 3, 9),
        causal: bool = False,
    ):
        blocks = [DecoderBlock(width >> i, width >> (i + 1), s, kernel, dilations, causal) for i, s in enumerate(strides)]
        last = width >> len(strides)
        super().__init__(
            conv(latent, width, 7, padding=3, causal=causal), *blocks, Snake(last), conv(last, 1, 7, padding=3, causal=causal),
            nn.Tanh())


def conv(
    width_in: int, width_out: int, kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0, causal: bool = False
) -> nn.Module:
    """A weight-normed `Conv`."""
    return weight_norm(Conv(width_in, width_out, kernel, stride, dilation, padding, causal))


def zero_behind(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, C, L) with 0 behind the first lengths[i] steps of item i."""
    return x * (torch.arange(x.shape[-1], device=x.device) < lengths.to(x.device)[:, None, None])
