"""Options of XY-Tokenizer's network. Defaults are the released model."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.nn.mel import WHISPER_HOP, WHISPER_RATE
from tokenizers_lab.nn.whisper import ACTIVATIONS, STRIDE


@dataclass
class StackConfig:
    """Transformer layers of Whisper's shape."""

    width: int = 768              # channels
    layers: int = 12              # transformer layers
    heads: int = 12               # of the attention
    hidden: int = 3072            # channels of the feed-forward
    activation: str = "gelu"      # of the feed-forward: gelu, gelu_new, relu or silu
    positions: int | None = None  # rows of the table of positions; none: what a window needs


@dataclass
class AdapterConfig(StackConfig):
    """The same between two parts; a linear layer before it and one behind it where the widths differ."""

    layers: int = 4               # transformer layers
    out: int | None = None        # channels that leave it; none: `width`


@dataclass
class QuantizerConfig:
    """Residual vector quantization, with codebooks that follow moving averages."""

    codebooks: int = 8                     # K
    codebook_size: int = 1024              # entries of a codebook
    width: int = 512                       # dimensions of a quantized vector
    out: int | None = None                 # channels that leave it; none: as many as enter
    commitment: float = 1.0                # factor of the commitment loss, before the stage's weight
    dropout: float = 0.0                   # share of a training batch that uses a random number of codebooks
    decay: float = 0.99                    # of the moving averages
    epsilon: float = 1e-5                  # smooths their counts
    kmeans_iterations: int = 10            # of the start from the first batch; 0: no such start
    dead_threshold: float = 2.0            # entries that fewer vectors a step choose are replaced; 0: never
    released_start: bool = False           # the authors' start, after which the first update shrinks each entry by its count
    released_replacement: bool = False     # the authors': a replaced entry keeps its old averages, which take it back in a step


@dataclass
class VocoderConfig:
    """The Vocos that makes the waveform."""

    width: int = 512              # channels
    hidden: int = 4096            # channels of the blocks' MLPs
    layers: int = 30              # ConvNeXt blocks
    n_fft: int | None = None      # samples of the inverse STFT; none: four of its hops


@dataclass
class ModelConfig:
    """The network that ships."""

    sample_rate: int = WHISPER_RATE        # Hz of the audio that enters: Whisper's, nothing else
    bands: int = 80                        # mel bands that the encoders are given
    window_seconds: float = 30.0           # audio that the encoders see at once, and the decoder makes at once
    overlap_seconds: float = 10.0          # of the windows of longer audio: half of it is context on either side
    semantic: StackConfig = field(default_factory=StackConfig)                       # encoder, frozen as published
    semantic_adapter: AdapterConfig = field(default_factory=AdapterConfig)           # behind it, trained
    acoustic: StackConfig = field(default_factory=StackConfig)                       # encoder
    pre_adapter: AdapterConfig = field(default_factory=AdapterConfig)                # of both, before the quantizer
    pool: int = 4                          # 50 Hz tokens of a code frame
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    post_adapter: AdapterConfig = field(default_factory=AdapterConfig)               # behind it, to pool · decoder.width
    decoder: StackConfig = field(default_factory=StackConfig)                        # acoustic decoder
    decoder_bands: int = 80                # features that the decoder gives the vocoder, 100 frames a second
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)
    output_rate: int = WHISPER_RATE        # Hz of the waveform that is made

    @property
    def code_channels(self) -> int:
        """Channels of the features behind the quantizer, 3072 as published: what a language model listens to."""
        return self.pool * self.decoder.width


def hop_of(cfg: ModelConfig) -> int:
    """Samples of a code frame at 16 kHz: 1280 as published."""
    return WHISPER_HOP * STRIDE * cfg.pool


def window_codes(cfg: ModelConfig) -> int:
    """Code frames of a window: 375 as published."""
    return round(cfg.window_seconds * WHISPER_RATE / hop_of(cfg))


