"""Style-modulated layers of the StyleGAN family: equalised linear maps, a mapping network, modulated 1 × 1 convolutions, and the
ConvNeXt block, up-sampler and self-attention that VFM-VAE's synthesis is built of."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-8
SLOPE = 0.2                # of leaky ReLU
AVERAGE_DECAY = 0.995      # of the mapping network's moving average
ATTENTION_HEADS = 8


class GroupNorm(nn.GroupNorm):
    """torch's; but where its input needs no gradient and its weights do, channels come before positions in memory: torch's CPU
    kernel (2.11) otherwise ends the process in the backward pass. A group of one value becomes its bias, as for a batch of two;
    torch's module refuses it, of one image at the smallest size, in eval mode too."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, channels, ...)."""
        frozen_below = self.weight.requires_grad and not input.requires_grad and torch.is_grad_enabled()
        given = input.contiguous() if frozen_below else input
        return torch.group_norm(given, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm of so many groups, at least one. Raises ValueError if they do not divide the channels."""
    groups = max(1, groups)
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be normalised in {groups} groups")
    return GroupNorm(groups, channels)


class EqualisedLinear(nn.Module):
    """x · (weight · rate/√width)ᵀ + bias · rate: weights of unit variance that all learn at one rate (Karras et al. 2018)."""

    def __init__(self, width: int, width_out: int, rate: float = 1.0, bias: float = 0.0):
        super().__init__()
        self.rate, self.gain = rate, rate / math.sqrt(width)
        self.weight = nn.Parameter(torch.randn(width_out, width) / rate)
        self.bias = nn.Parameter(torch.full((width_out,), float(bias)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width). Returns (..., width_out)."""
        return F.linear(x, self.weight * self.gain, self.bias * self.rate)


class MappingNetwork(nn.Module):
    """A vector on the unit sphere (in root mean square) through two equalised layers to the style code.

    `average` is a moving average of the codes seen in training, towards which a sampler may truncate.
    """

    average: Tensor

    def __init__(self, width: int, width_out: int, rate: float = 0.01):
        super().__init__()
        self.fc0, self.fc1 = EqualisedLinear(width, width, rate), EqualisedLinear(width, width_out, rate)
        self.register_buffer("average", torch.zeros(width_out))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, width). Returns (B, width_out)."""
        wide = x if x.dtype == torch.float64 else x.float()
        x = (wide * (wide.square().mean(1, keepdim=True) + EPS).rsqrt()).to(x.dtype)
        code = self.fc1(F.leaky_relu(self.fc0(x), SLOPE))
        if self.training:
            with torch.no_grad():
                self.average.lerp_(code.detach().mean(0).to(self.average), 1 - AVERAGE_DECAY)
        return code


class Style(nn.Module):
    """Style of each channel from the code: m1 · m2 + m3 of three equalised maps (StyleGAN-T); about 2 at the start."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.proj = EqualisedLinear(width, 3 * channels, bias=1.0)

    def forward(self, code: Tensor) -> Tensor:
        """code: (B, width). Returns (B, channels)."""
        m1, m2, m3 = self.proj(code).chunk(3, dim=1)
        return m1 * m2 + m3


class ModulatedPointwise(nn.Module):
    """1 × 1 convolution whose weight is scaled by a style for each input channel, then normalised for each output channel."""

    def __init__(self, channels: int, channels_out: int, demodulate: bool = True):
        super().__init__()
        self.demodulate = demodulate
        self.weight = nn.Parameter(torch.empty(channels_out, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels_out, 1, 1))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x: (B, channels, h, w); style: (B, channels)."""
        y = F.conv2d(x * style[:, :, None, None].to(x.dtype), self.weight)
        if self.demodulate:      # Σ_c (W · style)² of each sample and output channel, in float32 or wider
            wide = torch.promote_types(torch.float32, self.weight.dtype)
            with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
                squares = F.linear(style.to(wide).square(), self.weight.flatten(1).to(wide).square())
                scale = (squares + EPS).rsqrt()
            y = y * scale[:, :, None, None].to(y.dtype)
        return y + self.bias.to(y.dtype)


class ModulatedConvNeXt(nn.Module):
    """x + gamma · (depthwise → group norm → modulated 1 × 1 to four times the width → GELU → 1 × 1).

    noise: side of a fixed noise map that is part of the weights and added after the depthwise convolution (0: none); such maps
    are in the released weights of VFM-VAE, by mistake as its authors say.
    """

    noise_const: Tensor

    def __init__(self, channels: int, code: int, kernel: int, noise: int = 0):
        super().__init__()
        self.affine = Style(code, channels)
        self.dwconv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = group_norm(channels, min(32, channels // 4))
        self.pwconv1 = ModulatedPointwise(channels, 4 * channels)
        self.pwconv2 = nn.Conv2d(4 * channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5))
        self.noisy = noise > 0
        if self.noisy:
            self.register_buffer("noise_const", torch.randn(noise, noise))
            self.noise_strength = nn.Parameter(torch.zeros(()))
        for conv in (self.dwconv, self.pwconv2):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)      # type: ignore[arg-type]

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x: (B, channels, h, w); code: (B, width of the code)."""
        y = self.dwconv(x)
        if self.noisy:
            noise = (self.noise_const * self.noise_strength)[None, None]
            if tuple(noise.shape[2:]) != tuple(y.shape[2:]):
                noise = F.interpolate(noise, tuple(y.shape[2:]), mode="bilinear", align_corners=False)
            y = y + noise.to(y.dtype)
        y = self.pwconv1(self.norm(y), self.affine(code))
        return x + self.gamma * self.pwconv2(F.gelu(y))


