"""Optimisers, learning rates and the moving average of the weights."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.schedules import half_cosine, ramp
from tokenizers_lab.settings import OptimizerConfig, StageConfig


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig, lr_scale: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that require gradients. Names with a part of `cfg.no_decay` are not decayed, nor, unless
    `cfg.decay_vectors`, vectors and scalars. The learning rate is set by the loop at every step.

    lr_scale: part of a name → factor of that rate; the first part that fits counts. Raises ConfigError on one that fits nothing.
    """
    every, scales = list(named), dict(lr_scale or {})
    for part in scales:
        if not any(part in name for name, _ in every):
            raise ConfigError(f"lr_scale: no parameter's name contains '{part}'; names are like {every[0][0]}")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in every:
        if not p.requires_grad:
            continue
        plain = (p.dim() < 2 and not cfg.decay_vectors) or any(part in name for part in cfg.no_decay)
        scale = next((factor for part, factor in scales.items() if part in name), 1.0)
        groups.setdefault((scale, plain), []).append(p)
    made = [
        {"params": params, "weight_decay": 0.0 if plain else cfg.weight_decay, "lr_scale": scale}
        for (scale, plain), params in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(made, lr=0.0, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this rate, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(stage: StageConfig, peak: float, done: float, length: float) -> float:
    """Rate after `done` of `length` (both in the stage's unit): linear warm-up from 0, then half a cosine, constant, a line
    between two points, or peak · √(warmup / done) (Vaswani et al. 2017)."""
    if done < stage.warmup:
        return peak * done / stage.warmup
    if stage.schedule == "constant":
        return peak
    if stage.schedule == "inverse_sqrt":
        return peak * math.sqrt(stage.warmup / done)
    if stage.schedule == "linear":
        start, end = max(stage.decay_from, stage.warmup), length if stage.decay_until is None else stage.decay_until
        return ramp(peak, stage.min_lr, max(done - start, 0.0) / max(end - start, 1e-12))
    share = (done - stage.warmup) / max(length - stage.warmup, 1e-12)
    return half_cosine(peak, stage.min_lr, share)


def discriminator_learning_rate(stage: StageConfig, done: float, length: float) -> float:
    """The discriminators' rate: on the generator's schedule, or on their own, which has no warm-up."""
    peak = stage.lr if stage.discriminator_lr is None else stage.discriminator_lr
    own = stage if stage.discriminator_schedule is None else replace(stage, schedule=stage.discriminator_schedule, warmup=0.0)
    return learning_rate(own, peak, done, length)


def ema_decay(decay: float, rampup: float, step: int) -> float:
    """Decay of the moving average after `step` finished steps: its half-life is at most rampup · step, so that it forgets
    the first weights sooner (Karras et al. 2021, StyleGAN3). rampup 0: always `decay`."""
    if not rampup or not decay:
        return decay
    return min(decay, 0.5 ** (1 / (rampup * step))) if step else 0.0


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, decay: float) -> None:
    """ema ← decay · ema + (1 − decay) · module for trained parameters; frozen ones and buffers are copied."""
    pairs = list(zip(ema.parameters(), module.parameters()))
    moving = [(e, p) for e, p in pairs if p.requires_grad and e.is_floating_point()]
    if moving:
        torch._foreach_lerp_([e for e, _ in moving], [p for _, p in moving], 1 - decay)
    fixed: list[tuple[Tensor, Tensor]] = [(e, p) for e, p in pairs if not p.requires_grad]
    for target, source in fixed + list(zip(ema.buffers(), module.buffers())):
        target.copy_(source)