def vocoder_hop(cfg: ModelConfig) -> int:
    """Samples that the vocoder makes of each of its 100 frames a second."""
    return cfg.output_rate * WHISPER_HOP // WHISPER_RATE


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that make no network."""
    if cfg.sample_rate != WHISPER_RATE:
        raise ConfigError(f"{where}.sample_rate must be {WHISPER_RATE}, not {cfg.sample_rate}")
    if min(cfg.bands, cfg.pool, cfg.decoder_bands) < 1:
        raise ConfigError(f"{where}: bands, pool and decoder_bands must be at least 1")
    for name in ("semantic", "semantic_adapter", "acoustic", "pre_adapter", "post_adapter", "decoder"):
        check_stack(getattr(cfg, name), f"{where}.{name}")
    size = window_codes(cfg)
    for name in ("semantic", "semantic_adapter", "acoustic", "pre_adapter", "post_adapter", "decoder"):
        positions, needed = getattr(cfg, name).positions, size * (1 if name == "post_adapter" else cfg.pool)
        if positions is not None and positions < needed:
            raise ConfigError(f"{where}.{name}.positions must be at least {needed}, those of a window, not {positions}")
    if size < 1 or abs(size * hop_of(cfg) - cfg.window_seconds * WHISPER_RATE) > 1e-3:
        raise ConfigError(f"{where}.window_seconds must be a multiple of {hop_of(cfg) / WHISPER_RATE:g} s (a code frame), "
                          f"not {cfg.window_seconds:g}")
    if not 0 <= cfg.overlap_seconds < cfg.window_seconds:
        raise ConfigError(f"{where}.overlap_seconds must be at least 0 and below window_seconds, not {cfg.overlap_seconds:g}")
    if cfg.post_adapter.out not in (None, cfg.code_channels):
        raise ConfigError(f"{where}.post_adapter.out must be pool · decoder.width, {cfg.code_channels}, or none")
    check_quantizer(cfg.quantizer, f"{where}.quantizer")
    hop, sizes = vocoder_hop(cfg), cfg.vocoder
    if cfg.output_rate < 1 or hop * WHISPER_RATE != cfg.output_rate * WHISPER_HOP:
        raise ConfigError(f"{where}.output_rate must be a multiple of {WHISPER_RATE // WHISPER_HOP} Hz, not {cfg.output_rate}")
    if min(sizes.width, sizes.hidden, sizes.layers) < 1:
        raise ConfigError(f"{where}.vocoder: width, hidden and layers must be at least 1")
    if sizes.n_fft is not None and (sizes.n_fft <= hop or (sizes.n_fft - hop) % 2):
        raise ConfigError(f"{where}.vocoder.n_fft must be above the hop of {hop} samples by an even number, not {sizes.n_fft}")


def check_stack(cfg: StackConfig, where: str) -> None:
    """Raise ConfigError on impossible sizes of a stack of layers."""
    if min(cfg.width, cfg.heads, cfg.hidden) < 1 or cfg.layers < 0 or (cfg.positions is not None and cfg.positions < 1):
        raise ConfigError(f"{where}: width, heads, hidden and positions must be at least 1, layers not negative")
    if cfg.width % cfg.heads or cfg.width % 2 or cfg.width < 4:
        raise ConfigError(f"{where}.width must be even, at least 4 and a multiple of {cfg.heads} heads, not {cfg.width}")
    if cfg.activation not in ACTIVATIONS:
        raise ConfigError(f"{where}.activation must be one of {', '.join(ACTIVATIONS)}; not '{cfg.activation}'")


def check_quantizer(cfg: QuantizerConfig, where: str) -> None:
    """Raise ConfigError on impossible options of the quantizer."""
    if min(cfg.codebooks, cfg.codebook_size, cfg.width) < 1 or (cfg.out is not None and cfg.out < 1):
        raise ConfigError(f"{where}: codebooks, codebook_size, width and out must be at least 1")
    if not 0 <= cfg.decay < 1 or not 0 <= cfg.dropout <= 1 or cfg.epsilon <= 0:
        raise ConfigError(f"{where}: 0 ≤ decay < 1, 0 ≤ dropout ≤ 1 and epsilon > 0 must hold")
    if min(cfg.kmeans_iterations, cfg.dead_threshold, cfg.commitment) < 0:
        raise ConfigError(f"{where}: kmeans_iterations, dead_threshold and commitment must not be negative")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from .objective_config import check_stages

    check_model(cfg.model)
    if cfg.model.output_rate != cfg.model.sample_rate:
        raise ConfigError("model.output_rate must be model.sample_rate for training, whose targets have that rate, "
                          f"not {cfg.model.output_rate}")
    check_stages(cfg)
