"""Maps the authors' released VTP weights onto ours and back. Kinds come from the keys, sizes from the shapes, the authors' config
or their table; depth is never counted in the keys, so that a file that lacks its last blocks is refused."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit
from tokenizers_lab.nn.dinov3_vit import PRECISIONS, BlocksConfig, RotaryConfig
from tokenizers_lab.nn.rope import grid_periods
from tokenizers_lab.text import TextConfig

from .config import RELEASED_ROTARY, ModelConfig, TextEncoderConfig
from .model import VTP

RELEASE = "the official VTP checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "MiniMaxAI/VTP-Large-f16d64",           # VTP-Base-f16d64 and VTP-Small-f16d64 convert as well: give their file
    "revision": "main",
    "files": ["model.safetensors"],
    "licence": "MIT with a clause on attribution",    # of github.com/MiniMax-AI/VTP
    "source": "https://huggingface.co/MiniMaxAI/VTP-Large-f16d64",
}
# width: (depth, heads) of the released trunks and decoders, and of their text encoders
OFFICIAL_SIZES = {384: (12, 6), 768: (12, 12), 1024: (24, 16)}
TEXT_SIZES = {768: (12, 12)}
# the authors' options: values that we have no other of
FIXED: dict[str, Any] = {
    "text_ls_init_value": None, "text_embed_cls": False, "text_pad_id": 0, "text_no_causal_mask": False,
    "text_pool_type": "argmax", "text_proj_type": "linear", "text_output_tokens": False, "train_reconstruction": True,
}
FIRST_LAYER_SCALE = 1e-5      # where the weights have layer scales; any value does, since they replace it
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"^text\.blocks\.(\d+)\.norm(\d)\.", r"text_transformer.resblocks.\1.ln_\2."),
    (r"^text\.blocks\.(\d+)\.attention\.qkv\.", r"text_transformer.resblocks.\1.attn.in_proj_"),
    (r"^text\.blocks\.(\d+)\.attention\.out\.", r"text_transformer.resblocks.\1.attn.out_proj."),
    (r"^text\.blocks\.(\d+)\.fc1\.", r"text_transformer.resblocks.\1.mlp.c_fc."),
    (r"^text\.blocks\.(\d+)\.fc2\.", r"text_transformer.resblocks.\1.mlp.c_proj."),
    (r"^text\.token_embedding\.", "token_embedding."),
    (r"^text\.positions$", "positional_embedding"),
    (r"^text\.norm\.", "ln_final."),
    (r"^text\.projection\.", "text_projection."),
    (r"^contrast\.projection\.", "visual_proj."),
    (r"^contrast\.", ""),
    (r"^trunk\.class_token$", "trunk.cls_token"),
    (r"^trunk\.embed\.", "trunk.patch_embed.proj."),
    (r"^trunk\.bottleneck\.", "trunk.feature_bottleneck."),
    (r"^decoder\.embed\.", "decoder.proj_in."),
    (r"^decoder\.pixels\.", "decoder.proj_out."),
    (r"^decoder\.", "pixel_decoder."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.scale(\d)\.gamma$", r".ls\1.gamma"),
    (r"\.mlp\.down\.", ".mlp.w3."),
]
CONVOLUTIONS = ("decoder.embed.weight", "decoder.pixels.weight")      # 1 × 1 there, linear maps here
OURS_ONLY = ("latent_mean", "latent_std")              # statistics: the authors keep them outside the weights
PERIODS = {"trunk": "trunk.rope_embed.periods", "decoder": "pixel_decoder.rope_embed.periods"}      # tables that we compute
TRAINING_PREFIXES = {"transformer.": "text_transformer.", "proj.": "visual_proj."}      # the training class: the release's name
TEACHER_PREFIX = "teacher_"
HEAD_NAMES = {      # official → ours
    "last_layer.weight_g": "last.parametrizations.weight.original0",
    "last_layer.weight_v": "last.parametrizations.weight.original1",
}


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for VTP(model), latent statistics 0 and 1
    heads: dict[str, Tensor]                    # dino.…: the student's DINO head, where there is one (not in the release)
    skipped: list[str]                          # keys of the teacher


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our tokenizer from an official state dict, under the names of the release or of the training class.

    config: the authors' options (their config.json, or `constructor_args` of it), needed where a width is not in their table.
    Raises CheckpointError on a key that is missing, left over or of another shape, ConfigError on options that we do not have.
    """
    state = official_state(checkpoint)
    skipped = [k for k in state if k.startswith(TEACHER_PREFIX)]
    head = dino_head({k: v for k, v in state.items() if k.startswith("dino_head.")}, "dino_head.")
    state = {k: v for k, v in state.items() if not k.startswith((TEACHER_PREFIX, "dino_head."))}
    arguments = official_arguments(config)
    try:
        model = infer_model(state, arguments)
    except KeyError as error:
        raise CheckpointError(f"{RELEASE} misses {error.args[0]}") from error
    with torch.device("meta"):
        ours = VTP(model).state_dict()
    expected = to_official(ours, model)
    check_fit({k: v.shape for k, v in expected.items()}, state, RELEASE)
    check_periods(state, expected)
    tokenizer = {k: from_entries(k, [state[name] for name in names(k, ours)], v.shape)
                 for k, v in ours.items() if k not in OURS_ONLY}
    tokenizer |= {"latent_mean": torch.zeros(model.latent_channels), "latent_std": torch.ones(model.latent_channels)}
    return Converted(model, tokenizer, {f"dino.{k}": v for k, v in head.items()}, skipped)


