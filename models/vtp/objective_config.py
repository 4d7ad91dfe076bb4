"""Options of VTP's training. Defaults are the paper's and, where it says nothing, DINOv2's and OpenCLIP's."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.data.multicrop import CropConfig
from tokenizers_lab.errors import ConfigError

TERMS = ("l1", "lpips", "gan", "dino", "ibot", "koleo", "contrastive")
SELF_DISTILLATION = frozenset({"dino", "ibot", "koleo"})
RECONSTRUCTION = frozenset({"l1", "lpips", "gan"})
TARGETS = ("sinkhorn", "centring")
LPIPS = ("vgg", "alex", "none")
STAGE_MAY_CHANGE = (
    "contrastive_drop", "gan_adaptive", "gan_adaptive_max", "mask_ratios", "mask_share", "momentum", "momentum_end", "rec_drop",
    "rec_share", "ssl_drop", "ssl_share", "student_temperature", "teacher_temperature", "teacher_temperature_start",
    "teacher_warmup", "view_scale")


@dataclass
class HeadConfig:
    """The head of self-distillation, one for class and patch tokens."""

    prototypes: int = 65_536          # K, rows of the last map
    hidden: int = 2048                # channels between its linear maps
    bottleneck: int = 256             # channels before the prototypes
    layers: int = 3                   # linear maps before the prototypes


@dataclass
class ObjectiveConfig:
    """What training needs beside the network. Every objective takes its share of a micro-batch; contrastive takes all of it."""

    ssl_share: float = 0.25           # share of a batch's images for self-distillation
    rec_share: float = 0.125          # share for the reconstruction
    view_scale: tuple[float, float] = (0.9, 1.0)     # share of its area that contrast and reconstruction see of an image
    contrastive_drop: float = 0.0     # share of the images that each residual branch leaves out: contrast
    ssl_drop: float = 0.0             # the same of self-distillation's student
    rec_drop: float = 0.0             # the same of the reconstruction
    head: HeadConfig | None = field(default_factory=HeadConfig)      # none: no self-distillation, and no teacher
    crops: CropConfig = field(default_factory=CropConfig)
    mask_share: float = 0.5           # share of the global crops with hidden patches
    mask_ratios: tuple[float, float] = (0.1, 0.5)    # least and most hidden patches of these, a share of all
    targets: str = "sinkhorn"         # how the teacher is kept from collapsing: sinkhorn, centring
    sinkhorn_iterations: int = 3
    centre_momentum: float = 0.9      # centring: decay of the mean of the teacher's logits
    student_temperature: float = 0.1
    teacher_temperature_start: float = 0.04          # rises along a line to teacher_temperature
    teacher_temperature: float = 0.07
    teacher_warmup: float = 0.3       # share of the stage in which it rises
    momentum: float = 0.994           # of the teacher, rises along half a cosine over the stage
    momentum_end: float = 1.0
    lpips: str = "vgg"                # backbone of the perceptual distance: vgg, alex, none
    discriminator_width: int = 0      # channels of the PatchGAN's first layer; 0: there is none
    discriminator_layers: int = 3     # its halvings of the image
    gan_adaptive: bool = True         # gan is scaled so that its gradient at the decoder's last layer is as large as that of
                                      # l1 + lpips
    gan_adaptive_max: float = 1e4     # largest scale


def check_objective(cfg: ObjectiveConfig, patch: int, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or an impossible value. patch: pixels a side of a token."""
    for name, known in (("targets", TARGETS), ("lpips", LPIPS)):
        if getattr(cfg, name) not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{getattr(cfg, name)}'")
    for name in ("ssl_share", "rec_share"):
        if not 0 < getattr(cfg, name) <= 1:
            raise ConfigError(f"{where}.{name} must be above 0 and at most 1, not {getattr(cfg, name)}")
    for name in ("contrastive_drop", "ssl_drop", "rec_drop", "mask_share", "momentum", "momentum_end", "centre_momentum",
                 "teacher_warmup"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ConfigError(f"{where}.{name} must be in [0, 1], not {getattr(cfg, name)}")
    if min(cfg.student_temperature, cfg.teacher_temperature, cfg.teacher_temperature_start) <= 0 or cfg.sinkhorn_iterations < 1:
        raise ConfigError(f"{where}: temperatures must be above 0, sinkhorn_iterations at least 1")
    if not 0 <= cfg.mask_ratios[0] <= cfg.mask_ratios[1] < 1:
        raise ConfigError(f"{where}.mask_ratios must be two numbers in [0, 1), the smaller one first, not {cfg.mask_ratios}")
    for name, scale in (("view_scale", cfg.view_scale), ("crops.global_scale", cfg.crops.global_scale),
                        ("crops.local_scale", cfg.crops.local_scale)):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"{where}.{name} must be two numbers in (0, 1], the smaller one first, not {tuple(scale)}")
    sizes = {"global_size": cfg.crops.global_size, "local_size": cfg.crops.local_size}
    for name, size in sizes.items():
        if size < patch or size % patch:
            raise ConfigError(f"{where}.crops.{name} {size} must be a multiple of model.patch {patch}")
    if cfg.crops.local_crops < 0 or len(cfg.crops.blur_shares) != 3:
        raise ConfigError(f"{where}.crops: local_crops must not be negative, blur_shares three numbers")
    if cfg.discriminator_width < 0 or cfg.discriminator_layers < 1 or (cfg.head is not None and cfg.head.prototypes < 1):
        raise ConfigError(f"{where}: discriminator_layers and head.prototypes must be at least 1, discriminator_width at least 0")


def check_stages(cfg: Any) -> None:
    """Raise ConfigError if a stage of a run (`RunConfig`) names a loss that the run does not have."""
    from tokenizers_lab.config import stage_objectives

    for i, stage, objective, where in stage_objectives(cfg, TERMS, STAGE_MAY_CHANGE):
        check_objective(objective, cfg.model.patch, where)
        named = {name for name, weight in stage.weights.items() if weight}
        needs = [
            ("contrastive", cfg.model.text is not None and cfg.data.texts, "model.text and data.texts=true"),
            ("lpips", objective.lpips != "none", "objective.lpips"),
            ("gan", objective.discriminator_width > 0, "objective.discriminator_width above 0"),
            *((name, objective.head is not None, "objective.head") for name in sorted(SELF_DISTILLATION)),
        ]
        for name, there, what in needs:
            if name in named and not there:
                raise ConfigError(f"stages.{i}.weights.{name} needs {what}")
