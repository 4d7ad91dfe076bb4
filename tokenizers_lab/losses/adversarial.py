"""Losses of generators and discriminators."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.discriminators.result import Judgement

Views = dict[str, list[Judgement]]      # family of discriminators: what each of its members says of a signal


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


def sum_of(values: Iterable[Tensor]) -> Tensor:
    """Sum of scalars."""
    return torch.stack(list(values)).sum()


def adversarial_by_family(
    judge: Callable[[Tensor], Views], discriminators: nn.Module, real: Tensor, fake: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(least-squares generator loss, feature matching) of each family, summed over its members.

    judge: every member's view of a signal, by the discriminators, whose parameters get no gradient.
    """
    with frozen_parameters(discriminators):
        with torch.no_grad():
            reals = judge(real)
        fakes = judge(fake)
    gan = {family: sum_of(least_squares_generator(m.logits) for m in members) for family, members in fakes.items()}
    matching = {
        family: sum_of(feature_matching(r.features, f.features) for r, f in zip(reals[family], members, strict=True))
        for family, members in fakes.items()
    }
    return gan, matching


def discrimination_by_family(
    judge: Callable[[Tensor], Views], real: Tensor, fake: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(least-squares discriminator loss of each family, summed over its members; mean logits, to be logged), without autocast.

    The real signal comes first: spectral norm iterates at each forward. `fake` is detached.
    """
    with torch.autocast(real.device.type, enabled=False):
        reals, fakes = judge(real), judge(fake.detach())
        losses = {
            family: sum_of(least_squares_discriminator(r.logits, f.logits) for r, f in zip(reals[family], members, strict=True))
            for family, members in fakes.items()
        }
    logs = {f"logits_{name}": torch.stack([m.logits.detach().mean() for members in views.values() for m in members]).mean()
            for name, views in (("real", reals), ("fake", fakes))}
    return losses, logs
