"""Residual vector quantization of padded batches, in a space of its own: XY-Tokenizer's."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tokenizers_lab.draw import Draw

from .codebook import count_and_sum, full_precision, wide
from .residual import ResidualVQ
from .result import QuantizerResult, codebook_health


def projection(width_in: int, width_out: int) -> nn.Module:
    """A 1 × 1 convolution under weight norm, or nothing where the widths agree."""
    return nn.Identity() if width_in == width_out else weight_norm(nn.Conv1d(width_in, width_out, 1))


class MaskedResidualVQ(ResidualVQ):
    """ResidualVQ between two projections, of vectors whose padding takes no part in codebooks and losses.

    The straight-through gradient and the commitment loss exist in eval mode too; only the first codebook's commitment has a
    gradient to the input, since a residual is its input minus itself plus a constant.
    """

    def __init__(
        self, width_in: int, width_out: int, codebooks: int, size: int, width: int, decay: float = 0.99, epsilon: float = 1e-5,
        kmeans_iterations: int = 10, dead_threshold: float = 2.0, released_start: bool = False,
        released_replacement: bool = False, commitment: float = 1.0, dropout: float = 0.0,
    ):
        """width: of a quantized vector. commitment: factor of the loss. dropout: share of a training batch, its first items,
        that uses 1 to all codebooks, drawn. See EMACodebook for the others."""
        super().__init__(
            codebooks, size, width, decay, epsilon, kmeans_iterations, dead_threshold, released_start, released_replacement)
        self.commitment, self.dropout = commitment, dropout
        self.input_proj = projection(width_in, width)
        self.output_proj = projection(width, width_out)

    def forward(
        self, x: Tensor, draw: Draw | None = None, last: int | None = None, lengths: Tensor | None = None,
        padding_counts: bool = False,
    ) -> QuantizerResult:
        """x: (B, width_in, T). lengths: (B,) vectors of each item; none: all T. last: codebooks to use in eval mode; none: all.

        The loss `commitment` is the sum over the codebooks of the mean of (residual − value)², over the items that use it.
        padding_counts: padding is quantized as zeros, and counts in codebooks and losses, as in the authors' code.
        Training moves the codebooks and needs `draw` (purposes dropout, kmeans.i, replace.i).
        """
        if self.training and draw is None:
            raise ValueError("a residual quantizer that trains needs a draw")
        batch, _, frames = x.shape
        count = len(self.codebooks) if last is None or self.training else last
        used = self.draw_used(batch, draw).to(x.device) if self.training and draw is not None else None
        valid = torch.ones(batch, frames, dtype=torch.bool, device=x.device)
        if lengths is not None:
            valid = torch.arange(frames, device=x.device) < lengths[:, None]                       # (B, T)
        counted = torch.ones_like(valid) if padding_counts else valid
        codes, layers, losses, rows_of, statistics = [], [], [], [], []
        everything = lengths is None or padding_counts
        y = self.input_proj(x)
        with full_precision(x):
            residual = wide(y).transpose(1, 2) * valid[..., None]                                  # (B, T, width)
            for i in range(count):
                book, flat = self.book(i), residual.detach().flatten(0, 1)                         # (B · T, width)
                rows = flat if everything else flat[counted.flatten()]                             # (N, width)
                if self.training:
                    assert draw is not None
                    book.start(rows, draw, f"kmeans.{i}")
                index = book.encode(flat).view(batch, frames)
                value = book.decode(index).to(residual.dtype)                                      # before this step's update
                uses = counted if used is None else counted & (used > i)[:, None]
                error = (residual - value).square().mean(-1)                                       # (B, T)
                losses.append(self.commitment * (error * uses).sum() / uses.sum().clamp_min(1))
                if self.training:
                    statistics.append(count_and_sum(rows, index[counted], self.size))
                    rows_of.append(rows)
                value = residual + (value - residual).detach()
                taken = value * (valid if used is None else valid & (used > i)[:, None])[..., None]
                codes.append(index * counted)
                layers.append(taken.transpose(1, 2))
                residual = (residual - taken).detach()
            if self.training:
                assert draw is not None
                self.move(statistics, rows_of, draw)
            total = torch.stack(layers).sum(0)
        stacked, layer_losses = torch.stack(codes, 1), torch.stack(losses)
        return QuantizerResult(
            quantized=self.output_proj(total.to(y.dtype)), codes=stacked, layers=layers,
            losses={"commitment": layer_losses.sum()}, layer_losses={"commitment": layer_losses},
            health=self.health(stacked, counted) | {"dead": self.dead_share()},
        )

    def draw_used(self, batch: int, draw: Draw) -> Tensor:
        """(B,) codebooks that each item of a training batch uses."""
        used = draw.integers("dropout", 1, len(self.codebooks) + 1, (batch,))
        dropped = torch.arange(batch, device=used.device) < int(batch * self.dropout)
        return torch.where(dropped, used, len(self.codebooks))

    def health(self, codes: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """`codebook_health` of codes (B, K, T) where (B, T) is true."""
        return codebook_health(codes.transpose(1, 2)[counted].T[None], self.size)

    def encode(self, x: Tensor, last: int | None = None, first: int = 0) -> Tensor:
        """Codes (B, last − first, T) of x (B, width_in, T); see ResidualVQ."""
        return super().encode(self.input_proj(x), last, first)

    def decode(self, codes: Tensor, first: int = 0) -> Tensor:
        """(B, width_out, T) of codes (B, K, T) by the codebooks first … first + K − 1; under autocast in its type."""
        return self.output_proj(super().decode(codes, first))
