"""Options of SiT and REG."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.eval.generation.config import (
    TERMS,
    GeneratorConfig,
    LatentObjectiveConfig,
    SamplingConfig,
    check_generator,
    validate_generator,
)


class Size(NamedTuple):
    """Of a network that the papers name by a letter."""

    width: int
    depth: int
    heads: int


# SiT, tab. 1 of DiT; REG aligns after 4 blocks of B, 8 of L and XL
SIZES = {"B": Size(768, 12, 12), "L": Size(1024, 24, 16), "XL": Size(1152, 28, 16)}


@dataclass
class ModelConfig(GeneratorConfig):
    """SiT. Its clock has the data at 0 and noise at 1. Sizes: B 768, 12, 12; L 1024, 24, 16; XL 1152, 28, 16."""

    patch: int = 1                    # positions of the latents a side that are one token
    width: int = 1152                 # channels of a token, a multiple of 4 and of heads
    depth: int = 28                   # blocks
    heads: int = 16                   # of the attention
    mlp_ratio: float = 4.0            # hidden channels of the MLPs over the width
    qk_norm: bool = False             # layer norms of queries and keys
    class_token: int | None = None    # REG: channels of the class token that is generated beside the latents; none: plain SiT
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(solver="euler_maruyama", steps=250))

    @property
    def token_width(self) -> int:
        """Channels of the hidden tokens."""
        return self.width


@dataclass
class ObjectiveConfig(LatentObjectiveConfig):
    """Flow matching with REG's terms: class_mse and alignment need images, and `teacher`, whose class token and patch features
    they are about. A teacher without a class token (a CNN, SigLIP) gives the mean of its patch features in its place."""


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    check_generator(cfg, where)
    if min(cfg.patch, cfg.width, cfg.depth, cfg.heads) < 1 or cfg.mlp_ratio <= 0:
        raise ConfigError(f"{where}: patch, width, depth and heads must be at least 1 and mlp_ratio above 0")
    if cfg.grid % cfg.patch:
        raise ConfigError(f"{where}.grid {cfg.grid} must be a multiple of {where}.patch {cfg.patch}")
    if cfg.width % cfg.heads or cfg.width % 4:
        raise ConfigError(f"{where}.width {cfg.width} must be a multiple of 4 and of {where}.heads {cfg.heads}")
    if cfg.class_token is not None and cfg.class_token < 1:
        raise ConfigError(f"{where}.class_token must be at least 1, or none for plain SiT; not {cfg.class_token}")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    check_model(cfg.model)
    validate_generator(cfg, (*TERMS, "class_mse"))
    if cfg.model.class_token is not None and cfg.objective.teacher is None:
        raise ConfigError(f"model.class_token {cfg.model.class_token} needs objective.teacher, whose class token it is")
    if cfg.model.class_token is not None and cfg.objective.tokenizer is None:
        raise ConfigError("model.class_token needs images for the teacher, so objective.tokenizer: cached latents show none")
    for i, stage in enumerate(cfg.stages):
        if stage.weights.get("class_mse") and cfg.model.class_token is None:
            raise ConfigError(f"stages.{i}.weights.class_mse needs model.class_token")
        if stage.weights.get("alignment") and cfg.objective.align_after > cfg.model.depth:
            raise ConfigError(f"objective.align_after {cfg.objective.align_after} is above model.depth {cfg.model.depth}")
