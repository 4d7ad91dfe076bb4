"""The continuous latent of a variational autoencoder: a diagonal Gaussian for each item."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0      # latent diffusion's clamp (Rombach et al. 2022, released code)


@dataclass
class DiagonalGaussian:
    """N(mean, exp(logvar)), element by element, in float32 or wider. Without `logvar` it is the point `mean`."""

    mean: Tensor
    logvar: Tensor | None = None

    @classmethod
    def from_moments(cls, moments: Tensor, variational: bool = True, dim: int = -1) -> "DiagonalGaussian":
        """moments: mean and log-variance side by side along `dim`; or the mean alone where `variational` is false."""
        moments = moments if moments.dtype == torch.float64 else moments.float()
        if not variational:
            return cls(moments)
        mean, logvar = moments.chunk(2, dim=dim)
        return cls(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    @property
    def std(self) -> Tensor:
        """Standard deviation; 0 for a point."""
        return torch.zeros_like(self.mean) if self.logvar is None else (self.logvar / 2).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise; noise is N(0, 1) of the mean's shape."""
        return self.mean if self.logvar is None else self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to N(0, I) in nats, summed over all but the first axis: (B,); 0 for a point."""
        if self.logvar is None:
            return self.mean.new_zeros(len(self.mean))
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "DiagonalGaussian":
        """The same distribution in another layout: `function` is applied to mean and log-variance (reshaping only)."""
        return DiagonalGaussian(function(self.mean), None if self.logvar is None else function(self.logvar))
