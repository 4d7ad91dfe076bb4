"""Options of DM-Codec. Defaults are the released model and the released training."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.errors import ConfigError

TERMS = ("waveform", "mel", "commitment", "distillation", "gan", "feature_matching")
BACKENDS = ("transformers", "asset", "none")
CHOICES = {
    "guidance": ("lm", "sm", "combined"), "texts": ("manifest", "recognized"), "axis": ("d", "t"), "lock": ("none", "lm", "sm"),
}


@dataclass
class ModelConfig:
    """The network that ships."""

    sample_rate: int = 16_000         # Hz
    filters: int = 64                 # channels of the first convolution; each stride doubles them
    strides: list[int] = field(default_factory=lambda: [8, 5, 4, 2])   # of the decoder; the encoder's are reversed
    width: int = 1024                 # dimensions of a quantized vector
    residual_layers: int = 1          # residual blocks for each stride
    residual_kernel: int = 3          # kernel of a residual block
    dilation_base: int = 2            # dilation of residual block j is dilation_base^j
    lstm_layers: int = 2              # in the encoder and in the decoder; 0: none
    bidirectional: bool = True        # the encoder's LSTM; the decoder's has one direction
    activation: str = "elu"           # elu or snake
    init_gain: float = 1.0            # first weights of convolutions are PyTorch's times this; √3 keeps a signal's variance
    codebooks: int = 8                # K
    codebook_size: int = 1024         # entries of a codebook
    decay: float = 0.99               # of the codebooks' moving averages
    kmeans_iterations: int = 50       # of the codebooks' start from the first batch; 0: no such start
    dead_threshold: float = 0.0       # entries that fewer vectors a step choose are replaced; 0: never, as released in effect
    released_start: bool = False      # the authors' start, after which the first update shrinks each entry by its count


@dataclass
class MelConfig:
    """Mel spectrograms that are compared; scale k divides n_fft, hop and window by 2^k."""

    bands: int = 80                   # mel bands
    n_fft: int = 1024                 # samples
    hop: int = 240                    # samples
    window: int = 1024                # samples
    low: float = 0.0                  # Hz
    high: float | None = None         # Hz; none: half the sample rate
    weights: list[float] = field(default_factory=lambda: [45.0, 1.0, 1.0, 1.0])   # of scales 0, 1, … in the term `mel`


@dataclass
class DiscriminatorConfig:
    """Sizes of the three families."""

    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])                            # multi-period
    period_channels: list[int] = field(default_factory=lambda: [32, 128, 512, 1024, 1024])          # of each layer
    scales: int = 3                                                                                 # multi-scale: members
    scale_channels: list[int] = field(default_factory=lambda: [128, 128, 256, 512, 1024, 1024, 1024])   # of each layer
    windows: list[int] = field(default_factory=lambda: [1024, 2048, 512, 256, 128])                 # multi-scale STFT: samples
    stft_filters: int = 32                                                                          # its channels


@dataclass
class TeacherConfig:
    """A frozen network whose features the first codebook follows, or the recognizer.

    Assets that stand in offline: whisper-tiny.en and whisper-base for the speech teacher (384 and 512 wide) and the recognizer,
    minilm-l6 and mpnet-base for the language teacher (384 and 768 wide).
    """

    backend: str = "transformers"     # transformers; asset (of `toklab assets`); none: features or texts come with the batch
    source: str = ""                  # hub id, local folder, or the asset's name
    layer: int = -1                   # which hidden state (0: the first layer's input); -1: the mean of all


@dataclass
class ObjectiveConfig:
    """Losses of the paper (section 3). Weights live in the stages."""

    guidance: str = "combined"        # lm: language model; sm: speech model; combined: both
    lm_weight: float = 0.5            # combined: weight of the language model's loss
    sm_weight: float = 0.5            # combined: weight of the speech model's loss
    axis: str = "d"                   # d: cosine over time for each dimension (the release); t: L1 and cosine for each frame
    similarity_weight: float = 1.0    # axis t: weight of the cosine beside the L1
    layer: int = 0                    # codebook whose value is distilled
    lock: str = "none"                # combined: the teacher that keeps to codebook 0 while the other follows `layer`
    teacher_width: int = 768          # channels of the teachers' features
    speech_teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(source="facebook/hubert-base-ls960"))
    language_teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(source="google-bert/bert-base-uncased"))
    texts: str = "manifest"           # manifest: a clip's text where it is known; recognized: each segment's (the authors')
    recognizer: TeacherConfig = field(
        default_factory=lambda: TeacherConfig(source="facebook/wav2vec2-base-960h"))      # hears texts asked for or missing
    mel: MelConfig = field(default_factory=MelConfig)
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    targets_as_released: bool = False      # features (B, 1, T, D), compared over the batch: a fault of the released scripts


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that make no network."""
    sizes = ("filters", "width", "residual_kernel", "dilation_base", "codebooks", "codebook_size", "sample_rate")
    for name in sizes:
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, not {getattr(cfg, name)}")
    if cfg.init_gain <= 0:
        raise ConfigError(f"{where}.init_gain must be above 0, not {cfg.init_gain:g}")
    if not cfg.strides or min(cfg.strides) < 1:
        raise ConfigError(f"{where}.strides must be whole numbers from 1, not {list(cfg.strides)}")
    if cfg.filters < 2 and cfg.residual_layers:
        raise ConfigError(f"{where}.filters must be at least 2: a residual block halves them")
    if min(cfg.residual_layers, cfg.lstm_layers, cfg.kmeans_iterations) < 0:
        raise ConfigError(f"{where}: residual_layers, lstm_layers and kmeans_iterations must not be negative")
    if cfg.activation not in ("elu", "snake"):
        raise ConfigError(f"{where}.activation must be elu or snake, not '{cfg.activation}'")
    if not 0 <= cfg.decay < 1 or cfg.dead_threshold < 0:
        raise ConfigError(f"{where}: 0 ≤ decay < 1 and dead_threshold ≥ 0 must hold, not {cfg.decay}, {cfg.dead_threshold}")


def check_teachers(cfg: ObjectiveConfig, where: str) -> None:
    """Raise ConfigError on an unknown backend of a teacher or of the recognizer."""
    for name in ("speech_teacher", "language_teacher", "recognizer"):
        backend = getattr(cfg, name).backend
        if backend not in BACKENDS:
            raise ConfigError(f"{where}.{name}.backend must be one of {', '.join(BACKENDS)}; not '{backend}'")


def check_objective(cfg: ObjectiveConfig, model: ModelConfig, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or an impossible combination."""
    for name, known in CHOICES.items():
        if getattr(cfg, name) not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{getattr(cfg, name)}'")
    check_teachers(cfg, where)
    if not 0 <= cfg.layer < model.codebooks:
        raise ConfigError(f"{where}.layer must be 0 to {model.codebooks - 1}, not {cfg.layer}")
    if cfg.lock != "none" and cfg.guidance != "combined":
        raise ConfigError(f"{where}.lock needs guidance=combined, not {cfg.guidance}")
    smallest = min(cfg.mel.n_fft, cfg.mel.hop, cfg.mel.window) // 2 ** max(len(cfg.mel.weights) - 1, 0)
    if not cfg.mel.weights or smallest < 1:
        raise ConfigError(f"{where}.mel.weights needs 1 to {min(cfg.mel.n_fft, cfg.mel.hop).bit_length()} scales")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    check_model(cfg.model)
    for _, _, objective, where in stage_objectives(cfg, TERMS):
        check_objective(objective, cfg.model, where)
