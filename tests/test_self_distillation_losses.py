"""Losses of self-distillation against numbers of DINOv2's own classes, and over two processes."""

import pytest
import torch
from torch import multiprocessing

from tokenizers_lab.losses.self_distillation import (
    centred,
    cross_entropy,
    dino_loss,
    ibot_loss,
    koleo_loss,
    moved_centre,
    sinkhorn,
)

TEACHER = torch.tensor([[.1, .2, -.1, 0], [0, -.2, .3, .1], [.2, 0, .1, -.3], [-.1, .1, 0, .2]])
GLOBAL = torch.tensor([[0, .1, 0, -.1], [.1, 0, .2, 0], [.3, .1, -.1, 0], [0, 0, .1, .1]])
LOCAL = torch.tensor([[.1, 0, 0, .1], [0, .1, .1, 0], [.2, 0, .1, 0], [0, .2, 0, .1], [.1, .1, 0, 0], [0, 0, .1, .2]])
EXACT = {"rtol": 0, "atol": 2e-6}


def test_sinkhorn_targets():
    q = sinkhorn(TEACHER, 0.07)
    torch.testing.assert_close(q[0], torch.tensor([.161359, .786425, .004030, .048186]), **EXACT)
    torch.testing.assert_close(q[3], torch.tensor([.008796, .178887, .015961, .796356]), **EXACT)
    torch.testing.assert_close(q.sum(1), torch.ones(4))
    assert sinkhorn(torch.empty(0, 4), 0.07).shape == (0, 4)
    assert sinkhorn(20 * TEACHER, 0.04).isfinite().all()      # e^150 is no float32
    torch.testing.assert_close(sinkhorn(TEACHER + 7, 0.07), q)


def test_class_token_loss():
    globally, locally = dino_loss(GLOBAL, LOCAL, sinkhorn(TEACHER, 0.07), items=2)
    assert globally.item() == pytest.approx(0.221160, abs=2e-6)
    assert locally.item() == pytest.approx(1.057137, abs=2e-6)
    alone, nothing = dino_loss(GLOBAL, LOCAL[:0], sinkhorn(TEACHER, 0.07), items=2)
    assert nothing == 0 and alone.item() == pytest.approx(4 * 0.221160, abs=8e-6)


def test_masked_patch_loss():
    masks = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    targets = sinkhorn(torch.tensor([[.2, 0, .1, 0], [0, .3, 0, .1], [.1, 0, 0, .2]]), 0.07)
    student = torch.tensor([[.1, 0, .2, 0], [0, .2, .1, 0], [0, 0, .1, .3]])
    assert ibot_loss(student, targets, masks).item() == pytest.approx(0.539522, abs=2e-6)
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = ibot_loss(empty, targets[:0], torch.zeros(4, 4).bool())
    loss.backward()
    assert loss == 0 and empty.grad is not None


def test_koleo_spreads_the_tokens():
    x = torch.tensor([[1, 0, .5], [.2, 1, 0], [0, .3, 1], [1, 1, .1]], requires_grad=True)
    loss = koleo_loss(x)
    assert loss.item() == pytest.approx(0.302033, abs=2e-6)
    (gradient,) = torch.autograd.grad(loss, x)
    assert koleo_loss(x - 0.1 * gradient) < loss
    assert koleo_loss(torch.ones(2, 3)).isfinite() and koleo_loss(torch.ones(1, 3)) == 0


def test_centring():
    centre = moved_centre(torch.zeros(4), TEACHER)
    torch.testing.assert_close(centre, torch.tensor([.005, .0025, .0075, 0]))
    torch.testing.assert_close(moved_centre(centre, TEACHER[:0]), centre)
    q = centred(TEACHER, centre, 0.07)
    torch.testing.assert_close(q, ((TEACHER - centre) / 0.07).softmax(1))
    torch.testing.assert_close(cross_entropy(TEACHER, q, 0.5), -(q * (TEACHER / 0.5).log_softmax(1)).sum(1))


def in_processes(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    own = TEACHER[:3] if rank == 0 else TEACHER[3:]      # unequal shares
    found = {"sinkhorn": sinkhorn(own, 0.07), "centre": moved_centre(torch.ones(4), own)}
    nothing = sinkhorn(TEACHER if rank else TEACHER[:0], 0.07)
    torch.save({**found, "nothing": nothing}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_targets_are_over_the_rows_of_all_processes(tmp_path):
    multiprocessing.spawn(in_processes, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    torch.testing.assert_close(torch.cat([first["sinkhorn"], second["sinkhorn"]]), sinkhorn(TEACHER, 0.07))
    assert torch.equal(first["centre"], second["centre"]) and len(first["nothing"]) == 0
    torch.testing.assert_close(first["centre"], moved_centre(torch.ones(4), TEACHER))
    torch.testing.assert_close(second["nothing"], sinkhorn(TEACHER, 0.07))
