"""Options of RecTok. Defaults are the released model and the paper's losses."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig

TERMS = ("mse", "perceptual", "kl", "semantic", "gan")
CHOICES = {
    "semantic_kind": ("transformer", "mlp"),
    "semantic_input": ("noisy", "clean"),
    "semantic_target": ("rec+align", "reconstruction"),
    "semantic_loss": ("cosine", "l2", "l1"),
    "noise_schedule": ("shift", "lognorm", "uniform"),
    "mask_ratio_type": ("random", "fixed"),
    "lpips": ("vgg", "alex", "none"),
    "logits_network": ("convnext_small", "teacher", "none"),
}


@dataclass
class ViTConfig:
    """Size of a transformer."""

    width: int = 768          # channels of a token
    depth: int = 12           # transformer blocks
    heads: int = 12           # attention heads


@dataclass
class ModelConfig:
    """The network that ships."""

    image_size: int = 256             # training size; position embeddings are interpolated to other sizes
    patch: int = 16                   # pixels a side of a token
    latent_channels: int = 128        # C
    encoder: ViTConfig = field(default_factory=ViTConfig)
    decoder: ViTConfig = field(default_factory=ViTConfig)
    qk_norm: bool = False             # RMS norm of queries and keys
    variational: bool = True          # diagonal Gaussian latent; false: a plain autoencoder
    logvar_bias: float = 0.0          # initial log-variance of the posterior (0 as published)


@dataclass
class ObjectiveConfig:
    """Losses of the paper (section 3). Weights live in the stages."""

    teachers: dict[str, VisionTeacherConfig] = field(default_factory=lambda: {"dinov3": VisionTeacherConfig()})
    semantic_decoder: ViTConfig = field(default_factory=lambda: ViTConfig(192, 3, 4))
    semantic_kind: str = "transformer"       # transformer or mlp
    semantic_input: str = "noisy"            # noisy: x_t; clean: the posterior sample
    semantic_target: str = "rec+align"       # rec+align: all tokens; reconstruction: the masked tokens only
    semantic_loss: str = "cosine"            # cosine, l2, l1
    gamma: float = 1.0                       # strength of the flow noise; 0: none
    noise_schedule: str = "shift"            # shift, lognorm, uniform
    mask_ratio: float = 0.4                  # upper end of the mask ratio
    mask_ratio_min: float = -0.1             # lower end; the ratio is clamped at 0
    mask_ratio_type: str = "random"          # random: U(mask_ratio_min, mask_ratio) each step; fixed: mask_ratio
    lpips: str = "vgg"                       # backbone of LPIPS: vgg (as published), alex, none
    logits_network: str = "convnext_small"   # network of the logit term: convnext_small (as published), teacher, none
    logits_weight: float = 0.1               # weight of the logit term in the perceptual mean
    discriminator_width: int = 64            # PatchGAN channels of the first layer
    discriminator_layers: int = 3            # PatchGAN depth


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    if cfg.patch < 1 or cfg.image_size < cfg.patch or cfg.image_size % cfg.patch:
        raise ConfigError(f"{where}.image_size {cfg.image_size} must be a multiple of {where}.patch {cfg.patch}")
    if cfg.latent_channels < 1:
        raise ConfigError(f"{where}.latent_channels must be at least 1, not {cfg.latent_channels}")
    check_vit(cfg.encoder, f"{where}.encoder")
    check_vit(cfg.decoder, f"{where}.decoder")


def check_vit(cfg: ViTConfig, where: str) -> None:
    """Raise ConfigError unless heads divide the width into parts that rotary positions of two axes fit into."""
    if min(cfg.width, cfg.depth, cfg.heads) < 1 or cfg.width % (4 * cfg.heads):
        raise ConfigError(f"{where}.width {cfg.width} must be a multiple of 4 × heads ({cfg.heads}), and depth at least 1")


def check_objective(cfg: ObjectiveConfig, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or an impossible combination."""
    for name, known in CHOICES.items():
        if getattr(cfg, name) not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{getattr(cfg, name)}'")
    check_vit(cfg.semantic_decoder, f"{where}.semantic_decoder")
    if not cfg.mask_ratio_min <= cfg.mask_ratio < 1:
        raise ConfigError(f"{where}: mask_ratio_min ≤ mask_ratio < 1 must hold, not {cfg.mask_ratio_min}, {cfg.mask_ratio}")
    if cfg.gamma < 0:
        raise ConfigError(f"{where}.gamma must not be negative, but is {cfg.gamma}")
    if cfg.teachers and cfg.semantic_kind == "mlp" and cfg.mask_ratio:
        raise ConfigError(f"{where}: an mlp semantic decoder cannot fill in masked tokens; set {where}.mask_ratio=0")
    if cfg.logits_network == "teacher" and not cfg.teachers:
        raise ConfigError(f"{where}.logits_network is teacher, but {where}.teachers is empty; choose convnext_small or none")
    if cfg.discriminator_layers < 1 or cfg.discriminator_width < 1:
        raise ConfigError(f"{where}: discriminator_layers and discriminator_width must be at least 1")
    for name in cfg.teachers:
        if not name or "." in name:
            raise ConfigError(f"{where}.teachers: '{name}' cannot name a teacher (no dots)")


STAGE_MAY_CHANGE = ("gamma", "logits_weight", "mask_ratio", "mask_ratio_min", "mask_ratio_type", "noise_schedule",
                    "semantic_input", "semantic_loss", "semantic_target")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    check_model(cfg.model)
    if cfg.data.size % cfg.model.patch:
        raise ConfigError(f"data.size {cfg.data.size} must be a multiple of model.patch {cfg.model.patch}")
    for i, stage, objective, where in stage_objectives(cfg, TERMS, STAGE_MAY_CHANGE):
        check_objective(objective, where)
        if stage.weights.get("semantic") and not objective.teachers:
            raise ConfigError(f"stages.{i}.weights.semantic needs a teacher in objective.teachers")
        if stage.weights.get("perceptual") and (objective.lpips, objective.logits_network) == ("none", "none"):
            raise ConfigError(f"stages.{i}.weights.perceptual needs objective.lpips or objective.logits_network")
        if stage.weights.get("kl") and not cfg.model.variational:
            raise ConfigError(f"stages.{i}.weights.kl needs model.variational=true")
