"""Quantization to signs: binary spherical (BSQ, arXiv 2406.07548) and lookup-free (LFQ, MAGVIT-2, arXiv 2310.05737).

A vector of `bits` dimensions becomes the signs of its dimensions; the code is the number that they spell, dimension 0 being
the most significant bit. There is no table: 2^bits codes cost no memory, and every code gives back its vector exactly.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codebook import distributed, full_precision, wide
from .result import QuantizerResult, codebook_health

EPS = 1e-8                # inside logarithms, as in the authors' code
LARGEST_GROUP = 24        # dimensions whose joint distribution is held: 2^24 probabilities
COUNTED = 20              # bits up to which the use of every code is counted


class BinaryQuantizer(nn.Module):
    """Vectors (B, bits, T) to signs. Without parameters; projections stand around it.

    spherical: BSQ. Vectors are laid on the unit sphere, a code's entries are ±1/√bits. Else LFQ: taken as they are, ±1.
    group: the entropy of the mean distribution over codes is summed over groups of so many dimensions, as if they were
    independent (BSQ: 1); 0: the joint distribution over all 2^bits codes, exactly (LFQ).
    inverse_temperature: of the soft assignment in the entropies, softmax(2 · τ · ⟨z, code⟩) over the codes.
    """

    basis: Tensor

    def __init__(self, bits: int, spherical: bool = True, group: int = 1, inverse_temperature: float = 1.0):
        """Raises ValueError on sizes that make no code or a distribution too large to hold."""
        super().__init__()
        group = group or bits
        if not 1 <= bits <= 62:
            raise ValueError(f"a code has 1 to 62 bits, not {bits}")
        if group < 1 or bits % group or group > LARGEST_GROUP:
            raise ValueError(f"a group of {group} dimensions must divide {bits} and have at most {LARGEST_GROUP}")
        self.bits, self.spherical, self.group, self.inverse_temperature = bits, spherical, group, inverse_temperature
        self.level = bits**-0.5 if spherical else 1.0      # a code's entries are ± this
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1)[:, None], persistent=False)      # (bits, 1)

    @property
    def size(self) -> int:
        """How many codes there are."""
        return 2**self.bits

    def place(self, x: Tensor) -> Tensor:
        """x (B, bits, T) in float32, on the unit sphere if the quantizer is spherical."""
        with full_precision(x):
            return F.normalize(wide(x), dim=1, eps=1e-12) if self.spherical else wide(x)

    def number(self, positive: Tensor) -> Tensor:
        """Codes (B, 1, T) int64 of bits (B, bits, T), true where a dimension is positive."""
        return (positive * self.basis).sum(1, keepdim=True)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, 1, T) int64 of x (B, bits, T); 0 counts as negative."""
        return self.number(x > 0)

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (B, bits, T) of codes (B, 1, T) int64 in [0, 2^bits)."""
        return torch.where((codes & self.basis) != 0, self.level, -self.level)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> QuantizerResult:
        """x: (B, bits, T). counted: (B, T) bool, the vectors that the losses count; none: all. See `quantize`."""
        return self.quantize(self.place(x), counted, x.dtype)

    def quantize(self, z: Tensor, counted: Tensor | None = None, dtype: torch.dtype | None = None) -> QuantizerResult:
        """z: (B, bits, T) as `place` gives it. The gradient passes straight through, times `level`, as in the authors' code.

        Losses, in training mode only (else 0): `commitment`, mean over vectors of ‖sg(code) − z‖²; `sample_entropy`, the mean
        entropy of a vector's soft code in nats; `codebook_entropy`, that of their mean over all vectors and ranks. BSQ and LFQ
        minimise γ0 · sample_entropy − γ · codebook_entropy.
        """
        z = wide(z)
        positive = z > 0
        codes = self.number(positive)
        with full_precision(z):
            value = torch.where(positive, self.level, -self.level).to(z.dtype)
            if not self.training:
                nothing = dict.fromkeys(("commitment", "sample_entropy", "codebook_entropy"), z.new_zeros(()))
                return QuantizerResult(value.to(dtype or z.dtype), codes, nothing, [value])
            losses = self.losses(z, value, counted)
            quantized = value + (z - z.detach()) * self.level      # z − z is 0: the value stays exactly ±level
        health = {"balance": positive.float().mean((0, 2)).mul(2).sub(1).abs().mean()}      # 0: each bit is set half the time
        if self.bits <= COUNTED:
            health |= codebook_health(codes, self.size)
        return QuantizerResult(quantized.to(dtype or z.dtype), codes, losses, [quantized], health=health)

    def losses(self, z: Tensor, value: Tensor, counted: Tensor | None) -> dict[str, Tensor]:
        """The losses of `quantize`; z and its code's vectors (B, bits, T)."""
        rows, values = (t.transpose(1, 2).reshape(-1, self.bits) for t in (z, value))                   # (N, bits)
        if counted is not None:
            rows, values = rows[counted.flatten()], values[counted.flatten()]
        logits = rows * (4 * self.inverse_temperature * self.level)      # p(+1) = sigmoid: two codes differ by 2 · level
        return {
            "commitment": (values - rows).square().sum(1).mean(),
            "sample_entropy": bit_entropy(logits).sum(1).mean(),
            "codebook_entropy": entropy(mean_over_ranks(mean_distribution(logits, self.group))).sum(),
        }


def bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the coin whose log odds are `logits`, of any shape; no cancellation where it is nearly decided."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def entropy(p: Tensor) -> Tensor:
    """−Σ p · log(p + 1e-8) over the last axis."""
    return -(p * (p + EPS).log()).sum(-1)


def mean_distribution(logits: Tensor, group: int) -> Tensor:
    """(bits / group, 2^group): the mean over N vectors of the distribution over each group's sign patterns.

    logits: (N, bits), the bits' log odds. A vector's distribution is the product of those of its bits, so the mean over the
    vectors is one matrix product of the halves' distributions: no (N, 2^group) matrix is made.
    """
    p = torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], -1)                                # (N, bits, 2)
    p = p.view(len(logits), -1, group, 2).transpose(0, 1)                                               # (G, N, group, 2)
    left, right = joint(p[:, :, : group // 2]), joint(p[:, :, group // 2 :])
    return (left.transpose(1, 2) @ right).flatten(1) / len(logits)


def joint(p: Tensor) -> Tensor:
    """(G, N, 2^h): the distribution of h independent bits p (G, N, h, 2), the first one the most significant."""
    made = p.new_ones(*p.shape[:2], 1)
    for i in range(p.shape[2]):
        made = (made[..., None] * p[:, :, i, None, :]).flatten(2)
    return made


def mean_over_ranks(mean: Tensor) -> Tensor:
    """The mean of all ranks' means; the gradient is that of this rank's share, which DDP averages."""
    if not distributed():
        return mean
    of_all = mean.detach().clone()
    torch.distributed.all_reduce(of_all)
    return mean + (of_all / torch.distributed.get_world_size() - mean).detach()
