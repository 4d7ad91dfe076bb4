"""Grouped vector quantization: the channels are cut into groups, each with a codebook of its own on the unit sphere."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codebook import by_rows, full_precision, wide
from .result import QuantizerResult, codebook_health

SPREAD = 36      # the entries start in U(−a, a), a = (channels of a group)^−½ / 36
LOG_FLOOR = 1e-7


class GroupedVQ(nn.Module):
    """K codebooks of size / K entries for K groups of channels; groups and entries are divided by their length, the largest
    cosine wins. Losses: `quantizer` (entries to latents + beta · latents to entries) and `entropy` (mean entropy of the softmax
    of −distance² / temperature, less the entropy of its mean), means over the codebooks. As in VFM-VAE's discrete mode.
    """

    def __init__(self, width: int, codebooks: int, size: int, beta: float = 0.25, temperature: float = 0.01):
        """width: channels of all groups; size: entries of all codebooks. Raises ValueError unless K divides both."""
        super().__init__()
        if width % codebooks or size % codebooks:
            raise ValueError(f"{codebooks} codebooks must divide {width} channels and {size} entries")
        self.codebooks, self.size, self.beta, self.temperature = codebooks, size // codebooks, beta, temperature
        dim = width // codebooks
        self.weight = nn.Parameter(torch.empty(codebooks, self.size, dim).uniform_(-1, 1) * dim**-0.5 / SPREAD)

    def groups(self, x: Tensor) -> Tensor:
        """Unit vectors (K, N, d) of latents (B, K · d, T), N = B · T; float32 or wider."""
        split = wide(x).unflatten(1, (self.codebooks, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        return F.normalize(split, dim=-1)

    def entries(self) -> Tensor:
        """Unit vectors (K, size, d)."""
        return F.normalize(wide(self.weight), dim=-1)

    def lookup(self, groups: Tensor) -> Tensor:
        """Codes (K, N): the entry of the largest cosine, the first on a tie."""
        with torch.no_grad(), full_precision(groups):
            found = []
            for group, entries in zip(groups, self.entries()):
                def best(part: Tensor, entries: Tensor = entries) -> Tensor:
                    return (part @ entries.t()).argmax(1)

                found.append(by_rows(best, group, self.size))
            return torch.stack(found)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, K, T) int64 of x (B, D, T)."""
        return self.lookup(self.groups(x)).unflatten(1, (x.shape[0], -1)).transpose(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, D, T) of codes (B, K, T)."""
        entries = self.entries()
        return torch.cat([F.embedding(codes[:, k], entries[k]).transpose(1, 2) for k in range(self.codebooks)], dim=1)

    def forward(self, x: Tensor, entropy: bool = False) -> QuantizerResult:
        """x: (B, D, T). The gradient passes straight through to the unit vectors. entropy: also the loss of that name."""
        with full_precision(x):
            groups = self.groups(x)                                                       # (K, N, d)
            codes = self.lookup(groups)
            entries = self.entries()
            found = torch.stack([F.embedding(code, entry) for code, entry in zip(codes, entries)])
            losses = {"quantizer": self.beta * F.mse_loss(groups, found.detach()) + F.mse_loss(found, groups.detach())}
            if entropy:
                losses["entropy"] = torch.stack([self.entropy(g, e) for g, e in zip(groups, entries)]).mean()
            straight = groups + (found - groups).detach()
        quantized = straight.unflatten(1, (x.shape[0], -1)).permute(1, 0, 3, 2).flatten(1, 2)
        codes = codes.unflatten(1, (x.shape[0], -1)).transpose(0, 1)
        health = codebook_health(codes, self.size) if self.training else {}
        return QuantizerResult(quantized.to(x.dtype), codes, losses, health=health)

    def entropy(self, group: Tensor, entries: Tensor) -> Tensor:
        """Of one codebook: group (N, d), entries (size, d), both unit vectors."""
        logits = -(2 - 2 * group @ entries.t()) / self.temperature                        # −|g − e|² / τ
        shares, logs = logits.softmax(1), logits.log_softmax(1)
        mean = shares.mean(0)
        return -(shares * logs).sum(1).mean() + (mean * (mean + LOG_FLOOR).log()).sum()
