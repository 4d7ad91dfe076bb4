"""Options of the vocoder's training. Defaults are the recipe of Amphion's Vocos, which the released one most likely had."""

from dataclasses import dataclass, field

from tokenizers_lab.errors import ConfigError

VOCODER_TERMS = ("mel", "gan", "feature_matching", "spectral_feature_matching")


@dataclass
class VocoderObjectiveConfig:
    """Losses of the vocoder. Weights live in the stages: 10 mel, 2 gan, 2 feature_matching, 1 spectral_feature_matching."""

    enabled: bool = False             # whether the run trains the vocoder, so that its discriminators are built
    mel_bands: list[int] = field(default_factory=lambda: [5, 10, 20, 40, 80, 160, 320])           # of each scale of the mel loss
    mel_windows: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512, 1024, 2048])   # samples; hop a quarter
    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])                          # period discriminators
    period_channels: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024])         # of each layer
    spectral_ffts: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048])         # spectral ones: samples
    spectral_hops: list[int] = field(default_factory=list)              # samples; empty: a quarter of each n_fft
    spectral_windows: list[int] = field(default_factory=list)           # samples; empty: as long as each n_fft
    spectral_channels: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024])       # of each layer
    spectral_kernels: list[int] = field(default_factory=lambda: [5, 3])   # of the first layer, and of the last two


def check_vocoder_objective(cfg: VocoderObjectiveConfig, where: str = "objective.vocoder") -> None:
    """Raise ConfigError on sizes that make no network."""
    for name in ("mel_bands", "mel_windows", "periods", "period_channels", "spectral_ffts", "spectral_channels"):
        if not getattr(cfg, name) or min(getattr(cfg, name)) < 1:
            raise ConfigError(f"{where}.{name} must be one or more whole numbers from 1, not {list(getattr(cfg, name))}")
    if len(cfg.mel_bands) != len(cfg.mel_windows):
        raise ConfigError(f"{where}: mel_bands and mel_windows must have equal lengths")
    for name in ("spectral_hops", "spectral_windows"):
        if getattr(cfg, name) and len(getattr(cfg, name)) != len(cfg.spectral_ffts):
            raise ConfigError(f"{where}.{name} must be empty or as long as spectral_ffts")
    if min(*cfg.mel_windows, *cfg.spectral_ffts) < 4 or min([1, *cfg.spectral_hops]) < 1:
        raise ConfigError(f"{where}: mel_windows and spectral_ffts must be at least 4 samples, spectral_hops at least 1")
    if any(not 1 <= window <= n_fft for window, n_fft in zip(cfg.spectral_windows, cfg.spectral_ffts)):
        raise ConfigError(f"{where}.spectral_windows must be 1 to n_fft, not {list(cfg.spectral_windows)}")
    if len(cfg.spectral_channels) < 2:
        raise ConfigError(f"{where}.spectral_channels must have at least 2 layers")
    if len(cfg.spectral_kernels) != 2 or any(kernel < 1 or kernel % 2 == 0 for kernel in cfg.spectral_kernels):
        raise ConfigError(f"{where}.spectral_kernels must be two odd numbers, not {list(cfg.spectral_kernels)}")
