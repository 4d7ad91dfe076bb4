"""Options of UniFlow. Defaults are the released model and the paper's losses."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.diffusion.flow import DISTRIBUTIONS, NORMS, TimeConfig
from tokenizers_lab.errors import ConfigError
from tokenizers_lab.teachers.vision_config import VisionTeacherConfig

TERMS = ("flow", "distill", "semantic", "dispersive")
ENCODERS = ("internvit", "timm", "transformers")
STAGE_MAY_CHANGE = ("beta", "norm", "time", "time_per")


@dataclass
class EncoderConfig:
    """The vision transformer. Its weights come from `init_parts.encoder`; here is only what builds it."""

    kind: str = "internvit"           # internvit (ours; the options below), timm (see `name`) or transformers (see `config`)
    width: int = 1024                 # internvit: channels of a token
    depth: int = 24                   # internvit: layers
    heads: int = 16                   # internvit: attention heads
    hidden: int = 4096                # internvit: hidden channels of the MLP
    norm: str = "layer_norm"          # internvit: layer_norm or rms_norm
    norm_eps: float = 1e-6            # internvit: epsilon of the norms
    qkv_bias: bool = True             # internvit: bias of queries, keys and values
    qk_norm: bool = False             # internvit: RMS norm of queries and keys
    layer_scale: float = 1.0          # internvit: first value of the layer scales
    drop_path: float = 0.1            # internvit, timm: residual branches dropped at the last layer in training, 0 at the first
    name: str = ""                    # timm: architecture, such as vit_base_patch14_dinov2
    config: dict[str, Any] = field(default_factory=dict)      # transformers: model_type and the options of its config
    mean: list[float] = field(default_factory=list)   # of the colours that it was pretrained with; empty: those of its kind
    std: list[float] = field(default_factory=list)    # their standard deviation; empty: as above


@dataclass
class ModelConfig:
    """The network that ships."""

    image_size: int = 448             # training size; position embeddings are interpolated to other sizes
    patch: int = 14                   # pixels a side of a token
    latent_channels: int = 64         # C
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    width: int = 1024                 # channels of global blocks and flow network
    global_blocks: int = 6            # transformer blocks between latents and flow network; 0: none
    global_heads: int = 16            # their attention heads
    flow_blocks: int = 12             # residual blocks of the flow network
    init_gain: float = 0.0            # first weights of linear layers are N(0, gain² / inputs); 0: N(0, 0.02²), as released
    steps: int = 1                    # Euler steps of decoding, where no other number is asked for
    schedule_power: float = 1.0       # their times: 1 linear; q: pow_q, finer near noise for q < 1


@dataclass
class ObjectiveConfig:
    """Losses of the paper (section 3). Weights live in the stages."""

    time: TimeConfig = field(default_factory=lambda: TimeConfig("fat_lognorm"))   # times of the flow loss: 0 noise, 1 pixels
    time_per: str = "patch"           # one time a patch, or one an image: patch, image
    norm: str = "l2"                  # of the flow loss: l2, l1
    beta: float = 2.0                 # how much a layer's misalignment raises its weight in the distillation; 0: not
    semantic_teacher: VisionTeacherConfig | None = None     # of the term semantic; none: there is no such term


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    if cfg.patch < 1 or cfg.image_size < cfg.patch or cfg.image_size % cfg.patch:
        raise ConfigError(f"{where}.image_size {cfg.image_size} must be a multiple of {where}.patch {cfg.patch}")
    if min(cfg.latent_channels, cfg.flow_blocks, cfg.steps, cfg.global_heads) < 1 or cfg.global_blocks < 0:
        raise ConfigError(f"{where}: latent_channels, flow_blocks, steps and global_heads must be at least 1, global_blocks 0")
    if cfg.width < 1 or cfg.width % 4 or cfg.width % cfg.global_heads:
        raise ConfigError(f"{where}.width {cfg.width} must be a multiple of 4 and of {where}.global_heads {cfg.global_heads}")
    if cfg.init_gain < 0:
        raise ConfigError(f"{where}.init_gain must not be negative, but is {cfg.init_gain}")
    if cfg.schedule_power <= 0:
        raise ConfigError(f"{where}.schedule_power must be above 0, but is {cfg.schedule_power}")
    check_encoder(cfg.encoder, f"{where}.encoder")


def check_encoder(cfg: EncoderConfig, where: str) -> None:
    """Raise ConfigError on an unknown kind, sizes that do not fit, or a kind whose description is missing."""
    if cfg.kind not in ENCODERS:
        raise ConfigError(f"{where}.kind must be one of {', '.join(ENCODERS)}; not '{cfg.kind}'")
    if cfg.kind == "timm" and not cfg.name:
        raise ConfigError(f"{where}.kind timm needs {where}.name, an architecture of timm")
    if cfg.kind == "transformers" and "model_type" not in cfg.config:
        raise ConfigError(f"{where}.kind transformers needs {where}.config with a model_type")
    if min(cfg.width, cfg.depth, cfg.heads, cfg.hidden) < 1 or cfg.width % cfg.heads:
        raise ConfigError(f"{where}.width {cfg.width} must be a multiple of heads ({cfg.heads}); depth and hidden at least 1")
    if cfg.norm not in ("layer_norm", "rms_norm"):
        raise ConfigError(f"{where}.norm must be layer_norm or rms_norm, not '{cfg.norm}'")
    if not 0 <= cfg.drop_path < 1:
        raise ConfigError(f"{where}.drop_path must be in [0, 1), but is {cfg.drop_path}")
    for name in ("mean", "std"):
        if len(getattr(cfg, name)) not in (0, 3):
            raise ConfigError(f"{where}.{name} must name three colours, or none for those of the encoder's kind")
    if any(s <= 0 for s in cfg.std):
        raise ConfigError(f"{where}.std must be above 0, not {list(cfg.std)}")


def check_objective(cfg: ObjectiveConfig, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or a value out of range."""
    choices = {"time_per": (cfg.time_per, ("patch", "image")), "norm": (cfg.norm, NORMS),
               "time.distribution": (cfg.time.distribution, DISTRIBUTIONS)}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{value}'")
    if cfg.beta < 0:
        raise ConfigError(f"{where}.beta must not be negative, but is {cfg.beta}")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    check_model(cfg.model)
    if cfg.data.size % cfg.model.patch:
        raise ConfigError(f"data.size {cfg.data.size} must be a multiple of model.patch {cfg.model.patch}")
    for i, stage, objective, where in stage_objectives(cfg, TERMS, STAGE_MAY_CHANGE):
        check_objective(objective, where)
        if stage.weights.get("semantic") and objective.semantic_teacher is None:
            raise ConfigError(f"stages.{i}.weights.semantic needs objective.semantic_teacher")
