"""Self-distillation of vision transformers (DINO, iBOT): what student and teacher say of crops, and the teacher's step.

Crops are crop-major: all first crops of the batch's images, then all second ones, and so on. No loss is here.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tokenizers_lab.draw import Draw

# tokens(pixels (B, 3, H, W), mask (B, N) bool or none, kept (depth, 2, k) or none) → class tokens (B, D), patch tokens (B, N, D)
Tokens = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
Head = Callable[[Tensor], Tensor]
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class TeacherLogits:
    """What the teacher says, before centring or Sinkhorn. Without gradient."""

    classes: Tensor           # (2B, K) of the global crops, swapped: row i is of the other global crop of the same image
    patches: Tensor           # (M, K) of the patches that the student does not see


@dataclass
class StudentLogits:
    """What the student says, before its temperature."""

    classes: Tensor           # (2B, K) of the masked global crops
    local_classes: Tensor     # (n · B, K) of the n local crops
    patches: Tensor           # (M, K) of the masked patches
    class_tokens: Tensor      # (2B, D) of the masked global crops, before the head (for KoLeo)


def masked_patches(masks: Tensor) -> Tensor:
    """Flat places (M,) int64 of the masked patches in (2B · N), row by row, from masks (2B, N), true or 1 where masked."""
    return masks.bool().flatten().nonzero().flatten()


def kept_samples(draw: Draw, purpose: str, depth: int, batch: int, ratio: float) -> Tensor | None:
    """Which samples of a batch each residual branch runs on: (depth, 2, k) int64, k = max(int(batch · (1 − ratio)), 1).

    The two branches of every block are chosen for on their own, by `purpose` alone. None if the ratio is 0: all of them.
    """
    if not ratio:
        return None
    keep = max(int(batch * (1 - ratio)), 1)
    return draw.uniform(purpose, (depth, 2, batch)).argsort(-1)[..., :keep]


@torch.no_grad()
def teacher_logits(tokens: Tokens, head: Head, global_crops: Tensor, masked: Tensor) -> TeacherLogits:
    """The teacher sees whole global crops (2B, 3, H, W). masked: `masked_patches` of the student's masks."""
    classes, patches = tokens(global_crops, None, None)
    first, second = classes.chunk(2)
    logits = head(torch.cat([second, first, patches.flatten(0, 1)[masked]]))
    return TeacherLogits(logits[: len(classes)], logits[len(classes) :])


def student_logits(
    tokens: Tokens, head: Head, global_crops: Tensor, masks: Tensor, local_crops: Tensor | None = None,
    kept_global: Tensor | None = None, kept_local: Tensor | None = None,
) -> StudentLogits:
    """The student sees global crops (2B, 3, H, W) with masks (2B, N) bool, and local crops (n · B, 3, h, w) without.

    kept_global, kept_local: see `kept_samples`; none: all samples in every branch.
    """
    classes, patches = tokens(global_crops, masks.bool(), kept_global)
    parts = [classes, patches.flatten(0, 1)[masked_patches(masks)]]
    if local_crops is not None:
        parts.append(tokens(local_crops, None, kept_local)[0])
    logits = head(torch.cat(parts)).split([len(part) for part in parts])
    local = logits[2] if local_crops is not None else logits[0].new_zeros(0, logits[0].shape[1])
    return StudentLogits(logits[0], local, logits[1], classes)


def frozen_copy(module: Module) -> Module:
    """A teacher that starts as its student: a copy in eval mode without gradients."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, in place, parameters by name; buffers are left.

    Raises ValueError if the two do not have the same parameters.
    """
    theirs, ours = dict(teacher.named_parameters()), dict(student.named_parameters())
    if theirs.keys() != ours.keys():
        name = min(theirs.keys() ^ ours.keys())
        raise ValueError(f"teacher and student are not of one shape: only one of them has {name}")
    torch._foreach_lerp_([p.data for p in theirs.values()], [ours[name].data for name in theirs], 1 - momentum)
