"""Maps the authors' released RecTok weights onto ours and back. Nothing is guessed: sizes come from the shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit

from .config import ModelConfig, ViTConfig
from .model import RecTok, SemanticMLP, SemanticTransformer

RELEASE = "the official RecTok checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "QingyuShi/RecTok",
    "revision": "main",
    "files": ["RecTok.pth", "RecTok_decft.pth"],      # after training; after decoder finetuning
    "licence": "Apache-2.0",                           # by the README of github.com/Shi-qingyu/RecTok
    "source": "https://huggingface.co/QingyuShi/RecTok",
}
# The authors' table of sizes; heads cannot be seen in the weights.
OFFICIAL_SIZES = {
    "tiny": ViTConfig(192, 3, 4), "small": ViTConfig(512, 8, 8), "base": ViTConfig(768, 12, 12),
    "large": ViTConfig(1024, 24, 16), "xl": ViTConfig(1152, 28, 16), "huge": ViTConfig(1280, 32, 16),
}
TEACHER_PREFIX = "sem_foundation_models."
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"\btransformer\.blocks\.(\d+)\.attention_norm\b", r"transformer.\1.norm1"),
    (r"\btransformer\.blocks\.(\d+)\.mlp_norm\b", r"transformer.\1.norm2"),
    (r"\btransformer\.blocks\.(\d+)\.attention\.out\b", r"transformer.\1.attn.proj"),
    (r"\btransformer\.blocks\.(\d+)\.attention\b", r"transformer.\1.attn"),
    (r"\btransformer\.blocks\.(\d+)\.mlp\.gate_up\b", r"transformer.\1.mlp.w12"),
    (r"\btransformer\.blocks\.(\d+)\.mlp\.down\b", r"transformer.\1.mlp.w3"),
    (r"\btransformer\.norm_in\b", "ln_pre"),
    (r"\btransformer\.norm_out\b", "ln_post"),
    (r"\bpositions$", "positional_embedding"),
    (r"^encoder\.embed\b", "encoder.patch_embed.0"),
    (r"^encoder\.head\b", "encoder.latent_head"),
    (r"^decoder\.embed\b", "decoder.decoder_embed"),
    (r"^decoder\.pixels\b", "decoder.ffn.1"),
    (r"^decoder\.smooth\b", "decoder.conv_out"),
    (r"^(sem_decoders\.[^.]+)\.embed\b", r"\1.token_embedding"),
    (r"^(sem_decoders\.[^.]+)\.mask_token\b", r"\1.mask_embedding"),
]
OURS_ONLY = ("latent_mean", "latent_std")              # statistics: the authors keep them outside the weights


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for RecTok(model), latent statistics 0 and 1
    heads: dict[str, Tensor]                    # for RecTokObjective.heads: semantic_<teacher>.…
    skipped: list[str]                          # keys of frozen teachers, which are not ours to convert
    semantic: "SemanticSizes"


@dataclass
class SemanticSizes:
    """What the semantic decoders of a checkpoint tell of the objective."""

    kind: str = "transformer"                                     # transformer or mlp
    size: ViTConfig = field(default_factory=lambda: ViTConfig(192, 3, 4))
    widths: dict[str, int] = field(default_factory=dict)          # teacher: channels of its features


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our tokenizer and semantic decoders from an official checkpoint, or from the state dict inside it.

    config: the authors' constructor arguments (`constructor_args`, `model_sizes`), needed only where a width is not in
    their table of sizes. Teachers are left out. A decoder-finetuned checkpoint has no semantic decoders.
    Raises CheckpointError on a key that is missing, left over or of another shape, and on class tokens.
    """
    state = official_state(checkpoint)
    skipped = [k for k in state if k.startswith(TEACHER_PREFIX)]
    state = {k: v for k, v in state.items() if not k.startswith(TEACHER_PREFIX)}
    if "encoder.sem_cls_token_embedding" in state:
        raise CheckpointError("this RecTok was trained with a class token, which is not supported: the release has none")
    sizes = official_sizes(config)
    model = infer_model(state, sizes)
    semantic = infer_semantic(state, sizes)
    ours = our_tensors(model, semantic)
    by_official = {official_name(k): k for k in ours if k not in OURS_ONLY}
    check_fit({official: official_shape(k, ours[k].shape) for official, k in by_official.items()}, state, RELEASE)
    found = {k: state[official].reshape(ours[k].shape) for official, k in by_official.items()}
    statistics = {"latent_mean": torch.zeros(model.latent_channels), "latent_std": torch.ones(model.latent_channels)}
    tokenizer = {k: v for k, v in found.items() if not k.startswith("semantic_")}
    return Converted(
        model, tokenizer | statistics, {k: v for k, v in found.items() if k.startswith("semantic_")}, skipped, semantic
    )


