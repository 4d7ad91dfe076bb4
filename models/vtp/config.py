"""Options of VTP's network. Defaults are the released Large model, but with exact rotary tables (see `RELEASED_ROTARY`)."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.nn.dinov3_vit import BlocksConfig, RotaryConfig, check_blocks
from tokenizers_lab.text import CLIP, TextConfig, check_text

IMAGE_FEATURES = ("cls", "pooled")
RELEASED_ROTARY = RotaryConfig("bfloat16", "bfloat16")      # what the released weights were trained and measured with


@dataclass
class TextEncoderConfig:
    """The causal transformer that reads texts, and how they become ids."""

    width: int = 768                  # channels of a token, and of the space in which images and texts are compared
    depth: int = 12                   # transformer blocks
    heads: int = 12                   # attention heads
    mlp_ratio: float = 4.0            # hidden channels of the MLP by the width
    quick_gelu: bool = False          # x · sigmoid(1.702 x) instead of GELU
    projection_bias: bool = False     # bias of the text's projection
    text: TextConfig = field(default_factory=lambda: TextConfig(tokenizer=CLIP, vocabulary=49_408, pad=0, context=77))


@dataclass
class ModelConfig:
    """The network that ships."""

    image_size: int = 256             # training size; any multiple of the patch goes in
    patch: int = 16                   # pixels a side of a token
    latent_channels: int = 64         # C, channels of the bottleneck
    bottleneck_ae_only: bool = True   # only the reconstruction goes through the bottleneck; false: all branches do
    trunk: BlocksConfig = field(default_factory=BlocksConfig)
    decoder: BlocksConfig = field(default_factory=lambda: BlocksConfig(norm="layer_norm"))
    text: TextEncoderConfig | None = field(default_factory=TextEncoderConfig)      # none: no texts, no zero-shot
    image_feature: str = "cls"        # what is compared with texts: cls, pooled (the mean patch token)
    temperature: float = 0.07         # first value of the contrast's temperature
    logit_bias: float | None = None   # first value of a bias of the contrast's logits; none: there is none
    nonscalar_logit_scale: bool = False      # the temperature's (and bias') shape is (1) rather than ()


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    if cfg.patch < 1 or cfg.image_size < cfg.patch or cfg.image_size % cfg.patch:
        raise ConfigError(f"{where}.image_size {cfg.image_size} must be a multiple of {where}.patch {cfg.patch}")
    if cfg.latent_channels < 1:
        raise ConfigError(f"{where}.latent_channels must be at least 1, not {cfg.latent_channels}")
    for name, part in (("trunk", cfg.trunk), ("decoder", cfg.decoder)):
        if (wrong := check_blocks(part)) is not None:
            raise ConfigError(f"{where}.{name}: {wrong}")
    if cfg.image_feature not in IMAGE_FEATURES:
        raise ConfigError(f"{where}.image_feature must be one of {', '.join(IMAGE_FEATURES)}; not '{cfg.image_feature}'")
    if cfg.temperature <= 0:
        raise ConfigError(f"{where}.temperature must be above 0, not {cfg.temperature}")
    if cfg.text is not None:
        check_text_encoder(cfg.text, f"{where}.text")


def check_text_encoder(cfg: TextEncoderConfig, where: str) -> None:
    """Raise ConfigError on sizes of the text encoder that do not fit together."""
    if min(cfg.width, cfg.depth, cfg.heads) < 1 or cfg.width % cfg.heads or cfg.mlp_ratio * cfg.width < 1:
        raise ConfigError(f"{where}.width {cfg.width} must be a multiple of heads ({cfg.heads}), and depth and mlp_ratio above 0")
    check_text(cfg.text)
    if cfg.text.context < 2:
        raise ConfigError(f"{where}.text.context must be at least 2 ids, not {cfg.text.context}: it sizes the table of positions")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from .objective_config import check_stages

    check_model(cfg.model)
    if cfg.data.size % cfg.model.patch:
        raise ConfigError(f"data.size {cfg.data.size} must be a multiple of model.patch {cfg.model.patch}")
    check_stages(cfg)
