"""Base class of the generators of latents, and how they are sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.diffusion.flow import FlowPath, Velocity
from tokenizers_lab.diffusion.guidance import conditioned, guided
from tokenizers_lab.diffusion.samplers import find_sampler
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import InputError
from tokenizers_lab.network import Network

from .config import GeneratorConfig, SamplingConfig, latent_shift

__all__ = ["GeneratorConfig", "GeneratorOutput", "LatentGenerator", "SamplingConfig", "seeded_normal"]


@dataclass
class GeneratorOutput:
    """What a generator says of noisy latents."""

    velocity: Tensor                  # (B, C, h, w) by its own clock
    tokens: Tensor | None = None      # (B, N, D) hidden tokens, where they were asked for


class LatentGenerator(Network):
    """A network that knows the velocity of noisy latents under a class. A subclass sets `system` and `path`.

    Latents are those of the tokenizer that `provenance["tokenizer"]` names, normalised by `latent_mean` and `latent_std`,
    (C, 1, 1): 0 and 1 where the tokenizer normalises them itself.
    """

    path = FlowPath("data")
    cfg: Any
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, cfg: GeneratorConfig):
        super().__init__(cfg)
        self.register_buffer("latent_mean", torch.zeros(cfg.channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(cfg.channels, 1, 1))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, tokens_after: int | None = None) -> GeneratorOutput:
        """x: (B, C, h, w) at times (B,); labels: (B,) int64, `null_class` for none. tokens_after: give the hidden tokens after
        that many blocks too."""
        raise NotImplementedError

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return int(self.cfg.classes)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        return self.cfg.channels, self.cfg.grid, self.cfg.grid

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of what the solver integrates for one image: the latents', unless a network joins something to them."""
        return self.latent_shape

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The velocity of states (B, *state_shape), for solvers."""
        return self(x, time, labels).velocity

    def normalise(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) as the tokenizer gives them → of mean 0 and deviation 1. Raises InputError on another shape."""
        self.check_latents(latents)
        return (latents - self.latent_mean) / self.latent_std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The way back, to what the tokenizer decodes."""
        return latents * self.latent_std + self.latent_mean

    def check_latents(self, latents: Tensor) -> None:
        """Raise InputError unless latents are (B, C, h, w) of this generator."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise InputError(f"latents must be (B, {', '.join(map(str, self.latent_shape))}) as model.channels and model.grid "
                             f"say, not {tuple(latents.shape)}")

    def check_labels(self, labels: Tensor) -> None:
        """Raise InputError unless labels are (B,) int64 in [0, classes]."""
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise InputError(f"labels must be int64 (B,), not {labels.dtype} {tuple(labels.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= self.null_class:
            raise InputError(f"labels must be classes from 0 to {self.null_class - 1}, or {self.null_class} for none, not "
                             f"{int(labels.min())} to {int(labels.max())}")

    def start_run(self, cfg: Any) -> None:
        """Take the tokenizer's name and hash from the data, and the statistics by which its latents are normalised."""
        from .data import describe_latents

        about = describe_latents(cfg)
        self.provenance = {**self.provenance, "tokenizer": about.tokenizer, "data": about.data}
        if about.classes:
            self.provenance["classes"] = list(about.classes)
        if about.mean is not None and about.std is not None:
            self.set_latent_statistics(about.mean, about.std)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Normalise by these, (C,) each. Raises InputError unless std > 0."""
        channels = self.cfg.channels
        if mean.shape != (channels,) or std.shape != (channels,) or not bool((std > 0).all()):      # also for NaN
            raise InputError(f"latent statistics must be two vectors of {channels} numbers (model.channels), the second above 0, "
                             f"not {tuple(mean.shape)} and {tuple(std.shape)}")
        self.latent_mean.copy_(mean[:, None, None])
        self.latent_std.copy_(std[:, None, None])

    def guided_velocity(self, labels: Tensor, sampling: SamplingConfig, guide: "LatentGenerator | None" = None) -> Velocity:
        """The velocity of states under these labels with the guidance that is asked for: away from no class, or from a weaker
        generator (`guide`) of the same latents under the same labels (autoguidance, Karras et al. 2024)."""
        mine = conditioned(self.velocity, labels)
        if guide is None:
            other = conditioned(self.velocity, torch.full_like(labels, self.null_class))
        elif guide.state_shape != self.state_shape or guide.path != self.path:
            raise InputError(f"the guide generates {guide.state_shape} by {guide.path}, not {self.state_shape} by {self.path}")
        else:
            other = conditioned(guide.velocity, labels)
        low, high = sampling.guidance_low, sampling.guidance_high
        within = (float("-inf"), float("inf")) if low <= 0 and high >= 1 else (low, high)
        return guided(mine, other, sampling.guidance, within, channels=sampling.guided_channels)

    def times(self, sampling: SamplingConfig) -> Tensor:
        """The solver's times from noise to data, (steps + 1,) float64."""
        shift = sampling.shift or latent_shift(self.cfg)
        return self.path.times(sampling.steps, shift, stop=sampling.stop)

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, seeds: Sequence[int], sampling: SamplingConfig | None = None,
        guide: "LatentGenerator | None" = None, progress: Callable[[], None] | None = None,
    ) -> Tensor:
        """Normalised latents (B, C, h, w) of these classes, (B,) int64; none: the network's own `sampling`.

        The noise of an image follows from its own seed, so that it does not depend on what is sampled beside it. progress: called
        at each evaluation of the velocity. Raises InputError on labels, seeds or a guide that do not fit.
        """
        self.check_labels(labels)
        if len(seeds) != len(labels):
            raise InputError(f"each of {len(labels)} labels needs a seed; there are {len(seeds)}")
        sampling = sampling or self.cfg.sampling
        noise = seeded_normal(seeds, self.state_shape, "start").to(self.device)
        velocity = self.guided_velocity(labels.to(self.device), sampling, guide)
        return self.solve(counted(velocity, progress), noise, sampling, seeds)

    def solve(self, velocity: Velocity, noise: Tensor, sampling: SamplingConfig, seeds: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w) from noise (B, *state_shape). seeds: for what a stochastic solver draws."""
        return find_sampler(sampling.solver)(velocity, noise, self.times(sampling))


def seeded_normal(seeds: Sequence[int], shape: tuple[int, ...], purpose: str | int) -> Tensor:
    """(B, *shape) of N(0, 1), float32 on the CPU, each item from its own seed: the same on every machine and in any batch."""
    generators = [torch.Generator().manual_seed(stable_seed(seed, "generate", purpose)) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def counted(velocity: Velocity, progress: Callable[[], None] | None) -> Velocity:
    """The same velocity, which calls `progress` at each evaluation."""
    if progress is None:
        return velocity

    def told(x: Tensor, time: Tensor) -> Tensor:
        progress()
        return velocity(x, time)

    return told
