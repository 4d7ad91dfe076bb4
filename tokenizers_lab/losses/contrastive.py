"""The symmetric contrastive loss of images and texts, over the batches of all processes (Radford et al. 2021, CLIP)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.quantizers.bsq import mean_over_ranks
from tokenizers_lab.quantizers.codebook import distributed

MAX_LOGIT_SCALE = math.log(100)


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
    """½ · (CE of each image among all texts + CE of each text among all images).

    images, texts: (B, D) normalised features, B the same in all processes; logit_scale: log of the inverse temperature.
    The value is that of the batches of all processes together. Each computes its own rows; the gradient, averaged over the
    processes as DDP does, is that of one process with all of them.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts, scale = images.float(), texts.float(), logit_scale.float().exp()
        bias = 0.0 if logit_bias is None else logit_bias.float()
        every_image, every_text = gather_with_gradient(images), gather_with_gradient(texts)
        first = torch.distributed.get_rank() * len(images) if distributed() else 0
        own = torch.arange(first, first + len(images), device=images.device)
        by_image = F.cross_entropy(scale * images @ every_text.T + bias, own)             # (B, B · processes)
        by_text = F.cross_entropy(scale * texts @ every_image.T + bias, own)
        return mean_over_ranks((by_image + by_text) / 2)


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the temperature between 1 and 1/100, in place; to be called after each step."""
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Rows (B, D) of all processes, (B · processes, D), in the order of ranks; the gradient goes back to where they are from."""
    return _Gather.apply(rows) if distributed() else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
