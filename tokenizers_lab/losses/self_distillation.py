"""Self-distillation with prototypes: the losses of DINO, iBOT and KoLeo, and the teacher's targets (Oquab et al. 2023, DINOv2).

Everything is computed in float32. Logits are those of K prototypes, before any temperature; crops are crop-major.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.quantizers.codebook import distributed

KOLEO_EPS = 1e-8


def dino_loss(
    student_global: Tensor, student_local: Tensor, targets: Tensor, items: int, temperature: float = 0.1
) -> tuple[Tensor, Tensor]:
    """(global part, local part) of the class token's loss; the loss is their sum.

    student_global: (2·items, K) logits of both global crops; student_local: (n·items, K) of n local ones, n may be 0; targets:
    (2·items, K) the teacher's distributions of both global crops, swapped: row i is of the other crop than row i of the student.
    Each of the 2n + 2 pairs of different crops counts the same.
    """
    crops = len(student_local) // items
    pairs = 2 * crops + 2
    globally = 2 * cross_entropy(student_global, targets, temperature).mean() / pairs
    if not crops:
        return globally, globally.new_zeros(())
    both = targets.float().unflatten(0, (2, items)).sum(0)                                # (items, K): of both global crops
    locally = cross_entropy(student_local, both.repeat(crops, 1), temperature).mean() * crops / pairs
    return globally, locally


def ibot_loss(student: Tensor, targets: Tensor, masks: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of masked patches (M, K), in the order of masks.nonzero(); masks: (crops, N) bool.

    Averaged in each crop over its masked patches, then over all crops, those without a mask too. 0, with a graph, if nothing is
    masked.
    """
    weights = (1 / masks.sum(1).clamp_min(1))[masks.nonzero()[:, 0]].float()              # (M,)
    return (weights * cross_entropy(student, targets, temperature)).sum() / len(masks)


def koleo_loss(tokens: Tensor) -> Tensor:
    """−mean log of each token's distance to its nearest neighbour, tokens (B, D) normalised (Sablayrolles et al. 2019).

    Of one crop of each image and of this process: another crop of an image would be its neighbour. 0 of a single token.
    """
    if len(tokens) < 2:
        return 0 * tokens.float().sum()
    with torch.autocast(tokens.device.type, enabled=False):
        x = F.normalize(tokens.float(), dim=-1)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
        return -((x - x[nearest] + KOLEO_EPS).norm(dim=1) + KOLEO_EPS).log().mean()


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """−Σ targets · log softmax(logits / temperature) of each row, (R,)."""
    return -(targets.float() * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Distributions (R, K) over prototypes that all R rows of all processes together use equally (Caron et al. 2020, SwAV).

    logits: (R, K); R may differ between processes, also be 0.
    """
    x = logits.float() / temperature
    # without the shift, which cancels, exp would overflow
    top = x.max() if x.numel() else x.new_full((), -torch.inf)
    if distributed():
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX)
    q = (x - top).exp()
    for _ in range(iterations):
        q = q / _sum_over_ranks(q.sum(0)).clamp_min(torch.finfo(q.dtype).tiny)            # each prototype's share
        q = q / q.sum(1, keepdim=True)
    return q


@torch.no_grad()
def centred(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """softmax((logits − centre) / temperature): (R, K), centre (K,)."""
    return ((logits.float() - centre) / temperature).softmax(-1)


@torch.no_grad()
def moved_centre(centre: Tensor, logits: Tensor, momentum: float = 0.9) -> Tensor:
    """The centre (K,) for the next step: momentum · centre + (1 − momentum) · mean of the teacher's logits of all processes."""
    total = _sum_over_ranks(torch.cat([logits.float().sum(0), logits.new_full((1,), len(logits), dtype=torch.float32)]))
    if total[-1] == 0:
        return centre.clone()
    return momentum * centre + (1 - momentum) * total[:-1] / total[-1]


def _sum_over_ranks(x: Tensor) -> Tensor:
    if distributed():
        torch.distributed.all_reduce(x)
    return x
