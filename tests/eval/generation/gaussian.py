"""A generator whose velocity is known in closed form: data of each class are normal, so that x₁ = mean + deviation · noise."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from toy import SIZE, Toy, ToyConfig, pictures

from tokenizers_lab.eval.generation.config import GeneratorConfig, SamplingConfig
from tokenizers_lab.eval.generation.generator import GeneratorOutput, LatentGenerator
from tokenizers_lab.eval.provenance import weights_sha256

CHANNELS, GRID, CLASSES = 6, SIZE // 8, 3
EXACT = SamplingConfig(solver="heun", steps=40)


@dataclass
class GaussianConfig(GeneratorConfig):
    """Of the toy's latents."""

    channels: int = CHANNELS
    grid: int = GRID
    classes: int = CLASSES
    deviation: float = 0.4


class Gaussian(LatentGenerator):
    """Marginal velocity of x_t = t·x₁ + (1 − t)·x₀ with x₁ ~ N(mean of the class, deviation²)."""

    system = "gaussian"

    def __init__(self, cfg: GaussianConfig):
        super().__init__(cfg)
        means = torch.linspace(-1, 1, (cfg.classes + 1) * cfg.channels).reshape(cfg.classes + 1, cfg.channels, 1, 1)
        self.means = nn.Parameter(means)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, tokens_after: int | None = None) -> GeneratorOutput:
        mean, variance, t = self.means[labels], self.cfg.deviation**2, time[:, None, None, None].float()
        slope = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
        return GeneratorOutput(mean + slope * (x - t * mean))


def gaussian(deviation: float = 0.4) -> Gaussian:
    """With statistics that are neither 0 nor 1."""
    network = Gaussian(GaussianConfig(deviation=deviation))
    network.set_latent_statistics(torch.linspace(-0.2, 0.2, CHANNELS), torch.linspace(0.1, 0.3, CHANNELS))
    return network.eval().requires_grad_(False)


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig(channels=CHANNELS)).fit(pictures(16)).eval()


def pair() -> tuple[Gaussian, Toy]:
    """A generator and the tokenizer that it names."""
    network, tokenizer = gaussian(), toy()
    network.provenance["tokenizer"] = {"name": "toy", "sha256": weights_sha256(tokenizer)}
    return network, tokenizer
