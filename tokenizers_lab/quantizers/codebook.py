"""A codebook that follows moving averages of the vectors it quantizes (van den Oord et al. 2017, appendix A.1), as in EnCodec."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.draw import Draw

DISTANCES_AT_ONCE = 1 << 24      # entries of a distance matrix held at a time: 64 MB in float32
ON_A_CPU = 1 << 21               # the same on a CPU: what stays near the cache, and is not given back to the system each time


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is: half precision cannot tell near codes apart."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside, on the tensor's device; the meta device, on which sizes are computed, knows none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def by_rows(function: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """function(rows) by chunks of rows, so that a (rows, width) matrix inside it stays small."""
    step = max(1, (ON_A_CPU if rows.device.type == "cpu" else DISTANCES_AT_ONCE) // max(width, 1))
    if torch.compiler.is_exporting() or len(rows) <= step:      # an export leaves the number of rows open
        return function(rows)
    return torch.cat([function(part) for part in rows.split(step)])


def nearest(rows: Tensor, embed: Tensor) -> Tensor:
    """Index (N,) of the row of `embed` (K, D) nearest to each of rows (N, D): squared distance, float32; the lowest on a tie."""
    with torch.no_grad(), full_precision(rows):
        rows, embed = wide(rows), wide(embed)
        norms = embed.square().sum(1)      # |x|² is the same for every code
        return by_rows(lambda part: torch.addmm(norms, part, embed.t(), alpha=-2).argmin(1), rows, len(embed))


@torch.no_grad()
def count_and_sum(rows: Tensor, codes: Tensor, size: int) -> Tensor:
    """(size, D + 1): how many rows (N, D) have each code, then the sum of these rows; the same bits in every run."""
    rows = torch.cat([torch.ones_like(rows[:, :1]), rows], dim=1)
    if rows.device.type == "cpu":
        return rows.new_zeros(size, rows.shape[1]).index_add_(0, codes, rows)
    return F.one_hot(codes, size).to(rows.dtype).t() @ rows      # index_add_ on a GPU sums in any order


@torch.no_grad()
def kmeans(rows: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm. rows: (N, D); start: (K, D). Returns centroids (K, D) and the counts (K,) of the last assignment.

    An empty cluster keeps its centroid. Distances are direct differences: equal centroids tie exactly, the lowest index wins.
    """
    centroids, counts = start.clone(), start.new_zeros(len(start))
    for _ in range(iterations):
        def assign(part: Tensor, at: Tensor = centroids) -> Tensor:
            return torch.cdist(part, at, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)

        found = count_and_sum(rows, by_rows(assign, rows, len(centroids)), len(centroids))
        counts, sums = found[:, 0], found[:, 1:]
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids)
    return centroids, counts


def pick_rows(n: int, wanted: int, draw: Draw, purpose: str) -> Tensor:
    """(wanted,) indices of n rows: the first of a permutation, or draws with replacement where there are fewer rows."""
    if n >= wanted:
        return draw.permutation(purpose, n)[:wanted]
    return draw.integers(purpose, 0, n, (wanted,))


class EMACodebook(nn.Module):
    """`size` vectors of `width` dimensions, moved by averages and not by gradients.

    Until it is `started`, the first training batch starts it by k-means. Under torch.distributed all ranks' vectors count, and
    the codebooks of all ranks stay equal bit by bit. `released_start`: start as in the code of EnCodec and its followers, where
    the sums are not multiplied by the counts, so that the first update shrinks each centroid by its count.
    """

    started: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_sum: Tensor

    def __init__(
        self, size: int, width: int, decay: float = 0.99, epsilon: float = 1e-5, kmeans_iterations: int = 50,
        dead_threshold: float = 0.0, released_start: bool = False, released_replacement: bool = False,
    ):
        """dead_threshold: entries chosen by fewer vectors a step (moving average) become vectors of the batch; 0: never.

        released_replacement: the first drawn vectors go to the dead entries in turn, which keep their averages, so that the next
        update takes them back (XY-Tokenizer's code).
        """
        super().__init__()
        self.size, self.decay, self.epsilon, self.kmeans_iterations = size, decay, epsilon, kmeans_iterations
        self.dead_threshold, self.released_start = dead_threshold, released_start
        self.released_replacement = released_replacement
        embed = torch.empty(size, width)
        nn.init.kaiming_uniform_(embed)
        self.register_buffer("started", torch.tensor([float(kmeans_iterations == 0)]))
        self.register_buffer("cluster_size", torch.ones(size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_sum", embed.clone())

    def encode(self, rows: Tensor) -> Tensor:
        """rows (N, D) to codes (N,) int64."""
        return nearest(rows, self.embed)

    def decode(self, codes: Tensor) -> Tensor:
        """codes of any shape to vectors (..., D)."""
        return F.embedding(codes, self.embed)

    @torch.no_grad()
    def start(self, rows: Tensor, draw: Draw, purpose: str) -> None:
        """k-means over the rows (N, D) of all ranks, unless it has started already; the draw of rank 0 counts."""
        if bool(self.started):
            return
        rows = gather_rows(wide(rows))
        chosen = pick_rows(len(rows), self.size, draw, purpose).to(rows.device)
        centroids, counts = kmeans(rows, rows[chosen], self.kmeans_iterations)
        if not self.released_start:
            counts = counts.clamp_min(1)      # an empty cluster keeps its place
        sums = centroids if self.released_start else centroids * counts[:, None]
        for buffer, value in ((self.embed, centroids), (self.embed_sum, sums), (self.cluster_size, counts)):
            buffer.copy_(value)
            from_rank_0(buffer)
        self.started.fill_(1)

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Move the averages by `count_and_sum` of all ranks, then the vectors (Laplace smoothing of the counts)."""
        self.cluster_size.lerp_(statistics[:, 0].to(self.cluster_size.dtype), 1 - self.decay)
        self.embed_sum.lerp_(statistics[:, 1:].to(self.embed_sum.dtype), 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.epsilon) / (total + self.size * self.epsilon) * total
        self.embed.copy_(self.embed_sum / smoothed[:, None])

    @torch.no_grad()
    def replace_dead(self, rows: Tensor, draw: Draw, purpose: str) -> None:
        """Give dead entries vectors of the batch, rows (N, D), from all ranks in turn, with the threshold as their count."""
        dead = self.cluster_size < self.dead_threshold
        if not bool(dead.any()):      # the same on all ranks
            return
        fresh = wide(rows)[pick_rows(len(rows), self.size, draw, purpose).to(rows.device)]
        if distributed():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            fresh = fresh * (torch.arange(self.size, device=fresh.device) % world == rank)[:, None]
            torch.distributed.all_reduce(fresh)
        fresh = fresh.to(self.embed.dtype)
        if self.released_replacement:
            fresh = fresh[dead.cumsum(0).sub(1).clamp_min(0)]
        self.embed.copy_(torch.where(dead[:, None], fresh, self.embed))
        if self.released_replacement:
            return
        self.embed_sum.copy_(torch.where(dead[:, None], fresh * self.dead_threshold, self.embed_sum))
        self.cluster_size.masked_fill_(dead, self.dead_threshold)


def distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) of all ranks, in the order of ranks; N may differ between them."""
    if not distributed():
        return rows
    world = torch.distributed.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    torch.distributed.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    longest = int(torch.cat(sizes).max())
    padded = F.pad(rows, (0, 0, 0, longest - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes)])


def from_rank_0(buffer: Tensor) -> None:
    """Overwrite the tensor by that of rank 0."""
    if distributed():
        torch.distributed.broadcast(buffer, 0)