def to_official(tokenizer: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`, without teachers. Latent statistics are dropped."""
    ours = {**tokenizer, **(heads or {})}
    return {official_name(k): v.reshape(official_shape(k, v.shape)) for k, v in ours.items() if k not in OURS_ONLY}


def official_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint: its moving average if it has one. Old checkpoints say `aux` for `sem`."""
    state = checkpoint
    for name in ("model_ema", "model"):
        if isinstance(checkpoint.get(name), Mapping):
            state = checkpoint[name]
            break
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError("this is no RecTok checkpoint: it has neither 'model_ema' nor 'model', and is no state dict")
    return {re.sub(r"^aux_", "sem_", k): v for k, v in state.items()}


def official_name(key: str) -> str:
    """The official key of one of ours (of the tokenizer, or of the heads)."""
    key = re.sub(r"^semantic_([^.]+)\.", r"sem_decoders.\1.", key)
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def official_shape(key: str, shape: torch.Size) -> torch.Size:
    """The official shape of one of our tensors: the map to pixels is a 1 × 1 convolution there, a linear map here."""
    return torch.Size((*shape, 1, 1)) if key == "decoder.pixels.weight" else shape


def official_size(name: str, config: Mapping[str, Any] | None = None) -> ViTConfig:
    """Width, depth and heads of a size's official name. Raises ConfigError if it is in no table."""
    own = (config or {}).get("model_sizes", {})
    if name in own:
        return ViTConfig(own[name]["width"], own[name]["layers"], own[name]["heads"])
    if name not in OFFICIAL_SIZES:
        raise ConfigError(f"RecTok has no model size '{name}'; known: {', '.join([*own, *OFFICIAL_SIZES])}")
    return OFFICIAL_SIZES[name]


def official_sizes(config: Mapping[str, Any] | None) -> dict[str, ViTConfig]:
    """Sizes by part (encoder, decoder, semantic) as far as the authors' arguments name them."""
    arguments = (config or {}).get("constructor_args", {})
    names = {"encoder": "vit_enc_model_size", "decoder": "vit_dec_model_size", "semantic": "vit_sem_model_size"}
    return {part: official_size(arguments[key], config) for part, key in names.items() if key in arguments}


def infer_model(state: Mapping[str, Tensor], sizes: Mapping[str, ViTConfig]) -> ModelConfig:
    """Our model config from the official shapes. Raises CheckpointError if the telling keys are missing."""
    try:
        patch = state["encoder.patch_embed.0.weight"].shape[-1]
        channels = state["decoder.decoder_embed.weight"].shape[1]
        side = round(state["encoder.positional_embedding"].shape[1] ** 0.5)
        return ModelConfig(
            image_size=side * patch,
            patch=patch,
            latent_channels=channels,
            encoder=infer_vit(state, "encoder.", sizes.get("encoder")),
            decoder=infer_vit(state, "decoder.", sizes.get("decoder")),
            qk_norm="encoder.transformer.0.attn.q_norm.weight" in state,
            variational=state["encoder.latent_head.weight"].shape[0] != channels,
        )
    except KeyError as error:
        raise CheckpointError(f"the official RecTok checkpoint misses {error.args[0]}") from error


def infer_semantic(state: Mapping[str, Tensor], sizes: Mapping[str, ViTConfig]) -> SemanticSizes:
    """Kind and size of the semantic decoders from the official shapes."""
    found = SemanticSizes()
    try:
        for name in sorted({k.split(".")[1] for k in state if k.startswith("sem_decoders.")}):
            prefix = f"sem_decoders.{name}."
            if prefix + "mlp.0.weight" in state:
                found.kind, found.widths[name] = "mlp", state[prefix + "mlp.2.weight"].shape[0]
            else:
                found.size = infer_vit(state, prefix, sizes.get("semantic"))
                found.widths[name] = state[prefix + "out.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"the official RecTok checkpoint misses {error.args[0]}") from error
    return found


def infer_vit(state: Mapping[str, Tensor], prefix: str, named: ViTConfig | None) -> ViTConfig:
    """Size of the transformer under that prefix: the one the arguments name, or the authors' size of that width.

    Depth is not counted in the keys, so that a file that lacks its last blocks is refused.
    """
    width = state[prefix + "ln_pre.weight"].shape[0]
    found = named or next((size for size in OFFICIAL_SIZES.values() if size.width == width), None)
    if found is None:
        raise ConfigError(f"{prefix[:-1]} is {width} wide, no size in the authors' table: give their config with model_sizes")
    return found


def our_tensors(model: ModelConfig, semantic: SemanticSizes) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of these sizes has in our names, without memory (on the meta device)."""
    with torch.device("meta"):
        parts = {"": RecTok(model)} | {f"semantic_{name}.": semantic_decoder(model, semantic, name) for name in semantic.widths}
    return {prefix + k: v for prefix, part in parts.items() for k, v in part.state_dict().items()}


def semantic_decoder(model: ModelConfig, semantic: SemanticSizes, name: str) -> nn.Module:
    """The semantic decoder of that teacher."""
    if semantic.kind == "mlp":
        return SemanticMLP(model.latent_channels, semantic.widths[name])
    tokens = (model.image_size // model.patch) ** 2
    return SemanticTransformer(model.latent_channels, semantic.size, tokens, semantic.widths[name])
