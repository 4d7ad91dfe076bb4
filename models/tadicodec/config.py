"""Options of TaDiCodec. Defaults are the released model and the released training."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.nn.mel import MelConfig
from tokenizers_lab.text import TextConfig, build_text_tokenizer

from .vocoder_config import VOCODER_TERMS, VocoderObjectiveConfig, check_vocoder_objective

CODEC_TERMS = ("flow", "entropy", "commitment")
TERMS = CODEC_TERMS + VOCODER_TERMS
VOCODERS = ("vocos", "griffin_lim")
NORM_INITS = ("library", "identity")


@dataclass
class VocoderConfig:
    """From mel to audio."""

    kind: str = "vocos"               # vocos: a network, trained apart; griffin_lim: no weights, for a quick look only
    width: int = 1024                 # vocos: channels
    hidden: int = 4096                # vocos: channels inside a block
    layers: int = 30                  # vocos: ConvNeXt blocks
    iterations: int = 32              # griffin_lim: rounds of phase search


@dataclass
class ModelConfig:
    """The network that ships. Code rate = sample_rate / (mel.hop · downsample)."""

    sample_rate: int = 24_000         # Hz
    codec: bool = True                # false: the vocoder alone, whose latents are mel frames
    mel: MelConfig = field(default_factory=MelConfig)
    width: int = 1024                 # channels of both transformers
    encoder_layers: int = 8           # transformer blocks
    decoder_layers: int = 16          # transformer blocks
    heads: int = 16                   # attention heads of both
    downsample: int = 8               # mel frames of a code
    bits: int = 14                    # of a code: 2^bits entries
    sigma: float = 1e-5               # share of the noise that is left at the data's end of the flow
    norm_init: str = "library"        # first weights of the time-scaled norms: library (N(0, 0.02), bias 0, as released in
                                      # effect), identity (weight 0, bias 1, as the authors wrote them)
    condition_gain: float = 0.0       # first weights from code to decoder are N(0, gain² / inputs); 0: N(0, 0.02²), as released
    text_condition: bool = True       # the decoder also reads the text; without it there is no guidance
    text: TextConfig = field(default_factory=lambda: TextConfig(      # the authors do not name it: inferred from its sizes
        tokenizer="microsoft/Phi-3.5-mini-instruct", normaliser="none", vocabulary=32_100, pad=32_000))
    steps: int = 32                   # of decoding, by default
    guidance: float = 2.0             # of decoding, by default; 0 or 1: none, half the time
    rescale: float = 0.75             # of decoding, by default: share of the guided flow that gets the unguided one's deviation
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)


@dataclass
class ObjectiveConfig:
    """The authors' losses. Weights live in the stages: flow 1, entropy 1, commitment 0 (as released: only logged)."""

    prompt_drop: float = 0.2          # probability that a batch has no clean prompt
    condition_drop: float = 0.2       # probability that a batch is decoded without its codes
    text_drop: float = 0.0            # probability that a batch is decoded without its texts; ours: 0.1 trains decoding without
    batch_as_released: bool = False   # padding counts as in the authors' code: mel, text positions, down-sampling, entropies
    vocoder: VocoderObjectiveConfig = field(default_factory=VocoderObjectiveConfig)


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that make no network and on unknown choices."""
    for name in ("sample_rate", "width", "encoder_layers", "decoder_layers", "heads", "downsample", "bits", "steps"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, not {getattr(cfg, name)}")
    mel, vocoder = cfg.mel, cfg.vocoder
    if min(mel.bands, mel.n_fft, mel.hop) < 1 or mel.hop > mel.n_fft or mel.variance <= 0:
        raise ConfigError(f"{where}.mel needs bands, hop and variance above 0 and n_fft of hop at least: {mel}")
    if vocoder.kind not in VOCODERS:
        raise ConfigError(f"{where}.vocoder.kind must be one of {', '.join(VOCODERS)}; not '{vocoder.kind}'")
    if min(vocoder.width, vocoder.hidden, vocoder.layers, vocoder.iterations) < 1:
        raise ConfigError(f"{where}.vocoder: width, hidden, layers and iterations must be at least 1")
    if not cfg.codec:
        if vocoder.kind != "vocos":
            raise ConfigError(f"{where}.codec=false leaves the vocoder alone, which must be vocos, not {vocoder.kind}")
        return
    if cfg.width % (2 * cfg.heads) or cfg.width < 4:
        raise ConfigError(f"{where}.width must be a multiple of 2 · {where}.heads, at least 4, not {cfg.width} for {cfg.heads}")
    if cfg.bits > 20:
        raise ConfigError(f"{where}.bits must be at most 20, not {cfg.bits}")
    if cfg.norm_init not in NORM_INITS:
        raise ConfigError(f"{where}.norm_init must be one of {', '.join(NORM_INITS)}; not '{cfg.norm_init}'")
    if cfg.condition_gain < 0:
        raise ConfigError(f"{where}.condition_gain must not be negative, but is {cfg.condition_gain:g}")
    if not 0 <= cfg.sigma < 1 or cfg.guidance < 0 or not 0 <= cfg.rescale <= 1:
        raise ConfigError(f"{where}: 0 ≤ sigma < 1, guidance ≥ 0 and 0 ≤ rescale ≤ 1 must hold, "
                          f"not {cfg.sigma:g}, {cfg.guidance:g}, {cfg.rescale:g}")
    try:
        build_text_tokenizer(cfg.text)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


def check_objective(cfg: ObjectiveConfig, where: str = "objective") -> None:
    """Raise ConfigError on a probability that is none."""
    for name in ("prompt_drop", "condition_drop", "text_drop"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ConfigError(f"{where}.{name} must be from 0 to 1, not {getattr(cfg, name):g}")
    check_vocoder_objective(cfg.vocoder, f"{where}.vocoder")


STAGE_MAY_CHANGE = ("prompt_drop", "condition_drop", "text_drop", "batch_as_released")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    check_model(cfg.model)
    for i, stage, objective, where in stage_objectives(cfg, TERMS, STAGE_MAY_CHANGE):
        check_objective(objective, where)
        coded, voiced = ([name for name in terms if stage.weights.get(name)] for terms in (CODEC_TERMS, VOCODER_TERMS))
        if coded and voiced:      # the flow gives no audio: one step cannot serve both
            raise ConfigError(f"stages.{i}.weights has '{coded[0]}' of the codec and '{voiced[0]}' of the vocoder: two stages")
        if coded and not cfg.model.codec:
            raise ConfigError(f"stages.{i}.weights.{coded[0]} needs model.codec=true")
        if voiced and cfg.model.vocoder.kind != "vocos":
            raise ConfigError(f"stages.{i}.weights.{voiced[0]} needs model.vocoder.kind=vocos")
        if voiced and not cfg.objective.vocoder.enabled:
            raise ConfigError(f"stages.{i}.weights.{voiced[0]} needs objective.vocoder.enabled=true")
        if voiced and cfg.model.codec and stage.parts != ["vocoder"]:
            raise ConfigError(f"stages.{i}.parts must be [vocoder] for '{voiced[0]}': the codec gets no gradient from it")
