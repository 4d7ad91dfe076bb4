"""Options that all generators of latents share."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.diffusion.flow import DISTRIBUTIONS, TimeConfig, resolution_shift
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig

TERMS = ("mse", "cosine", "alignment")
STAGE_MAY_CHANGE = ("time", "label_drop", "sample_posterior")
SOLVERS = ("euler", "euler_midpoint", "midpoint", "heun", "dopri5", "euler_maruyama")


@dataclass
class SamplingConfig:
    """How images are drawn where nothing else is asked for. Times are of the generator's own clock."""

    solver: str = "euler"             # euler, heun, midpoint, dopri5 (adaptive) or euler_maruyama (stochastic; SiT)
    steps: int = 50                   # of the solver; codes that speak of n grid points take n − 1
    shift: float = 1.0                # s·u / (1 + (s − 1)·u) of the noise's share: s > 1 puts more steps near noise;
                                      # 0: √(numbers of a latent / 4096), at least 1
    stop: float = 0.0                 # noise's share, before the shift, at which sampling ends short of the data (RAE: 0.001)
    guidance: float = 1.0             # v_null + guidance · (v − v_null); 1: none
    guidance_low: float = 0.0         # guide from this time on
    guidance_high: float = 1.0        # and up to this one
    guided_channels: int | None = None   # guide only the first so many channels (LightningDiT's code: 3); none: all


@dataclass
class GeneratorConfig:
    """What is generated. Each network adds its own sizes."""

    channels: int = 32                # C of the latents
    grid: int = 16                    # positions a side of the latents
    classes: int = 1000               # classes that it is asked for; one more stands for none
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def token_width(self) -> int:
        """Channels of the hidden tokens that REPA aligns."""
        raise NotImplementedError


@dataclass
class LatentObjectiveConfig:
    """Flow matching on normalised latents. Weights live in the stages."""

    tokenizer: str | None = None      # encodes images on the fly: a run, a saved folder, SYSTEM/official, a hub id; none: the
                                      # data are cached latents
    sample_posterior: bool = True     # draw from the posterior, where tokenizer or cache have one, else take its mean
    time: TimeConfig = field(default_factory=TimeConfig)      # of a step, by the generator's clock; shift 0: by the latents' size
    label_drop: float = 0.1           # share of labels replaced by the class that stands for none
    teacher: VisionTeacherConfig | None = None      # whose features the hidden tokens follow (REPA), for the term alignment
    align_after: int = 8              # blocks after which the tokens are taken
    align_width: int = 2048           # hidden channels of the projector


def latent_shift(cfg: GeneratorConfig) -> float:
    """√(numbers of a latent / 4096), at least 1 (RecTok's and RAE's codes)."""
    return max(1.0, resolution_shift(cfg.channels * cfg.grid**2))


def check_generator(cfg: GeneratorConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes or sampling options out of range."""
    if min(cfg.channels, cfg.grid, cfg.classes) < 1:
        raise ConfigError(f"{where}: channels, grid and classes must be at least 1")
    check_sampling_config(cfg.sampling, f"{where}.sampling")


def check_sampling_config(cfg: SamplingConfig, where: str) -> None:
    """Raise ConfigError on an unknown solver or a value out of range."""
    if cfg.solver not in SOLVERS:
        raise ConfigError(f"{where}.solver must be one of {', '.join(SOLVERS)}; not '{cfg.solver}'")
    if cfg.steps < 1 or cfg.shift < 0 or not 0 <= cfg.stop < 1:
        raise ConfigError(f"{where} needs steps ≥ 1, shift ≥ 0 and 0 ≤ stop < 1, not {cfg.steps}, {cfg.shift:g}, {cfg.stop:g}")
    if cfg.guidance_low > cfg.guidance_high:
        raise ConfigError(f"{where}.guidance_low {cfg.guidance_low:g} is above guidance_high {cfg.guidance_high:g}")
    if cfg.guided_channels is not None and cfg.guided_channels < 1:
        raise ConfigError(f"{where}.guided_channels must be at least 1, or none for all; not {cfg.guided_channels}")


def check_objective(cfg: LatentObjectiveConfig, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or a value out of range."""
    if cfg.time.distribution not in DISTRIBUTIONS:
        raise ConfigError(f"{where}.time.distribution must be one of {', '.join(DISTRIBUTIONS)}; not '{cfg.time.distribution}'")
    if not 0 <= cfg.label_drop < 1:
        raise ConfigError(f"{where}.label_drop must be in [0, 1), but is {cfg.label_drop:g}")
    if cfg.align_after < 1 or cfg.align_width < 1:
        raise ConfigError(f"{where}: align_after and align_width must be at least 1")


def validate_generator(cfg: Any, terms: tuple[str, ...] = TERMS) -> None:
    """Rules over the options of a run (`RunConfig`) of a generator, beyond their types. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    check_generator(cfg.model)
    for i, stage, objective, where in stage_objectives(cfg, terms, STAGE_MAY_CHANGE):
        check_objective(objective, where)
        if not stage.weights.get("alignment"):
            continue
        if objective.teacher is None:
            raise ConfigError(f"stages.{i}.weights.alignment needs objective.teacher")
        if objective.tokenizer is None:
            raise ConfigError(f"stages.{i}.weights.alignment needs images, so objective.tokenizer: cached latents show none")
