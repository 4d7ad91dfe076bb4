"""A change of the sample rate as julius defines it (for torchaudio's, see `data/resample.py`). Differentiable."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

ZEROS, ROLLOFF = 24, 0.945


def resample_julius(audio: Tensor, rate: int, new_rate: int) -> Tensor:
    """Audio (..., L) at `rate` Hz to (..., ⌊L · new_rate / rate⌋) at `new_rate`, as julius.resample_frac does.

    Sinc of 24 zero crossings under cos², cut-off at 0.945 of the lower Nyquist frequency, kernels of sum 1, the edges
    repeated. DAC's multi-scale discriminators hear their input through it. Raises ValueError on a rate below 1.
    """
    if min(rate, new_rate) < 1:
        raise ValueError(f"sample rates must be positive, not {rate} and {new_rate}")
    if rate == new_rate:
        return audio
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    kernels = _kernels(old, new).to(audio)                                   # (new, 1, 2 · width + old)
    width = (kernels.shape[-1] - old) // 2
    flat = F.pad(audio.reshape(-1, 1, audio.shape[-1]), (width, width + old), mode="replicate")
    phases = F.conv1d(flat, kernels, stride=old)                             # (N, new, steps)
    return phases.transpose(1, 2).reshape(*audio.shape[:-1], -1)[..., : audio.shape[-1] * new // old]


@lru_cache(maxsize=32)
def _kernels(old: int, new: int) -> Tensor:
    """One kernel for each of the `new` phases, float32 (new, 1, taps), computed in float64."""
    cutoff = min(old, new) * ROLLOFF
    width = math.ceil(ZEROS * old / cutoff)
    with torch.inference_mode(False), torch.device("cpu"):      # the cache must serve training too
        taps = torch.arange(-width, width + old, dtype=torch.float64) / old
        time = (taps - torch.arange(new, dtype=torch.float64)[:, None] / new) * cutoff
        time = time.clamp(-ZEROS, ZEROS)
        kernels = torch.sinc(time) * (math.pi * time / ZEROS / 2).cos().square()
        return (kernels / kernels.sum(-1, keepdim=True))[:, None].float()
