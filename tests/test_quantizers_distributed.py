"""Quantizers over two processes: the same bytes on both, and what one process would see of all the data."""

import copy

import pytest
import torch
from torch import multiprocessing

from tokenizers_lab.draw import Draw
from tokenizers_lab.quantizers.bsq import BinaryQuantizer
from tokenizers_lab.quantizers.residual import ResidualVQ

STEPS = 4


def vectors(items: int, frames: int, seed: int) -> torch.Tensor:
    return torch.randn(items, 8, frames, generator=torch.Generator().manual_seed(seed))


def train_in_processes(rank: int, world: int, folder: str) -> None:
    """This rank's share of some training steps; its codebooks after each of them, and gradients of BSQ, go to the folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(rank)      # what a rank starts from must not matter once k-means has started the codebooks
    replacing = ResidualVQ(3, 16, 8, kmeans_iterations=5, dead_threshold=4.0).train()
    keeping = ResidualVQ(3, 16, 8, kmeans_iterations=5).train()
    states = []
    for step in range(STEPS):
        share = vectors(4, 20 + 3 * step, seed=step).chunk(world)[rank][..., : 20 + rank]      # unequal shares
        for vq in (replacing, keeping):
            vq(share, Draw(0, rank, step))
        states.append({name: copy.deepcopy(vq.state_dict()) for name, vq in (("replacing", replacing), ("keeping", keeping))})
    plain = ResidualVQ(3, 16, 8, kmeans_iterations=5).train()
    plain(vectors(4, 20, seed=0).chunk(world)[rank], Draw(0, rank))
    x = vectors(4, 20, seed=0).chunk(world)[rank].requires_grad_()
    losses = BinaryQuantizer(8, group=4).train()(x).losses
    (gradient,) = torch.autograd.grad(losses["codebook_entropy"], x)
    torch.save({"states": states, "plain": plain.state_dict(), "entropy": losses["codebook_entropy"].detach(),
                "gradient": gradient}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes saved."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(train_in_processes, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def bytes_of(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in state.items()}


@pytest.mark.slow
def test_codebooks_of_two_processes_are_the_same_bytes(ranks):
    first, second = (found["states"] for found in ranks)
    for step in range(STEPS):
        for name in ("replacing", "keeping"):
            assert bytes_of(first[step][name]) == bytes_of(second[step][name]), f"{name}, step {step}"
    assert bytes_of(first[0]["keeping"]) != bytes_of(first[1]["keeping"])      # the averages moved
    assert bytes_of(first[-1]["keeping"]) != bytes_of(first[-1]["replacing"])
    assert any((first[0]["replacing"][f"codebooks.{i}.cluster_size"] == 4.0).any() for i in range(3))      # some were replaced


@pytest.mark.slow
def test_two_processes_see_what_one_would_of_all_the_data(ranks):
    alone = ResidualVQ(3, 16, 8, kmeans_iterations=5).train()
    alone(vectors(4, 20, seed=0), Draw(0))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(ranks[0]["plain"][name], value)
    x = vectors(4, 20, seed=0).requires_grad_()
    entropy = BinaryQuantizer(8, group=4).train()(x).losses["codebook_entropy"]
    (gradient,) = torch.autograd.grad(entropy, x)
    for found in ranks:
        torch.testing.assert_close(found["entropy"], entropy.detach())
    together = torch.cat([found["gradient"] for found in ranks]) / 2      # DDP takes the mean over ranks
    torch.testing.assert_close(together, gradient)
