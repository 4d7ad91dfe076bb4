"""Options of LM-SPT. Defaults are the released model (12.5 Hz) and the authors' losses."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

from tokenizers_lab.errors import ConfigError

# the authors' order; `gan` is their adversarial term
TERMS = (
    "mel", "gan", "feature_matching", "acoustic_codebook", "acoustic_commitment", "distill", "semantic_commitment",
    "semantic_codebook",
)
DECODINGS = ("all", "semantic", "auxiliary", "acoustic")
CHOICES = {"distill_loss": ("l2", "l1"), "distill_floor": ("batch", "item")}


@dataclass
class AuxiliaryConfig:
    """The decoder that resynthesises speech from the semantic codebook alone, for the teacher to hear."""

    width: int = 128                  # channels at its start, halved at every stride
    strides: list[int] = field(default_factory=lambda: [8, 8, 5, 4])   # their product is hop · sample_rate / the codec's rate
    sample_rate: int = 16_000         # Hz of the resynthesis
    dilations: list[int] = field(default_factory=lambda: [1, 3, 9])    # of the residual units
    kernel: int = 7                   # of the residual units; odd
    causal: bool = False              # convolutions that see no later audio


@dataclass
class ModelConfig:
    """The network that ships. Frame rate = sample_rate / product of the encoder's strides.

    Strides of encoder / decoder / auxiliary decoder for other rates: 25 Hz 4, 5, 6, 8 / 8, 6, 5, 4 / 8, 5, 4, 4;
    6.25 Hz 4, 5, 6, 8, 4 / 4, 8, 6, 5, 4 / 8, 8, 5, 8.
    """

    sample_rate: int = 24_000         # Hz of the audio that is encoded
    output_sample_rate: int = 0       # Hz of the reconstruction; 0: sample_rate
    strides: list[int] = field(default_factory=lambda: [4, 5, 6, 8, 2])           # of the encoders
    decoder_strides: list[int] = field(default_factory=lambda: [2, 8, 6, 5, 4])   # of the main decoder
    semantic_width: int = 32          # channels at the start of the semantic encoder, doubled at every stride
    acoustic_width: int = 32          # the same of the acoustic encoder
    decoder_width: int = 1536         # channels at the start of the main decoder, halved at every stride
    latent: int = 1024                # channels of the latents
    dilations: list[int] = field(default_factory=lambda: [1, 3, 9])               # of the residual units
    kernel: int = 7                   # of the residual units; odd
    causal: bool = False              # convolutions that see no later audio, in encoders and main decoder
    init_gain: float = 1.0            # first weights of the encoders are PyTorch's times this
    shared_encoder: bool = False      # one encoder for both latents
    codebooks: int = 8                # codes of a frame: one semantic, then the acoustic ones
    semantic_size: int = 16_384       # entries of the semantic codebook
    semantic_dim: int = 8             # channels in which it is looked up
    acoustic_size: int = 4_096        # entries of each acoustic codebook
    acoustic_dim: int = 8             # channels in which they are looked up
    fsq_levels: list[int] = field(default_factory=list)    # finite scalar quantization as the semantic part; empty: a codebook
    subtract: bool = True             # acoustic codebooks quantize the acoustic latent minus the semantic part
    decoding: str = "all"             # what decode gives by default: all, semantic, auxiliary (16 kHz), acoustic
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)


@dataclass
class TeacherConfig:
    """The frozen Whisper encoder that hears original and resynthesis."""

    backend: str = "transformers"     # transformers (hub id or folder), asset, random (transformers config, seeded)
    source: str = "openai/whisper-large-v3"                # hub id, local path, or an asset: whisper-tiny.en, whisper-base
    config: dict[str, str] = field(default_factory=dict)   # backend random: the network's config


@dataclass
class ObjectiveConfig:
    """The authors' losses. Weights live in the stages: 15 mel, 1 gan, 2 feature_matching, 1 acoustic_codebook,
    0.25 acoustic_commitment, 500 distill, 0.25 semantic_commitment, 1 semantic_codebook."""

    quantizer_dropout: float = 0.5    # share of the items that keep only a random number of acoustic codebooks
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teacher_seconds: float = 30.0     # audio is padded to this for the teacher (30 as published); the padding counts
    distill_loss: str = "l2"          # l2 (mean square) or l1
    distill_floor: str = "batch"      # the resynthesis' log-mel has its floor below the loudest of the batch (as trained) or item
    mel_bands: list[int] = field(default_factory=lambda: [40, 80, 160, 320])
    mel_windows: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])          # samples
    mpd_periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])                # multi-period discriminator
    mpd_channels: list[int] = field(default_factory=lambda: [32, 128, 512, 1024, 1024])
    msd_rates: list[int] = field(default_factory=list)      # multi-scale discriminator: factors below the sample rate
    msd_channels: list[int] = field(default_factory=lambda: [16, 64, 256, 1024, 1024, 1024])
    msd_groups: list[int] = field(default_factory=lambda: [1, 4, 16, 64, 256, 1])
    mrd_windows: list[int] = field(default_factory=lambda: [2048, 1024, 512])               # multi-resolution discriminator
    mrd_channels: int = 64


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    sizes = ("sample_rate", "semantic_width", "acoustic_width", "decoder_width", "latent", "kernel", "semantic_size",
             "semantic_dim", "acoustic_size", "acoustic_dim")
    for name in sizes:
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, not {getattr(cfg, name)}")
    if cfg.init_gain <= 0:
        raise ConfigError(f"{where}.init_gain must be above 0, not {cfg.init_gain:g}")
    if cfg.codebooks < 2:
        raise ConfigError(f"{where}.codebooks must be at least 2, one semantic and one acoustic, not {cfg.codebooks}")
    if cfg.decoding not in DECODINGS:
        raise ConfigError(f"{where}.decoding must be one of {', '.join(DECODINGS)}; not '{cfg.decoding}'")
    if cfg.fsq_levels and min(cfg.fsq_levels) < 2:
        raise ConfigError(f"{where}.fsq_levels must be 2 or more each, not {cfg.fsq_levels}")
    if cfg.shared_encoder and cfg.semantic_width != cfg.acoustic_width:
        raise ConfigError(f"{where}.shared_encoder needs semantic_width and acoustic_width to be equal")
    rate = cfg.output_sample_rate or cfg.sample_rate
    check_decoder(cfg, cfg.decoder_strides, cfg.decoder_width, rate, where, "decoder_strides")
    check_decoder(cfg, cfg.auxiliary.strides, cfg.auxiliary.width, cfg.auxiliary.sample_rate, f"{where}.auxiliary", "strides")
    for part, place in ((cfg, where), (cfg.auxiliary, f"{where}.auxiliary")):
        if part.kernel % 2 == 0 or not part.dilations or min(part.dilations) < 1:
            raise ConfigError(f"{place}: kernel must be odd and dilations at least 1, not {part.kernel}, {part.dilations}")


def check_decoder(cfg: ModelConfig, strides: list[int], width: int, rate: int, where: str, name: str) -> None:
    """Raise ConfigError unless a frame of the decoder is as long as a frame of the encoders."""
    if not cfg.strides or not strides or min(*cfg.strides, *strides) < 1:
        raise ConfigError(f"{where}.{name}: strides must be at least 1, not {cfg.strides} (encoder) and {strides}")
    if prod(cfg.strides) * rate != prod(strides) * cfg.sample_rate:
        raise ConfigError(
            f"{where}.{name}: {strides} make {prod(strides)} samples of a frame at {rate} Hz, but a frame of the encoder is "
            f"{prod(cfg.strides)} at {cfg.sample_rate} Hz")
    if width >> len(strides) < 1:
        raise ConfigError(f"{where}: a decoder of width {width} has no channels left after {len(strides)} halvings")


def check_objective(cfg: ObjectiveConfig, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or an impossible size."""
    for name, known in CHOICES.items():
        if getattr(cfg, name) not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{getattr(cfg, name)}'")
    if not 0 <= cfg.quantizer_dropout <= 1:
        raise ConfigError(f"{where}.quantizer_dropout must be in [0, 1], not {cfg.quantizer_dropout}")
    if not 0 < cfg.teacher_seconds <= 30:
        raise ConfigError(f"{where}.teacher_seconds must be above 0 and at most 30, not {cfg.teacher_seconds:g}")
    if len(cfg.mel_bands) != len(cfg.mel_windows):
        raise ConfigError(f"{where}: mel_bands and mel_windows must have equal lengths")
    if len(cfg.msd_channels) != 6 or len(cfg.msd_groups) != 6 or len(cfg.mpd_channels) != 5:
        raise ConfigError(f"{where}: msd_channels and msd_groups must have 6 entries, mpd_channels 5")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    check_model(cfg.model)
    for i, stage, objective, where in stage_objectives(cfg, TERMS):
        check_objective(objective, where)
        if (stage.weights.get("gan") or stage.weights.get("feature_matching")) and not (
            objective.mpd_periods or objective.msd_rates or objective.mrd_windows
        ):
            raise ConfigError(f"stages.{i}.weights: gan and feature_matching need a discriminator in objective")
