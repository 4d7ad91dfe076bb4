"""Residual VQ with moving averages: against another library and in closed form."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from tokenizers_lab.draw import Draw
from tokenizers_lab.quantizers import codebook
from tokenizers_lab.quantizers.codebook import EMACodebook, kmeans, nearest, pick_rows
from tokenizers_lab.quantizers.residual import ResidualVQ
from tokenizers_lab.quantizers.result import codebook_health


class NoDraw(Draw):
    """Fails when anything is drawn."""

    def generator(self, purpose):
        raise AssertionError(f"drew {purpose}")


def quantizer(**options) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(3, 16, 8, **{"kmeans_iterations": 5} | options)


def vectors(items=4, frames=20, seed=1) -> torch.Tensor:
    return torch.randn(items, 8, frames, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_the_brute_force_answer_also_by_chunks(monkeypatch):
    rows, embed = torch.randn(101, 8), torch.randn(16, 8)
    brute = (rows[:, None] - embed[None]).square().sum(-1).argmin(1)
    assert torch.equal(nearest(rows, embed), brute)
    monkeypatch.setattr(codebook, "ON_A_CPU", 64)
    assert torch.equal(nearest(rows, embed), brute)


def test_distances_stay_in_float32_under_autocast():
    base = torch.randn(1, 8)
    embed = base + 1e-3 * torch.randn(16, 8)      # bfloat16 cannot tell these apart
    rows = base + 1e-3 * torch.randn(200, 8)
    plain = nearest(rows, embed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(rows, embed), plain)
    assert not torch.equal(nearest(rows.bfloat16(), embed.bfloat16()), plain)
    vq = quantizer().train()
    with torch.autocast("cpu", torch.bfloat16):
        found = vq(vectors(), Draw(0))
    assert {b.dtype for b in vq.buffers()} == {torch.float32} and found.losses["commitment"].dtype == torch.float32


def test_a_step_is_that_of_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    ours = EMACodebook(16, 8, kmeans_iterations=0)
    theirs = library.VectorQuantize(8, 16, decay=0.99, eps=1e-5, threshold_ema_dead_code=0, commitment_weight=1.0).train()
    state = theirs._codebook
    for name, value in (("embed", ours.embed), ("embed_avg", ours.embed_sum), ("cluster_size", ours.cluster_size)):
        getattr(state, name).copy_(value.reshape(getattr(state, name).shape))
    vq = ResidualVQ(1, 16, 8, kmeans_iterations=0).train()
    vq.codebooks[0] = ours
    for seed in range(3):
        x = vectors(seed=seed)
        values, codes, loss = theirs(x.transpose(1, 2))
        found = vq(x, NoDraw(0))
        assert torch.equal(found.codes[:, 0], codes)
        torch.testing.assert_close(found.quantized, values.transpose(1, 2))
        torch.testing.assert_close(found.losses["commitment"], loss.sum())
        torch.testing.assert_close(ours.embed, state.embed[0])
        torch.testing.assert_close(ours.cluster_size, state.cluster_size[0])


def test_kmeans_by_hand():
    rows = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    start = torch.tensor([[0.0], [11.0], [11.0], [99.0]])
    centroids, counts = kmeans(rows, start, 1)
    assert centroids.flatten().tolist() == [0.5, 10.5, 11.0, 99.0]      # the second of two equal ones gets nothing and stays
    assert counts.tolist() == [2, 2, 0, 0]
    centroids, counts = kmeans(rows, start, 5)
    assert centroids.flatten().tolist() == [0.5, 10.0, 11.0, 99.0] and counts.tolist() == [2, 1, 1, 0]


def test_rows_are_drawn_without_replacement_while_they_suffice():
    assert len(set(pick_rows(20, 16, Draw(0), "a").tolist())) == 16
    few = pick_rows(5, 16, Draw(0), "a")
    assert few.shape == (16,) and few.max() < 5
    assert torch.equal(few, pick_rows(5, 16, Draw(0), "a")) and not torch.equal(few, pick_rows(5, 16, Draw(1), "a"))


def test_the_first_batch_starts_the_codebooks_and_the_next_does_not():
    vq = quantizer(released_start=False).train()
    x = vectors()
    started = [vq.book(i).started.item() for i in range(3)]
    vq(x, Draw(0))
    assert started == [0, 0, 0] and all(vq.book(i).started.item() == 1 for i in range(3))
    vq(x, NoDraw(0))


@pytest.mark.parametrize("released", [False, True])
def test_the_start_survives_the_first_update_unless_as_released(released):
    rows = torch.randn(64, 8)
    book = EMACodebook(16, 8, kmeans_iterations=10, released_start=released)
    book.start(rows, Draw(0), "kmeans")
    centroids, counts = book.embed.clone(), torch.bincount(book.encode(rows), minlength=16).clamp_min(1)
    book.update(codebook.count_and_sum(rows, book.encode(rows), 16))
    shrunk = (0.99 * centroids + 0.01 * centroids * counts[:, None]) / counts[:, None]
    if released:      # the authors' sums were not multiplied by the counts
        torch.testing.assert_close(book.embed[counts > 2], shrunk[counts > 2], atol=0.05, rtol=0.1)
    else:
        assert F.cosine_similarity(book.embed, centroids).min() > 0.99
        torch.testing.assert_close(book.embed.norm(), centroids.norm(), atol=0, rtol=0.05)


def test_eval_mode_changes_nothing_and_needs_no_draw():
    vq = quantizer().train()
    vq(vectors(), Draw(0))
    vq.eval()
    before = copy.deepcopy(vq.state_dict())
    x = vectors(seed=2)
    found = vq(x)
    assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())
    assert found.losses["commitment"] == 0
    assert torch.equal(vq.encode(x), found.codes) and torch.equal(vq.encode(x, last=2), found.codes[:, :2])
    torch.testing.assert_close(vq.decode(found.codes), found.quantized)
    torch.testing.assert_close(torch.stack(found.layers).sum(0), found.quantized)
    with pytest.raises(ValueError, match="needs a draw"):
        vq.train()(x)


def test_more_codebooks_leave_less():
    vq = quantizer().train()
    x = vectors(8, 50)
    for step in range(20):
        vq(x, Draw(0, step=step))
    vq.eval()
    errors = [F.mse_loss(vq(x, last=n).quantized, x).item() for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] and errors[0] < x.var().item()


def test_gradients_reach_the_input_through_the_first_layer_only():
    vq = quantizer().train()
    x = vectors().requires_grad_()
    found = vq(x, Draw(0))
    (through,) = torch.autograd.grad(found.quantized.sum(), x, retain_graph=True)
    assert torch.equal(through, torch.ones_like(x))      # straight through, factor 1
    (commitment,) = torch.autograd.grad(found.losses["commitment"], x)
    expected = 2 * (x - found.layers[0]).detach() / x.numel() / 3      # of layer 0; the others' residuals are detached
    torch.testing.assert_close(commitment, expected)
    assert not found.layers[1].requires_grad


def test_dead_entries_are_replaced_only_where_asked():
    off, on = quantizer(), quantizer(dead_threshold=0.9)
    for vq in (off, on):
        vq.train()
        vq(vectors(), Draw(0))
        vq.book(0).cluster_size[:4] = 0.0
        vq.book(0).embed_sum[:4] = 0.0
    x = vectors(seed=3)
    off(x, NoDraw(0))
    assert off.book(0).cluster_size[:4].max() < 0.9
    on(x, Draw(0, step=1))
    rows = {tuple(r) for r in x.transpose(1, 2).reshape(-1, 8).tolist()}
    dead = [i for i in range(4) if on.book(0).cluster_size[i] == torch.tensor(0.9)]
    assert dead and all(tuple(on.book(0).embed[i].tolist()) in rows for i in dead)
    torch.testing.assert_close(on.book(0).embed_sum[dead], on.book(0).embed[dead] * 0.9)


def test_health_in_closed_form():
    codes = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.int64)])[None]      # (1, 2, 8): all entries; one
    health = codebook_health(codes, 8)
    assert health["usage"].item() == pytest.approx((1 + 1 / 8) / 2)
    assert health["perplexity"].item() == pytest.approx((8 + 1) / 2)
    half = codebook_health(torch.tensor([[[0, 0, 0, 1]]]), 4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert half["perplexity"].item() == pytest.approx(math.exp(entropy))
