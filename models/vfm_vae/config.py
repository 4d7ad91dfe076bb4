"""Options of VFM-VAE. Defaults are the released model and the losses of its first stage."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers_lab.errors import ConfigError

TERMS = ("l1", "l2", "lpips", "ssim", "multiscale", "gan", "patchgan", "feature_matching", "vf", "kl", "quantizer", "entropy")
RECONSTRUCTION = ("l1", "l2", "lpips", "ssim", "multiscale")      # what the adaptive weight of the term vf compares itself with
STAGE_MAY_CHANGE = ("adaptive", "equivariance", "equivariance_latent", "equivariance_scale",
                    "equivariance_smallest", "multiscale_weights")
KINDS = ("siglip", "dinov2", "dinov3", "mae", "clip", "cnn")
SIGLIP2_LARGE = {
    "model_type": "siglip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 512, "patch_size": 16,
}


@dataclass
class VFMConfig:
    """The frozen foundation model. Its weights come from `init_parts.vfm`; here is only what builds it."""

    backend: str = "transformers"     # transformers (see `config`) or timm (see `name`)
    config: dict[str, Any] = field(default_factory=lambda: dict(SIGLIP2_LARGE))   # transformers: model_type and its options
    name: str = ""                    # timm: architecture, such as eva02_base_patch14_224 or tf_efficientnet_lite0
    kind: str = ""                    # siglip, dinov2, dinov3, mae, clip, cnn: how it sees images; empty: as its name says
    scale: float = 2.0                # the images are resized by this first
    layers: list[int] = field(default_factory=lambda: [0, 12, -1])   # 0: embeddings, n: behind block n, -1: behind the last norm,
                                      # -2: before it; of a CNN: the stages, the first is 0


@dataclass
class QuantizerConfig:
    """Of a discrete latent."""

    codebooks: int = 8                # latent: vq: groups of channels, each with a codebook
    size: int = 16384                 # latent: vq: entries of all codebooks together
    beta: float = 0.25                # latent: vq: weight of the commitment
    entropy_temperature: float = 0.01   # latent: vq: of the softmax in the term entropy
    levels: list[int] = field(default_factory=lambda: [8, 8, 8, 5, 5, 5])   # latent: fsq: values of each channel


@dataclass
class ModelConfig:
    """The network that ships."""

    image_size: int = 256             # training size; every multiple of `downsample` works
    downsample: int = 16              # pixels a side of a latent position
    latent: str = "gaussian"          # gaussian; vq: normalised codebooks, one for each group of channels; fsq
    latent_channels: int = 32         # C
    logvar_bias: float = 0.0          # latent: gaussian: first log-variance of the posterior (0 as published)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    vfm: VFMConfig = field(default_factory=VFMConfig)
    widths: list[int] = field(default_factory=lambda: [64, 64, 64])   # channels to which each layer's features are projected
    compress: str = "attention"       # attention projections, or conv: 1 × 1 convolutions
    compress_layers: int = 1          # layers of each attention projection of the encoder
    decompress: str = "attention"     # as `compress`, of the latents
    decompress_layers: int = 1        # layers of the decoder's attention projection
    expansion: int = 16               # channels of the decompressed latents for each latent channel
    pooled: int = 1                   # side of the pooled latents that the mapping network is given
    code: int = 512                   # channels of the global style code
    blocks: int = 6                   # synthesis blocks, each of twice the size of the one before; the last of image_size
    channel_base: int = 32768         # a block of r pixels a side has channel_base · image_size / (256 · r) channels
    channel_max: int = 512            # but at most so many
    res_blocks: int = 2               # more ConvNeXt layers of a block: twice or (see `deep`) three times so many
    deep: bool = True                 # three times in the first four blocks
    blur: bool = True                 # binomial blur behind each up-sampling
    legacy_noise: bool = False        # fixed noise maps, as in the released weights
    latent_blocks: list[int] = field(default_factory=lambda: [0, 1, 2, 3])     # blocks that are given the latents
    latent_widths: list[int] = field(default_factory=lambda: [512, 256, 128, 128])   # in so many channels, by number of the block
    latent_activation: str = "lrelu"  # lrelu, silu or gelu
    attention_blocks: list[int] = field(default_factory=lambda: [0, 1, 2])     # blocks with self-attention
    attention_depths: list[int] = field(default_factory=lambda: [2, 2, 2])     # so many layers each


@dataclass
class JudgeConfig:
    """The frozen network in whose features the projected discriminator judges."""

    backend: str = "timm"             # timm, transformers, asset (see `toklab assets`), random (transformers config, seeded)
    source: str = "vit_small_patch16_224.dino"
    config: dict[str, Any] = field(default_factory=dict)      # backend random: the network's config
    layers: list[int] = field(default_factory=lambda: [3, 6, 9, 12, 0])   # one head each; of a CNN: stages
    size: int = 224                   # pixels a side that it is given
    crop: float = 0.5                 # chance of a crop of that size, instead of a resize, where the images are larger


@dataclass
class ObjectiveConfig:
    """Losses of the paper. Weights live in the stages."""

    lpips: str = "vgg"                # backbone of LPIPS: vgg (as published), alex, none
    judge: JudgeConfig | None = field(default_factory=JudgeConfig)      # of the term gan; none: there is no such term
    augment: bool = True              # differentiable augmentation in front of the judge
    patchgan: bool = False            # the PatchGAN of the terms patchgan and feature_matching
    patchgan_width: int = 64          # channels of its first layer
    patchgan_layers: int = 3          # layers of stride 2
    patchgan_scales: int = 3          # networks, each on images of half the size
    patchgan_loss: str = "mse"        # mse, bce or hinge
    multiscale_weights: list[float] = field(default_factory=lambda: [0.1] * 5)   # of the smaller images, the largest first
    vf: bool = True                   # the alignment head of the term vf
    distance_margin: float = 0.0      # term vf: margin of the difference of cosine matrices
    cosine_margin: float = 0.0        # term vf: margin of 1 − cosine
    distance_weight: float = 1.0      # term vf: weight of the matrices
    cosine_weight: float = 1.0        # term vf: weight of the cosines
    adaptive: dict[str, float] = field(default_factory=dict)   # term vf is scaled by the ratio of gradient norms of this sum of
                                      # reconstruction terms (give the stage's weights) and itself; empty: it is not scaled
    equivariance: bool = True         # scale and turn latents or images in training
    equivariance_latent: float = 0.5  # chance that the latents are transformed, else the input is
    equivariance_scale: float = 0.25  # chance that the input is scaled where it is its turn
    equivariance_smallest: int = 32   # no scale gives images of fewer pixels a side


def channels(cfg: ModelConfig) -> list[int]:
    """Width of each synthesis block."""
    sizes = [cfg.image_size // 2 ** (cfg.blocks - 1) * 2**i for i in range(cfg.blocks)]
    return [min(int(cfg.channel_base // int(size / (cfg.image_size / 256))), cfg.channel_max) for size in sizes]


def check_model(cfg: ModelConfig, where: str = "model") -> None:
    """Raise ConfigError on sizes that do not fit together."""
    choices = {"latent": (cfg.latent, ("gaussian", "vq", "fsq")), "compress": (cfg.compress, ("attention", "conv")),
               "decompress": (cfg.decompress, ("attention", "conv")), "vfm.backend": (cfg.vfm.backend, ("transformers", "timm")),
               "latent_activation": (cfg.latent_activation, ("lrelu", "silu", "gelu")), "vfm.kind": (cfg.vfm.kind, ("", *KINDS))}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{value}'")
    for name in ("image_size", "downsample", "latent_channels", "compress_layers", "decompress_layers", "expansion", "pooled",
                 "code", "blocks", "channel_base", "channel_max", "res_blocks"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, not {getattr(cfg, name)}")
    if cfg.image_size % cfg.downsample:
        raise ConfigError(f"{where}.image_size {cfg.image_size} must be a multiple of {where}.downsample {cfg.downsample}")
    if cfg.image_size % 2 ** cfg.blocks:      # block 0 doubles its input
        unit = 2**cfg.blocks
        raise ConfigError(f"{where}.image_size {cfg.image_size} must be a multiple of {unit}, as there are {cfg.blocks} blocks")
    if not cfg.vfm.layers or len(cfg.vfm.layers) != len(cfg.widths) or min(cfg.widths) < 1:
        raise ConfigError(f"{where}.widths must give a width for each of the {len(cfg.vfm.layers)} layers of {where}.vfm.layers")
    if cfg.vfm.scale <= 0:
        raise ConfigError(f"{where}.vfm.scale must be above 0, not {cfg.vfm.scale}")
    check_discrete(cfg, where)
    check_synthesis(cfg, where)


def check_discrete(cfg: ModelConfig, where: str) -> None:
    """Raise ConfigError on codebooks that do not divide their channels or entries."""
    quantizer = cfg.quantizer
    if cfg.latent == "vq" and (quantizer.codebooks < 1 or cfg.latent_channels % quantizer.codebooks
                               or quantizer.size < 1 or quantizer.size % quantizer.codebooks):
        raise ConfigError(f"{where}: quantizer.codebooks {quantizer.codebooks} must divide latent_channels and quantizer.size")
    if cfg.latent == "fsq" and (not quantizer.levels or min(quantizer.levels) < 2):
        raise ConfigError(f"{where}.quantizer.levels must be 2 values or more each, not {list(quantizer.levels)}")


def check_synthesis(cfg: ModelConfig, where: str) -> None:
    """Raise ConfigError on blocks that do not exist or widths that group norm and attention cannot divide."""
    if 0 not in cfg.latent_blocks:
        raise ConfigError(f"{where}.latent_blocks must contain 0: the first block has no other input")
    for name in ("latent_blocks", "attention_blocks"):
        numbers = list(getattr(cfg, name))
        if any(not 0 <= i < cfg.blocks for i in numbers) or len(set(numbers)) != len(numbers):
            raise ConfigError(f"{where}.{name} must be different numbers below {where}.blocks {cfg.blocks}, not {numbers}")
    if len(cfg.latent_widths) <= max(cfg.latent_blocks):
        raise ConfigError(f"{where}.latent_widths must go up to block {max(cfg.latent_blocks)}")
    if len(cfg.attention_depths) != len(cfg.attention_blocks):
        raise ConfigError(f"{where}.attention_depths must give a depth for each of {where}.attention_blocks")
    for i, width in enumerate(channels(cfg)):
        if width < 4 or width % min(32, width // 4):
            raise ConfigError(f"{where}: block {i} has {width} channels, which group norm cannot divide: change channel_base")
        if i in cfg.attention_blocks and width % 8:
            raise ConfigError(f"{where}: block {i} has attention of 8 heads, but {width} channels")


def check_objective(cfg: ObjectiveConfig, where: str = "objective") -> None:
    """Raise ConfigError on an unknown choice or a value out of range."""
    choices = {"lpips": (cfg.lpips, ("vgg", "alex", "none")), "patchgan_loss": (cfg.patchgan_loss, ("mse", "bce", "hinge"))}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"{where}.{name} must be one of {', '.join(known)}; not '{value}'")
    if min(cfg.patchgan_width, cfg.patchgan_layers, cfg.patchgan_scales) < 1:
        raise ConfigError(f"{where}: patchgan_width, patchgan_layers and patchgan_scales must be at least 1")
    for name in ("equivariance_latent", "equivariance_scale"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ConfigError(f"{where}.{name} must be in [0, 1], not {getattr(cfg, name)}")
    unknown = sorted(set(cfg.adaptive) - set(RECONSTRUCTION))
    if unknown:
        raise ConfigError(f"{where}.adaptive: '{unknown[0]}' is no reconstruction term; these are {', '.join(RECONSTRUCTION)}")


def validate(cfg: Any) -> None:
    """Rules over the options of a run (`RunConfig`), beyond their types. Raises ConfigError."""
    from tokenizers_lab.config import stage_objectives

    check_model(cfg.model)
    if cfg.data.size % cfg.model.downsample:
        raise ConfigError(f"data.size {cfg.data.size} must be a multiple of model.downsample {cfg.model.downsample}")
    for i, stage, objective, where in stage_objectives(cfg, TERMS, STAGE_MAY_CHANGE):
        check_objective(objective, where)
        needs = {"gan": objective.judge is not None, "patchgan": objective.patchgan, "feature_matching": objective.patchgan,
                 "vf": objective.vf, "lpips": objective.lpips != "none", "kl": cfg.model.latent == "gaussian",
                 "quantizer": cfg.model.latent == "vq", "entropy": cfg.model.latent == "vq"}
        lacking = sorted(name for name, there in needs.items() if stage.weights.get(name) and not there)
        if lacking:
            raise ConfigError(f"stages.{i}.weights.{lacking[0]} needs a network that the model or objective does not have")