def to_official(
    tokenizer: Mapping[str, Tensor], model: ModelConfig, heads: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`, without a teacher. Latent statistics are dropped."""
    state: dict[str, Tensor] = {}
    for key, value in tokenizer.items():
        if key not in OURS_ONLY:
            state |= zip(names(key, tokenizer), to_entries(key, value))
    for part, name in PERIODS.items():
        cfg: BlocksConfig = getattr(model, part)
        found = grid_periods(cfg.width // cfg.heads, PRECISIONS[cfg.rotary.coordinates])
        state[name] = found.to(PRECISIONS[cfg.rotary.periods])
    there = {f"dino.{new}": old for old, new in HEAD_NAMES.items()}
    return state | {f"dino_head.{there.get(k, k.removeprefix('dino.'))}": v for k, v in (heads or {}).items()}


def names(key: str, ours: Mapping[str, Tensor]) -> list[str]:
    """The official keys of one of ours: two for the two matrices of a gated feed-forward."""
    if key == "text.projection.weight" and "text.projection.bias" not in ours:
        return ["text_projection"]
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return [key.replace("gate_up", name) for name in ("w1", "w2")] if ".mlp.gate_up." in key else [key]


def to_entries(key: str, value: Tensor) -> list[Tensor]:
    """The official tensors of one of ours."""
    if ".mlp.gate_up." in key:
        return [part.clone() for part in value.chunk(2)]
    if key == "text.projection.weight":      # a parameter that stands on the right there; with a bias a linear map
        return [value.T.contiguous()]
    return [value[..., None, None] if key in CONVOLUTIONS else value]


def from_entries(key: str, values: list[Tensor], shape: torch.Size) -> Tensor:
    """Our tensor from the official ones."""
    if len(values) == 2:
        return torch.cat(values)
    return values[0].T.contiguous() if key == "text.projection.weight" else values[0].reshape(shape)


def official_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint, under the names of the release."""
    state = next((checkpoint[k] for k in ("state_dict", "model") if isinstance(checkpoint.get(k), Mapping)), checkpoint)
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError("this is no VTP checkpoint: it is no state dict, and has none under 'model' or 'state_dict'")
    renamed = {}
    for key, value in state.items():
        old = next((prefix for prefix in TRAINING_PREFIXES if key.startswith(prefix)), None)
        renamed[key if old is None else TRAINING_PREFIXES[old] + key.removeprefix(old)] = value
    return renamed


def dino_head(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our DINO head's state dict from the official keys under that prefix."""
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {HEAD_NAMES.get(k, k): v for k, v in found.items()}


def official_arguments(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The authors' options, flat. Raises ConfigError on values that we do not have."""
    told = config or {}
    arguments = dict(told.get("constructor_args", told))
    arguments.setdefault("decoder_mlp_ratio", told.get("pixel_decoder_fixed", {}).get("ffn_ratio", 4.0))
    for name, only in FIXED.items():
        if arguments.get(name, only) != only:
            raise ConfigError(f"VTP's option {name} must be {only} here, not {arguments[name]}")
    return arguments


def check_periods(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the stored periods of the rotary tables are not those that we compute."""
    for name in PERIODS.values():
        if not state[name].is_meta and not torch.allclose(state[name].float(), expected[name].float(), rtol=1e-2):
            raise CheckpointError(f"{RELEASE} has other rotary periods in {name} than from 1 to 100")


def infer_model(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> ModelConfig:
    """Our model config. Raises KeyError if telling keys are missing, ConfigError on a width that no one describes."""
    width, patch = state["trunk.patch_embed.proj.weight"].shape[0], state["trunk.patch_embed.proj.weight"].shape[-1]
    channels = state["pixel_decoder.proj_in.weight"].shape[1]
    text = infer_text(state, arguments) if "token_embedding.weight" in state else None
    ae_only = arguments.get("vision_bottleneck_ae_only", True)
    if text is not None:
        ae_only = state["visual_proj.weight"].shape[1] == width if width != channels else ae_only
    scale = state.get("logit_scale")
    return ModelConfig(
        image_size=int(arguments.get("image_size", 256)),
        patch=patch,
        latent_channels=channels,
        bottleneck_ae_only=bool(ae_only),
        trunk=infer_blocks(state, "trunk", "vision", width, arguments),
        decoder=infer_blocks(state, "pixel_decoder", "decoder", state["pixel_decoder.proj_in.weight"].shape[0], arguments),
        text=text,
        image_feature=arguments.get("vision_clip_feat", "cls"),
        logit_bias=0.0 if "logit_bias" in state else None,
        nonscalar_logit_scale=scale is not None and scale.dim() == 1,
    )


def infer_blocks(state: Mapping[str, Tensor], part: str, option: str, width: int, arguments: Mapping[str, Any]) -> BlocksConfig:
    """Sizes and kinds of a stack of blocks. Heads come from the stored periods, of which there are head width / 4."""
    block = f"{part}.blocks.0."
    known = OFFICIAL_SIZES.get(width)
    if known is None and f"{option}_depth" not in arguments:
        raise ConfigError(f"{part} is {width} wide, no size in the authors' table: give their config with {option}_depth")
    periods = state[f"{part}.rope_embed.periods"]
    return BlocksConfig(
        width=width,
        depth=int(arguments[f"{option}_depth"]) if f"{option}_depth" in arguments else known[0],      # type: ignore[index]
        heads=width // (4 * periods.shape[0]),
        mlp_ratio=float(arguments.get(f"{option}_mlp_ratio", 4.0)),
        ffn="mlp" if block + "mlp.fc1.weight" in state else "swiglu",
        norm="layer_norm" if block + "norm1.bias" in state else "rms_norm",
        qk_norm=block + "attn.q_norm.weight" in state,
        layer_scale=FIRST_LAYER_SCALE if block + "ls1.gamma" in state else 0.0,
        rotary=infer_rotary(periods),
    )


def infer_rotary(periods: Tensor) -> RotaryConfig:
    """bfloat16, as released, unless the stored periods are finer. Their type alone says nothing: files are stored in any."""
    fine = not periods.is_meta and not torch.equal(periods.float(), periods.to(torch.bfloat16).float())
    return RotaryConfig() if fine else replace(RELEASED_ROTARY)


def infer_text(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> TextEncoderConfig:
    """Sizes of the text encoder; its heads cannot be seen in the weights."""
    vocabulary, width = state["token_embedding.weight"].shape
    known = TEXT_SIZES.get(width)
    if known is None and not {"text_depth", "text_num_heads"} <= arguments.keys():
        raise ConfigError(f"the text encoder is {width} wide, no size in the authors' table: give their config")
    depth, heads = known or (0, 0)
    context, default = state["positional_embedding"].shape[0], TextEncoderConfig()
    text = replace(default.text, context=context)
    if vocabulary != default.text.vocabulary:      # not CLIP's: its ids are the user's business
        text = TextConfig(vocabulary=vocabulary, pad=0, context=context)
    return TextEncoderConfig(
        width=width,
        depth=int(arguments.get("text_depth", depth)),
        heads=int(arguments.get("text_num_heads", heads)),
        mlp_ratio=float(arguments.get("text_mlp_ratio", 4.0)),
        quick_gelu=bool(arguments.get("text_quick_gelu", False)),
        projection_bias="text_projection.weight" in state,
        text=text,
    )
