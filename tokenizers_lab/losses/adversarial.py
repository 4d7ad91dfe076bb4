"""Losses of generators and discriminators."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½ · (mean relu(1 − D(real)) + mean relu(1 + D(fake))) (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """−mean D(fake)."""
    return -fake_logits.mean()


@contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through the module but not into its parameters; its mode and buffers are left alone."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def least_squares_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean (1 − D(real))² + mean D(fake)² (Mao et al. 2017, LSGAN)."""
    return (1 - real_logits).square().mean() + fake_logits.square().mean()


def least_squares_generator(fake_logits: Tensor) -> Tensor:
    """mean (1 − D(fake))²."""
    return (1 - fake_logits).square().mean()


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Σ over feature maps of mean |real − fake|, the real ones without gradient (Kumar et al. 2019, MelGAN)."""
    return torch.stack([F.l1_loss(f, r.detach()) for r, f in zip(real, fake, strict=True)]).sum()
