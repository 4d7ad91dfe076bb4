"""Options of XY-Tokenizer's training. No training code is published; what the sources say is in the recipes, the rest is ours."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.teachers.listening_config import ListenerConfig, check_listener

TERMS = ("asr", "mel", "commitment", "gan", "feature_matching")
RIVALS = ("gan", "feature_matching")      # terms that need discriminators


@dataclass
class DiscriminatorConfig:
    """Sizes of the three families of stage 2 (unpublished: DM-Codec's); a family without members is not built."""

    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])                            # multi-period
    period_channels: list[int] = field(default_factory=lambda: [32, 128, 512, 1024, 1024])          # of each layer
    scales: int = 3                                                                                 # multi-scale: members
    scale_channels: list[int] = field(default_factory=lambda: [128, 128, 256, 512, 1024, 1024, 1024])   # of each layer
    windows: list[int] = field(default_factory=lambda: [1024, 2048, 512, 256, 128])                 # multi-scale STFT: samples
    stft_filters: int = 32                                                                          # its channels

    @property
    def any(self) -> bool:
        """Whether a discriminator is built."""
        return bool(self.periods or self.scales or self.windows)


@dataclass
class ObjectiveConfig:
    """Losses of both stages. Weights live in the stages."""

    listener: ListenerConfig = field(default_factory=ListenerConfig)                       # the language model of the term `asr`
    mel_bands: list[int] = field(default_factory=lambda: [5, 10, 20, 40, 80, 160, 320])    # of each window (ours: DAC's)
    mel_windows: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512, 1024, 2048])      # samples (ours: DAC's)
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


def check_objective(cfg: ObjectiveConfig, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or an impossible combination."""
    check_listener(cfg.listener, f"{where}.listener")
    if not cfg.mel_bands or len(cfg.mel_bands) != len(cfg.mel_windows) or min(*cfg.mel_bands, *cfg.mel_windows) < 1:
        raise ConfigError(f"{where}: mel_bands and mel_windows must have equal lengths and values from 1")
    if cfg.discriminators.scales < 0:
        raise ConfigError(f"{where}.discriminators.scales must not be negative, but is {cfg.discriminators.scales}")


def check_stages(cfg: Any) -> None:
    """Rules over a run (`RunConfig`) and its stages, for the system's `validate`. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    for i, stage, objective, where in stage_objectives(cfg, TERMS, ()):      # all options are of networks
        check_objective(objective, where)
        named = sorted(name for name, weight in stage.weights.items() if weight)
        if "asr" in named and cfg.objective.listener.backend == "none":
            raise ConfigError(f"stages.{i}.weights.asr needs a language model: set objective.listener.backend")
        rivals = [name for name in named if name in RIVALS]
        if rivals and not cfg.objective.discriminators.any:
            raise ConfigError(f"stages.{i}.weights.{rivals[0]} needs discriminators, but objective.discriminators has none")
