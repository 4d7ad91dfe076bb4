"""SiT (Ma et al. 2024, arXiv 2401.08740), optionally with REG's class token (arXiv 2507.01467)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokenizers_lab.diffusion.flow import FlowPath, Velocity
from tokenizers_lab.diffusion.samplers import euler_maruyama, sde_times
from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.generation.config import SamplingConfig, latent_shift
from tokenizers_lab.eval.generation.generator import GeneratorOutput, LatentGenerator, seeded_normal
from tokenizers_lab.nn.dit import DiTBlock, FinalLayer, LabelEmbedding, TimeEmbedding, init_dit, mlp_hidden
from tokenizers_lab.nn.patch import PatchEmbed, depth_to_space, sincos_positions
from tokenizers_lab.nn.transformer import BlockStack

from .config import ModelConfig, check_model

NORM, NORM_EPS = "layer_norm", 1e-6


@dataclass
class SiTOutput(GeneratorOutput):
    """Velocity and tokens; the class token's are the first of the tokens and `class_velocity`."""

    class_velocity: Tensor | None = None      # (B, class_token), where the network has a class token


class SiT(LatentGenerator, BlockStack):
    """Full attention over tokens with a fixed position table; time and class modulate every block.

    With `class_token` (REG), a vector of that width is noised along the same path at the same time as the latents, enters as a
    token in front of theirs, and has a velocity of its own. A solver's state is then both, flat: the latents (C, h, w), then the
    class token; `sample` gives the latents.
    """

    system: ClassVar[str] = "sit"
    path = FlowPath("noise")
    cfg: ModelConfig
    positions: Tensor

    def __init__(self, cfg: ModelConfig):
        """Raises ConfigError on sizes that do not fit together."""
        check_model(cfg)
        super().__init__(cfg)
        self.embed = PatchEmbed(cfg.channels, cfg.width, cfg.patch)
        self.time_embed = TimeEmbedding(cfg.width)
        self.label_embed = LabelEmbedding(cfg.classes, cfg.width)
        self.blocks = nn.ModuleList(
            DiTBlock(cfg.width, cfg.heads, mlp_hidden(cfg.width, cfg.mlp_ratio, swiglu=False), NORM, cfg.qk_norm, swiglu=False)
            for _ in range(cfg.depth)
        )
        self.final = FinalLayer(cfg.width, cfg.patch**2 * cfg.channels, NORM)
        positions = sincos_positions(cfg.grid // cfg.patch, cfg.width)
        if cfg.class_token is not None:
            self.class_embed = nn.Linear(cfg.class_token, cfg.width)
            self.class_norm = nn.LayerNorm(cfg.width, NORM_EPS)
            self.class_out = nn.Linear(cfg.width, cfg.class_token)
            positions = torch.cat([torch.zeros(1, 1, cfg.width), positions], dim=1)       # the class token has no position
        self.register_buffer("positions", positions)                                      # (1, N or 1 + N, width)
        init_dit(self)
        if cfg.class_token is not None:
            nn.init.zeros_(self.class_out.weight)

    def forward(
        self, x: Tensor, time: Tensor, labels: Tensor, tokens_after: int | None = None, class_token: Tensor | None = None
    ) -> SiTOutput:
        """Velocities of noisy latents x (B, C, h, w) and of the noisy class_token (B, cfg.class_token) at times (B,), 1 at noise.

        labels: (B,) int64. tokens_after: give the tokens (B, N, width) after that many blocks too, the class token's first.
        Raises InputError on other shapes, and on a class token that is missing or not foreseen.
        """
        self.check_latents(x)
        tokens = self.embed(x)                                                            # (B, N, width)
        if self.cfg.class_token is not None:
            self.check_class_token(class_token, len(x))
            assert class_token is not None
            first = self.class_norm(self.class_embed(class_token.to(tokens.dtype)))       # (B, width)
            tokens = torch.cat([first[:, None].to(tokens.dtype), tokens], dim=1)          # (B, 1 + N, width)
        elif class_token is not None:
            raise InputError("this SiT has no class token (model.class_token)")
        tokens = tokens + self.positions.to(tokens.dtype)
        condition = self.time_embed(time) + self.label_embed(labels)                      # (B, width)
        kept = None
        for number, block in enumerate(self.blocks, start=1):
            tokens = self.run(block, tokens, condition)
            if number == tokens_after:
                kept = tokens
        tokens = self.final.modulated(tokens, condition)
        class_velocity = None
        if self.cfg.class_token is not None:
            class_velocity, tokens = self.class_out(tokens[:, 0]), tokens[:, 1:]
        side = self.cfg.grid // self.cfg.patch
        velocity = depth_to_space(self.final.linear(tokens), side, side, self.cfg.patch)
        return SiTOutput(velocity, kept, class_velocity)

    def check_class_token(self, class_token: Tensor | None, items: int) -> None:
        """Raise InputError unless it is (items, cfg.class_token)."""
        wanted = (items, self.cfg.class_token)
        if class_token is None or tuple(class_token.shape) != wanted:
            given = "nothing" if class_token is None else tuple(class_token.shape)
            raise InputError(f"this SiT generates a class token beside the latents: it must be {wanted}, not {given}")

    # --- sampling -------------------------------------------------------------------------------------------------------

    @property
    def state_shape(self) -> tuple[int, ...]:
        """(C, h, w), or with a class token (C·h·w + class_token,)."""
        if self.cfg.class_token is None:
            return self.latent_shape
        return (self.cfg.channels * self.cfg.grid**2 + self.cfg.class_token,)

    def join(self, latents: Tensor, class_token: Tensor) -> Tensor:
        """States (B, *state_shape) of latents (B, C, h, w) and class tokens (B, class_token)."""
        return torch.cat([latents.flatten(1), class_token.to(latents.dtype)], dim=1)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The way back from `join`."""
        count = self.cfg.channels * self.cfg.grid**2
        return state[:, :count].unflatten(1, self.latent_shape), state[:, count:]

    def velocity(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The velocity of states (B, *state_shape)."""
        if self.cfg.class_token is None:
            return super().velocity(x, time, labels)
        latents, class_token = self.split(x)
        made = self(latents, time, labels, class_token=class_token)
        return self.join(made.velocity, made.class_velocity)

    def guided_velocity(self, labels: Tensor, sampling: SamplingConfig, guide: LatentGenerator | None = None) -> Velocity:
        """See LatentGenerator. The class token is guided as the latents are, unless only some of their channels are."""
        if self.cfg.class_token is not None and sampling.guided_channels is not None:
            sampling = replace(sampling, guided_channels=sampling.guided_channels * self.cfg.grid**2)      # of a flat state
        return super().guided_velocity(labels, sampling, guide)

    def times(self, sampling: SamplingConfig) -> Tensor:
        """See LatentGenerator; of euler_maruyama REG's, whose last step, without noise, begins at 0.04.

        Raises InputError if sampling.stop is not before that.
        """
        if sampling.solver != "euler_maruyama":
            return super().times(sampling)
        return sde_times(sampling.steps, shift=sampling.shift or latent_shift(self.cfg), stop=sampling.stop)

    def solve(self, velocity: Velocity, noise: Tensor, sampling: SamplingConfig, seeds: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w), float32, from noise (B, *state_shape); the SDE's noise of each image from its own seed."""
        if sampling.solver == "euler_maruyama":
            def step_noise(step: int) -> Tensor:
                return seeded_normal(seeds, self.state_shape, step).to(noise.device)

            state = euler_maruyama(velocity, noise, self.times(sampling), step_noise)
        else:
            state = super().solve(velocity, noise, sampling, seeds)
        return state if self.cfg.class_token is None else self.split(state)[0]
