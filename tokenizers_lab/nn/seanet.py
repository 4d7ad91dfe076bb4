"""SEANet encoder and decoder (Tagliasacchi et al. 2020) as in EnCodec: 1-D convolutions, residual blocks, an LSTM."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .dac import Snake
from .streams import ConvStream, InTurn, Pointwise, Stream, Together, UpConvStream, lstm_stream, stream_of

Activation = Literal["elu", "snake"]
KERNEL = 7      # of the first and the last convolution


def pad1d(x: Tensor, left: int, right: int, mode: str = "reflect") -> Tensor:
    """Pad x (B, C, T). Where T is too short to be reflected, zeros make it long enough first and are cut off again."""
    missing = max(left, right) - x.shape[-1] + 1 if mode == "reflect" else 0
    if missing > 0:
        padded = F.pad(F.pad(x, (0, missing)), (left, right), mode)
        return padded[..., : padded.shape[-1] - missing]
    return F.pad(x, (left, right), mode)


class Conv1d(nn.Module):
    """Weight-normed convolution whose output has ceil(T / stride) frames.

    Causal: all padding but what completes the last window is on the left; else half of it, the larger part on the left.
    """

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int = 1, dilation: int = 1, causal: bool = False,
        mode: str = "reflect",
    ):
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(channels, out, kernel, stride, dilation=dilation))
        self.stride, self.causal, self.mode = stride, causal, mode
        self.span = (kernel - 1) * dilation + 1                       # samples that one output sees
        self.overlap = self.span - stride

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T)."""
        right = 0 if self.causal else self.overlap // 2
        extra = -x.shape[-1] % self.stride                            # completes the last window
        return self.conv(pad1d(x, self.overlap - right, right + extra, self.mode))

    def stream(self) -> Stream:
        """It in pieces."""
        right = 0 if self.causal else self.overlap // 2
        left, stride, mode = self.overlap - right, self.stride, self.mode
        return ConvStream(
            self.conv, left, lambda length: right + -length % stride, lambda x, left, right: pad1d(x, left, right, mode),
            max(left, right + stride - 1) if mode == "reflect" else 0)


class ConvTranspose1d(nn.Module):
    """Weight-normed transposed convolution whose output has T · stride frames. The norm is per input channel.

    Surplus samples are cut: half on the right, the rest on the left; all on the right if causal.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, causal: bool = False):
        super().__init__()
        self.convtr = weight_norm(nn.ConvTranspose1d(channels, out, kernel, stride))
        surplus = kernel - stride
        self.left = 0 if causal else surplus - surplus // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T)."""
        return self.convtr(x)[..., self.left : self.left + x.shape[-1] * self.stride]

    def stream(self) -> Stream:
        """It in pieces."""
        stride = self.stride
        return UpConvStream(self.convtr, self.left, lambda length: length * stride)


class SkipLSTM(nn.Module):
    """LSTM as wide as its input, plus the input; bidirectional, it doubles the channels, the input being added to both halves."""

    def __init__(self, width: int, layers: int, bidirectional: bool = False):
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T)."""
        x = x.permute(2, 0, 1)                                                   # (T, B, C)
        y, _ = self.lstm(x)
        return (y + (torch.cat([x, x], -1) if self.lstm.bidirectional else x)).permute(1, 2, 0)

    def stream(self, ahead: int = 100) -> Stream:
        """It in pieces; exact if it has one direction. Of two, each layer's backward one starts `ahead` steps behind an output,
        which is not exact."""
        both = self.lstm.bidirectional
        return Together(
            [Pointwise(nn.Identity()), lstm_stream(self.lstm, ahead)], lambda x, y: y + (torch.cat([x, x], 1) if both else x))


class ResidualBlock(nn.Module):
    """shortcut(x) + a branch of half the width: a dilated convolution, then one of kernel 1."""

    def __init__(self, width: int, kernel: int, dilation: int, activation: Activation, causal: bool, mode: str):
        super().__init__()
        half = width // 2
        self.block = nn.Sequential(
            build_activation(activation, width),
            Conv1d(width, half, kernel, dilation=dilation, causal=causal, mode=mode),
            build_activation(activation, half),
            Conv1d(half, width, 1, causal=causal, mode=mode),
        )
        self.shortcut = Conv1d(width, width, 1, causal=causal, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T)."""
        return self.shortcut(x) + self.block(x)

    def stream(self) -> Stream:
        """It in pieces."""
        return Together([stream_of(self.shortcut), stream_of(self.block)], torch.add)


