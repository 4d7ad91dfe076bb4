"""Options of RecTok. Defaults are the released model and the paper's losses."""

from dataclasses import dataclass, field


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
class TeacherConfig:
    """A frozen network whose patch features the semantic decoder predicts."""

    backend: str = "transformers"     # transformers, timm, asset (a name of `toklab assets`), random (transformers config, seeded)
    source: str = "facebook/dinov3-vitl16-pretrain-lvd1689m"   # hub id, local path, timm name or asset name
    input_size: int = 0               # pixels a side given to the network; 0: as published for this kind of teacher
    config: dict[str, str] = field(default_factory=dict)       # backend random: the network's config


@dataclass
class ObjectiveConfig:
    """Losses of the paper (section 3). Weights live in the stages."""

    teachers: dict[str, TeacherConfig] = field(default_factory=lambda: {"dinov3": TeacherConfig()})
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
    lpips: str = "vgg"                       # backbone of LPIPS: vgg (as published), alex
    logits_network: str = "convnext_small"   # network of the logit term: convnext_small (as published), teacher, none
    logits_weight: float = 0.1               # weight of the logit term in the perceptual mean
    discriminator_width: int = 64            # PatchGAN channels of the first layer
    discriminator_layers: int = 3            # PatchGAN depth
