"""Residual vector quantization (Zeghidour et al. 2021) with codebooks that follow moving averages."""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.draw import Draw

from .codebook import EMACodebook, count_and_sum, distributed, full_precision, wide
from .result import QuantizerResult, codebook_health


class ResidualVQ(nn.Module):
    """Each codebook quantizes what the earlier ones left over.

    Numerically EnCodec's and SpeechTokenizer's: straight-through per layer, the residual carries no gradient, so that only the
    first layer's commitment and value reach the encoder. Distances and averages are in float32 under autocast.
    """

    def __init__(
        self, codebooks: int, size: int, width: int, decay: float = 0.99, epsilon: float = 1e-5, kmeans_iterations: int = 50,
        dead_threshold: float = 0.0, released_start: bool = False, released_replacement: bool = False,
    ):
        """See EMACodebook."""
        super().__init__()
        options = (decay, epsilon, kmeans_iterations, dead_threshold, released_start, released_replacement)
        self.codebooks = nn.ModuleList(EMACodebook(size, width, *options) for _ in range(codebooks))
        self.size = size

    def book(self, index: int) -> EMACodebook:
        """One codebook."""
        book = self.codebooks[index]
        assert isinstance(book, EMACodebook)
        return book

    def forward(self, x: Tensor, draw: Draw | None = None, last: int | None = None) -> QuantizerResult:
        """x: (B, D, T). last: number of codebooks to use; none: all.

        In training it starts and moves the codebooks, needs `draw` (purposes kmeans.i, replace.i), and losses hold `commitment`,
        the mean over the codebooks of mean (x − value)²; in eval mode nothing changes and the loss is 0.
        """
        if self.training and draw is None:
            raise ValueError("a residual quantizer that trains needs a draw")
        batch, width, frames = x.shape
        residual = wide(x).transpose(1, 2).reshape(-1, width)                            # (N, D), rows in the order (B, T)
        codes, layers, losses, rows_of, statistics = [], [], [], [], []
        count = len(self.codebooks) if last is None else last
        with full_precision(x):
            for i in range(count):
                book = self.book(i)
                if self.training:
                    assert draw is not None
                    book.start(residual.detach(), draw, f"kmeans.{i}")
                index = book.encode(residual.detach())
                value = book.decode(index).to(residual.dtype)                            # before this step's update
                if self.training:
                    losses.append(F.mse_loss(value, residual))
                    statistics.append(count_and_sum(residual.detach(), index, self.size))
                    rows_of.append(residual.detach())
                    value = residual + (value - residual).detach()
                codes.append(index.view(batch, frames))
                layers.append(value.view(batch, frames, width).transpose(1, 2))
                residual = (residual - value).detach()
            if self.training:
                assert draw is not None
                self.move(statistics, rows_of, draw)
        stacked = torch.stack(codes, 1)
        layer_losses = torch.stack(losses) if losses else x.new_zeros(count)
        return QuantizerResult(
            quantized=reduce(torch.add, layers).to(x.dtype), codes=stacked, layers=layers,
            losses={"commitment": layer_losses.mean()}, layer_losses={"commitment": layer_losses},
            health=codebook_health(stacked, self.size) | {"dead": self.dead_share()},
        )

    @torch.no_grad()
    def move(self, statistics: list[Tensor], rows: list[Tensor], draw: Draw) -> None:
        """One step of the averages; statistics: (size, D + 1) of this rank for each layer, summed here over all ranks."""
        if distributed():
            of_all = torch.stack(statistics)
            torch.distributed.all_reduce(of_all)
            statistics = list(of_all)
        for i, (of_layer, vectors) in enumerate(zip(statistics, rows)):
            self.book(i).update(of_layer)
            if self.book(i).dead_threshold > 0:
                self.book(i).replace_dead(vectors, draw, f"replace.{i}")

    def dead_share(self, below: float = 0.01) -> Tensor:
        """Share of all entries whose moving count is below `below`."""
        return torch.stack([(self.book(i).cluster_size < below).float().mean() for i in range(len(self.codebooks))]).mean()

    def encode(self, x: Tensor, last: int | None = None, first: int = 0) -> Tensor:
        """Codes (B, last − first, T) of x (B, D, T) from the codebooks first … last − 1 (none: to the end).

        With `first` > 0 the first codebook used is given x itself, as in the authors' code: not what the earlier ones left.
        """
        batch, width, frames = x.shape
        residual, codes = wide(x).transpose(1, 2).reshape(-1, width), []
        with torch.no_grad(), full_precision(x):
            for i in range(first, len(self.codebooks) if last is None else last):
                index = self.book(i).encode(residual)
                residual = residual - self.book(i).decode(index)
                codes.append(index.view(batch, frames))
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor, first: int = 0) -> Tensor:
        """Sum of values (B, D, T) of codes (B, K, T) by the codebooks first … first + K − 1."""
        values = [self.book(first + i).decode(codes[:, i]) for i in range(codes.shape[1])]      # (B, T, D) each
        return torch.stack(values).sum(0).transpose(1, 2)
