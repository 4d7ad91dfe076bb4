"""The contrastive loss: its formula, and two processes as one with the whole batch."""

import math

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn import functional as F

from tokenizers_lab.losses.contrastive import MAX_LOGIT_SCALE, clamp_logit_scale, contrastive_loss


class Towers(nn.Module):
    """Two linear towers, the temperature and a bias."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.text = (nn.Parameter(torch.randn(6, 5, generator=generator)) for _ in range(2))
        self.scale, self.bias = nn.Parameter(torch.tensor(math.log(1 / 0.07))), nn.Parameter(torch.tensor(-0.5))

    def forward(self, images, texts):
        return contrastive_loss(F.normalize(images @ self.image), F.normalize(texts @ self.text), self.scale, self.bias)


def pairs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, 6, generator=generator)


def test_the_formula():
    images, texts = F.normalize(pairs(), dim=-1)
    logits = 4 * images @ texts.T
    by_hand = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(4.0).log()), by_hand)
    same = contrastive_loss(torch.eye(4), torch.eye(4), torch.tensor(MAX_LOGIT_SCALE))
    assert same < 1e-6 < contrastive_loss(torch.eye(4), torch.eye(4).flip(0), torch.tensor(MAX_LOGIT_SCALE))


def test_the_temperature_stays_in_its_range():
    scale = nn.Parameter(torch.tensor([-1.0, 2.0, 9.0]))
    clamp_logit_scale(scale)
    torch.testing.assert_close(scale.detach(), torch.tensor([0.0, 2.0, math.log(100)]))


def in_processes(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    towers = nn.parallel.DistributedDataParallel(Towers())
    loss = towers(*(half.chunk(world)[rank] for half in pairs()))
    loss.backward()
    torch.save({"loss": loss.detach(), **{n: p.grad for n, p in towers.module.named_parameters()}}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    multiprocessing.spawn(in_processes, (2, str(tmp_path)), nprocs=2)
    towers = Towers()
    loss = towers(*pairs())
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=0, atol=1e-6)
        for name, parameter in towers.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-6)
    assert all(p.grad.abs().max() > 1e-3 for n, p in towers.named_parameters() if n != "bias")
