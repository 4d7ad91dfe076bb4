"""Stateless randomness: every draw is a value seeded by (seed, rank, step, purpose).

No global seed is read, adding a draw changes no other, and a resumed run needs no saved generator.
"""

import hashlib

import torch
from torch import Tensor


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, the same on every machine and Python (BLAKE2b of their text)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draw:
    """Random values by purpose. A test may pass any object with the same methods, such as one that returns given tensors."""

    def __init__(self, seed: int, rank: int = 0, step: int = 0, device: torch.device | str = "cpu", scope: str = ""):
        self.seed, self.rank, self.step, self.device, self.scope = seed, rank, step, torch.device(device), scope

    def within(self, scope: str) -> "Draw":
        """The same draws under another name, such as one for each micro-batch."""
        return Draw(self.seed, self.rank, self.step, self.device, f"{self.scope}/{scope}")

    def generator(self, purpose: str) -> torch.Generator:
        """A generator on this draw's device, seeded for the purpose."""
        seed = stable_seed(self.seed, self.rank, self.step, self.scope, purpose)
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """N(0, 1), float32."""
        return torch.randn(shape, generator=self.generator(purpose), device=self.device)

    def uniform(self, purpose: str, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
        """U(low, high), float32."""
        return low + (high - low) * torch.rand(shape, generator=self.generator(purpose), device=self.device)

    def integers(self, purpose: str, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Integers in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self.generator(purpose), device=self.device)

    def permutation(self, purpose: str, n: int) -> Tensor:
        """A permutation of 0 … n − 1, int64."""
        return torch.randperm(n, generator=self.generator(purpose), device=self.device)
