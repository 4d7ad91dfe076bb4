"""Vocos (Siuzdak 2023, arXiv 2306.00814): a ConvNeXt over frames whose head says a spectrum, and the inverse STFT of that.

No layer changes the frame rate, and every layer sees a bounded stretch. In a padded batch, `lengths` sets what lies behind an
item's end to 0 wherever a convolution would see it, and leaves those frames out of the overlap-add: an item comes out as if
it were alone.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dac import zero_behind
from .streams import ConvStream, InTurn, Pointwise, Stream, Together

KERNEL = 7          # frames that a convolution sees
LOUDEST = 100.0     # magnitudes are cut here


class FrameNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, T)."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, T). Returns the same shape."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNeXtBlock(nn.Module):
    """Depth-wise convolution, norm, MLP of `hidden` channels, times a scale for each channel, plus the input."""

    def __init__(self, width: int, hidden: int, scale: float):
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = FrameNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def mlp(self, x: Tensor) -> Tensor:
        """What follows the convolution: each frame alone. x: (B, width, T)."""
        x = self.expand(self.norm(x).transpose(1, 2))                            # (B, T, hidden)
        return (self.scale * self.contract(F.gelu(x))).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, width, T). Returns the same shape."""
        return x + self.mlp(self.depthwise(x))

    def stream(self) -> Stream:
        """It in pieces."""
        return Together([Pointwise(nn.Identity()), InTurn([conv_stream(self.depthwise), Pointwise(self.mlp)])], torch.add)


class ConvNeXtBackbone(nn.Module):
    """Features (B, bands, T) to (B, width, T)."""

    def __init__(self, bands: int, width: int, hidden: int, layers: int):
        super().__init__()
        self.embed = nn.Conv1d(bands, width, KERNEL, padding=KERNEL // 2)
        self.norm = FrameNorm(width)
        self.blocks = nn.ModuleList(ConvNeXtBlock(width, hidden, 1 / layers) for _ in range(layers))
        self.last_norm = FrameNorm(width)
        self.apply(init_weights)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, bands, T). lengths: (B,) frames of each item; none: all T. Behind an item's end the output says nothing."""
        x = self.norm(self.embed(keep(x, lengths)))
        for block in self.blocks:
            x = block(keep(x, lengths))
        return self.last_norm(x)

    def stream(self) -> Stream:
        """It in pieces."""
        blocks = [block.stream() for block in self.blocks if isinstance(block, ConvNeXtBlock)]
        return InTurn([conv_stream(self.embed), Pointwise(self.norm), *blocks, Pointwise(self.last_norm)])


class ISTFT(nn.Module):
    """Inverse STFT that gives `hop` samples for each frame ("same" padding).

    It inverts the Hann STFT, not centred, of a signal with (n_fft − hop) / 2 zeros on both sides: frame t is about the samples
    t · hop … (t + 1) · hop − 1.
    """

    window: Tensor

    def __init__(self, n_fft: int, hop: int):
        """Raises ValueError unless 0 < hop < n_fft and both are even, or both odd."""
        super().__init__()
        if not 0 < hop < n_fft or (n_fft - hop) % 2:
            raise ValueError(f"n_fft − hop must be even and above 0, hop at least 1, not {n_fft} and {hop}")
        self.n_fft, self.hop, self.cut = n_fft, hop, (n_fft - hop) // 2
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def segments(self, spectrum: Tensor) -> Tensor:
        """The windowed signal (B, n_fft, T) of each frame of a complex spectrum (B, n_fft // 2 + 1, T)."""
        return torch.fft.irfft(spectrum, self.n_fft, dim=1) * self.window[:, None]

    def weights(self, frames: int) -> Tensor:
        """The squared windows (1, n_fft, frames), whose overlap-add the signal's is divided by."""
        return self.window.square()[None, :, None].expand(1, -1, frames)

    def forward(self, spectrum: Tensor, lengths: Tensor | None = None) -> Tensor:
        """spectrum: complex (B, n_fft // 2 + 1, T). Returns (B, 1, T · hop). lengths: (B,) frames; behind them there is 0."""
        segments, frames = self.segments(spectrum), spectrum.shape[2]
        weights = self.weights(frames)
        if lengths is not None:
            segments, weights = (zero_behind(x, lengths) for x in (segments, weights))
        ours = slice(self.cut, self.cut + frames * self.hop)
        audio = overlap_add(segments, self.hop)[:, ours] / overlap_add(weights, self.hop)[:, ours].clamp_min(1e-11)
        return keep(audio[:, None], None if lengths is None else lengths * self.hop)

    def stream(self) -> Stream:
        """It in pieces."""
        return InTurn([Pointwise(self.segments), OverlapAddStream(self)])


