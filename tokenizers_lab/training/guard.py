"""Steps whose losses are finite, but so large that they had better not count (VFM-VAE's training)."""

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from tokenizers_lab.settings import GuardConfig

LEAST = 1e-6      # a loss that was below this may grow as it likes


def mean_terms(logs: Sequence[Mapping[str, Tensor]], names: Sequence[str], accelerator: Accelerator) -> dict[str, float]:
    """Means of these losses, as far as they are there, over micro-batches and processes; the same on all processes."""
    there = [name for name in names if name in logs[0]]
    if not there:
        return {}
    means = torch.stack([torch.stack([one[name].detach().float() for one in logs]).mean() for name in there])
    return dict(zip(there, accelerator.reduce(means, "mean").tolist()))


def find_jump(cfg: GuardConfig, values: Mapping[str, float], last: Mapping[str, float], step: int) -> str | None:
    """What is said of a loss that is more than `cfg.jump` times its value of the step before; none: all may count."""
    if step < cfg.start:
        return None
    for name, value in values.items():
        before = last.get(name, math.inf)
        if before > LEAST and value > cfg.jump * before:
            return f"{name} is {value:.4g}, {value / before:.1f} times what it was"
    return None


def too_large(cfg: GuardConfig, terms: Mapping[str, Tensor], step: int) -> bool:
    """Whether one of the discriminators' losses on this process is above `cfg.discriminator`."""
    if not cfg.discriminator or step < cfg.start:
        return False
    return any(float(term.detach()) > cfg.discriminator for term in terms.values())
