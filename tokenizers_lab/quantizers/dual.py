"""A semantic quantizer, and residual acoustic codebooks on what it leaves of another latent (LM-SPT, arXiv 2506.16738)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from .factorised import FactorisedRVQ, Level, combine
from .fsq import ProjectedFSQ
from .result import QuantizerResult


@dataclass
class DualResult:
    """Both parts and their sum."""

    semantic: QuantizerResult
    acoustic: QuantizerResult

    @property
    def quantized(self) -> Tensor:
        """(B, width, T): semantic and acoustic part together."""
        return self.semantic.quantized + self.acoustic.quantized

    @property
    def codes(self) -> Tensor:
        """(B, K, T), the semantic codebook first."""
        return torch.cat([self.semantic.codes, self.acoustic.codes], dim=1)


class DualRVQ(nn.Module):
    """One semantic codebook and residual acoustic ones; with `subtract`, the acoustic part quantizes what the semantic part
    left. The subtraction is not detached: acoustic losses train the semantic branch too.

    `semantic_usage` (1, N) and `acoustic_usage` (K − 1, M) are moving averages of how often each entry is taken in training.
    """

    semantic_usage: Tensor
    acoustic_usage: Tensor
    usage_updates: Tensor

    def __init__(
        self, width: int, codebooks: int, semantic_size: int, semantic_dim: int, acoustic_size: int, acoustic_dim: int,
        subtract: bool = True, fsq_levels: Sequence[int] = (),
    ):
        """codebooks: all of them, the semantic one included. fsq_levels: FSQ as the semantic quantizer; empty: a codebook."""
        super().__init__()
        self.subtract = subtract
        self.semantic: FactorisedRVQ | ProjectedFSQ = (
            ProjectedFSQ(width, fsq_levels) if fsq_levels else FactorisedRVQ(width, 1, semantic_size, semantic_dim)
        )
        self.acoustic = FactorisedRVQ(width, codebooks - 1, acoustic_size, acoustic_dim)
        self.semantic_size = self.semantic.size if isinstance(self.semantic, ProjectedFSQ) else semantic_size
        self.register_buffer("semantic_usage", torch.zeros(1, self.semantic_size))
        self.register_buffer("acoustic_usage", torch.zeros(codebooks - 1, acoustic_size))
        self.register_buffer("usage_updates", torch.zeros((), dtype=torch.int64))

    def encode(self, semantic: Tensor, acoustic: Tensor) -> Tensor:
        """Codes (B, K, T), the semantic one first, of two latents (B, width, T)."""
        codes = self.semantic.encode(semantic)
        codes = codes[:, None] if codes.dim() == 2 else codes
        rest = acoustic - self.decode_semantic(codes) if self.subtract else acoustic
        return torch.cat([codes, self.acoustic.encode(rest)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents (B, width, T) from codes (B, k, T) of the semantic and the first k − 1 acoustic codebooks."""
        semantic = self.decode_semantic(codes)
        return semantic if codes.shape[1] == 1 else semantic + self.decode_acoustic(codes)

    def decode_semantic(self, codes: Tensor) -> Tensor:
        """The semantic part alone (B, width, T) of codes (B, k, T)."""
        return self.semantic.decode(codes[:, 0] if isinstance(self.semantic, ProjectedFSQ) else codes[:, :1])

    def decode_acoustic(self, codes: Tensor) -> Tensor:
        """The acoustic part alone (B, width, T) of codes (B, k, T), k from 2 on."""
        return self.acoustic.decode(codes[:, 1:])

    def forward(self, semantic: Tensor, acoustic: Tensor, used: Tensor | None = None) -> DualResult:
        """Two latents (B, width, T). used: (B,) acoustic codebooks that count for each item; none: all.

        In training mode the usage buffers move on.
        """
        first = self.semantic(semantic)
        first = combine([first]) if isinstance(first, Level) else first
        rest = acoustic - first.quantized if self.subtract else acoustic
        result = DualResult(first, self.acoustic(rest, used))
        if self.training:
            self.update_usage(result)
        return result

    @torch.no_grad()
    def update_usage(self, result: DualResult) -> None:
        """Count the codes of all processes: the first call sets the buffers, calls 2 to 100 move them by a tenth, later ones
        by a hundredth."""
        self.usage_updates += 1
        for buffer, codes in ((self.semantic_usage, result.semantic.codes), (self.acoustic_usage, result.acoustic.codes)):
            flat = codes.transpose(0, 1).flatten(1)                                          # (K, B · T)
            counts = torch.zeros_like(buffer).scatter_add_(1, flat, torch.ones_like(flat, dtype=buffer.dtype))
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(counts)
            counts /= counts.sum()                       # over all codebooks of the group, as the authors have it
            new = torch.where(self.usage_updates > 100, 0.01, 0.1)
            buffer.copy_(torch.where(self.usage_updates == 1, counts, torch.lerp(buffer, counts, new)))

    def usage(self) -> dict[str, Tensor]:
        """Share of entries that were taken lately, of the semantic and the acoustic codebooks."""
        return {
            "semantic_usage": (self.semantic_usage > 0).float().mean(),
            "acoustic_usage": (self.acoustic_usage > 0).float().mean(),
        }