class ISTFTHead(nn.Module):
    """Frames (B, width, T) to audio (B, 1, T · hop), by log magnitude and phase of each bin. In float32 also under autocast."""

    def __init__(self, width: int, n_fft: int, hop: int):
        super().__init__()
        self.out = nn.Linear(width, n_fft // 2 * 2 + 2)      # log magnitudes, then phases
        self.istft = ISTFT(n_fft, hop)

    def spectrum(self, x: Tensor) -> Tensor:
        """The complex spectrum (B, n_fft // 2 + 1, T); no magnitude is above 100."""
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):      # the meta device knows none
            made = self.out(x.to(self.out.weight.dtype).transpose(1, 2)).transpose(1, 2)       # (B, n_fft + 2, T)
        level, phase = made.to(torch.promote_types(self.istft.window.dtype, torch.float32)).chunk(2, dim=1)
        # cut before the exponential, which could overflow and make the gradient NaN
        return torch.polar(level.clamp_max(math.log(LOUDEST)).exp(), phase)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, width, T). lengths: (B,) frames of each item; behind them the audio is 0."""
        return self.istft(self.spectrum(x), lengths)

    def stream(self) -> Stream:
        """It in pieces."""
        return InTurn([Pointwise(self.spectrum), self.istft.stream()])


class Vocos(nn.Module):
    """Mel spectrogram, or other features, (B, bands, T) to audio (B, 1, T · hop) of no fixed range."""

    def __init__(self, bands: int, width: int, hidden: int, layers: int, n_fft: int, hop: int):
        """width: channels; hidden: of the blocks' MLPs; n_fft, hop: samples. Raises ValueError on an impossible n_fft and hop."""
        super().__init__()
        self.backbone = ConvNeXtBackbone(bands, width, hidden, layers)
        self.head = ISTFTHead(width, n_fft, hop)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, bands, T). lengths: (B,) frames of each item of a padded batch; behind them the audio is 0."""
        return self.head(self.backbone(x, lengths), lengths)

    def stream(self) -> Stream:
        """It in pieces, exactly; `context_of` tells its reach: 3 frames for each convolution, and the overlap, on either side."""
        return InTurn([self.backbone.stream(), self.head.stream()])


class OverlapAddStream(Stream):
    """Segments (B, n_fft, steps) of an ISTFT to its audio (B, 1, steps · hop), in pieces."""

    def __init__(self, istft: ISTFT):
        self.istft = istft
        self.hop, self.cut = istft.hop, istft.cut
        self.skip = self.cut                   # samples that are still to be cut from the start
        self.kept: Tensor | None = None        # (B + 1, n_fft − hop): sums that later segments add to, the squared windows' last

    def push(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.add(x, 0)

    def finish(self, x: Tensor) -> Tensor:
        """See Stream."""
        return self.add(x, self.istft.n_fft - self.hop - self.cut)

    def add(self, x: Tensor, more: int) -> Tensor:
        """The audio that no later segment adds to, and `more` samples behind it."""
        end = x.shape[-1] * self.hop
        if x.shape[-1]:
            sums = overlap_add(torch.cat([x, self.istft.weights(x.shape[-1]).to(x.dtype)]), self.hop)     # (B + 1, samples)
            if self.kept is not None:
                sums[:, : self.kept.shape[1]] += self.kept
        elif self.kept is not None:
            sums = self.kept
        else:
            return x[:, :1]
        made = sums[:, self.skip : end + more]
        self.skip, self.kept = max(0, self.skip - end), sums[:, end:].clone()
        return (made[:-1] / made[-1:])[:, None]

    def needs(self, first: int, last: int) -> tuple[int, int]:
        """See Stream."""
        return -((self.istft.n_fft - 1 - first - self.cut) // self.hop), (last + self.cut) // self.hop


def overlap_add(segments: Tensor, hop: int) -> Tensor:
    """Segments (B, n, T), each `hop` samples behind the one before, summed: (B, (T − 1) · hop + n)."""
    n, frames = segments.shape[1:]
    return F.fold(segments, (1, (frames - 1) * hop + n), (1, n), stride=(1, hop))[:, 0, 0]


def keep(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, C, T), with 0 behind the items' ends if there are lengths."""
    return x if lengths is None else zero_behind(x, lengths)


def conv_stream(conv: nn.Conv1d) -> Stream:
    """The stream of a convolution with zeros on both sides."""
    padding = conv.kernel_size[0] // 2
    return ConvStream(conv, padding, lambda length: padding)


def init_weights(module: nn.Module) -> None:
    """Convolutions and linear layers: truncated normal of deviation 0.02, biases 0 (the authors')."""
    if isinstance(module, nn.Conv1d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