class ToImage(nn.Module):
    """Features to an image by a modulated 1 × 1 convolution without normalisation."""

    def __init__(self, channels: int, code: int, colours: int = 3):
        super().__init__()
        self.affine = Style(code, channels)
        self.conv = ModulatedPointwise(channels, colours, demodulate=False)
        self.gain = channels**-0.5
        nn.init.normal_(self.conv.weight, std=0.1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x: (B, channels, h, w). Returns (B, colours, h, w)."""
        return self.conv(x, self.affine(code) * self.gain)


class Upsample(nn.Module):
    """Twice the size: depthwise and pointwise convolution, pixel shuffle, then a binomial blur of `blur` taps (0: none).

    The group norm comes first, or with `norm_last` behind the shuffle.
    """

    blur_weight: Tensor

    def __init__(self, channels: int, channels_out: int, blur: int = 3, norm_last: bool = False):
        super().__init__()
        self.norm_last, self.blur = norm_last, blur
        normed = channels_out if norm_last else channels
        self.norm = group_norm(normed, min(32, normed // 4))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, 4 * channels_out, 1, bias=False)
        if blur:
            taps = torch.tensor([math.comb(blur - 1, i) for i in range(blur)], dtype=torch.float32)
            kernel = torch.outer(taps, taps)
            self.register_buffer("blur_weight", (kernel / kernel.sum()).expand(channels_out, 1, blur, blur).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, h, w). Returns (B, channels_out, 2h, 2w)."""
        if not self.norm_last:
            x = self.norm(x)
        x = F.pixel_shuffle(self.pointwise(self.depthwise(x)), 2)
        if self.norm_last:
            x = self.norm(x)
        if not self.blur:
            return x
        edge = self.blur // 2
        padded = F.pad(x, (edge, edge, edge, edge), mode="replicate")
        return F.conv2d(padded, self.blur_weight.to(x.dtype), groups=x.shape[1])


class ChannelRMSNorm(nn.Module):
    """x / ‖x‖₂ over the channels · √channels · gamma."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, h, w)."""
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5) * self.gamma


class MapAttention(nn.Module):
    """Self-attention over all positions of a map and one learned key and value more."""

    def __init__(self, channels: int, heads: int = ATTENTION_HEADS):
        super().__init__()
        self.heads = heads
        self.norm = ChannelRMSNorm(channels)
        inner = heads * (channels // heads)
        self.to_q, self.to_k, self.to_v = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3))
        self.to_out = nn.Conv2d(inner, channels, 1, bias=False)
        self.null_kv = nn.Parameter(0.02 * torch.randn(2, heads, channels // heads))
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, h, w)."""
        normed = self.norm(x)
        q, k, v = (to(normed).flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)   # (B, heads, h·w, head width)
                   for to in (self.to_q, self.to_k, self.to_v))
        null_k, null_v = (t[None, :, None].expand(x.shape[0], -1, -1, -1).to(k.dtype) for t in self.null_kv)
        found = F.scaled_dot_product_attention(q, torch.cat([null_k, k], dim=2), torch.cat([null_v, v], dim=2))
        return self.to_out(found.transpose(2, 3).flatten(1, 2).unflatten(2, tuple(x.shape[2:])))


class MapTransformer(nn.Module):
    """x + attention(x), then x + feed-forward(x), on maps."""

    def __init__(self, channels: int):
        super().__init__()
        self.attn = MapAttention(channels)
        self.ff = nn.Sequential(
            ChannelRMSNorm(channels), nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1))
        nn.init.zeros_(self.ff[3].weight)      # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, h, w)."""
        x = x + self.attn(x)
        return x + self.ff(x)