def build_activation(name: Activation, channels: int) -> nn.Module:
    """The module of an activation's name."""
    return Snake(channels) if name == "snake" else nn.ELU()


class SEANetEncoder(nn.Module):
    """Waveform (B, 1, T) to features (B, width, ceil(T / hop)); `strides` in the decoder's order, the hop is their product."""

    def __init__(
        self, width: int, filters: int = 64, strides: Sequence[int] = (8, 5, 4, 2), residual_layers: int = 1,
        residual_kernel: int = 3, dilation_base: int = 2, lstm_layers: int = 2, bidirectional: bool = False,
        activation: Activation = "elu", causal: bool = False, mode: str = "reflect", channels: int = 1,
    ):
        super().__init__()
        model: list[nn.Module] = [Conv1d(channels, filters, KERNEL, causal=causal, mode=mode)]
        c = filters
        for stride in reversed(strides):
            for j in range(residual_layers):
                model.append(ResidualBlock(c, residual_kernel, dilation_base**j, activation, causal, mode))
            model += [build_activation(activation, c), Conv1d(c, 2 * c, 2 * stride, stride, causal=causal, mode=mode)]
            c *= 2
        if lstm_layers:
            model.append(SkipLSTM(c, lstm_layers, bidirectional))
            c *= 2 if bidirectional else 1
        model += [build_activation(activation, c), Conv1d(c, width, KERNEL, causal=causal, mode=mode)]
        self.model = nn.Sequential(*model)

    def forward(self, audio: Tensor) -> Tensor:
        """audio: (B, channels, T)."""
        return self.model(audio)

    def stream(self, ahead: int = 100) -> Stream:
        """It in pieces; ahead: see SkipLSTM."""
        return InTurn([layer.stream(ahead) if isinstance(layer, SkipLSTM) else stream_of(layer) for layer in self.model])


class SEANetDecoder(nn.Module):
    """Features (B, width, T) to a waveform (B, 1, T · hop), not limited in range. Its LSTM has one direction."""

    def __init__(
        self, width: int, filters: int = 64, strides: Sequence[int] = (8, 5, 4, 2), residual_layers: int = 1,
        residual_kernel: int = 3, dilation_base: int = 2, lstm_layers: int = 2, activation: Activation = "elu",
        causal: bool = False, mode: str = "reflect", channels: int = 1,
    ):
        super().__init__()
        c = filters * 2 ** len(strides)
        model: list[nn.Module] = [Conv1d(width, c, KERNEL, causal=causal, mode=mode)]
        if lstm_layers:
            model.append(SkipLSTM(c, lstm_layers))
        for stride in strides:
            model += [build_activation(activation, c), ConvTranspose1d(c, c // 2, 2 * stride, stride, causal=causal)]
            c //= 2
            for j in range(residual_layers):
                model.append(ResidualBlock(c, residual_kernel, dilation_base**j, activation, causal, mode))
        model += [build_activation(activation, c), Conv1d(c, channels, KERNEL, causal=causal, mode=mode)]
        self.model = nn.Sequential(*model)

    def forward(self, features: Tensor) -> Tensor:
        """features: (B, width, T)."""
        return self.model(features)

    def stream(self) -> Stream:
        """It in pieces."""
        return stream_of(self.model)
