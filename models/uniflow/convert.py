"""Maps the authors' released UniFlow weights onto ours and back. Sizes come from the authors' config, never from the weights."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit

from .config import EncoderConfig, ModelConfig
from .model import UniFlow

RELEASE = "the official UniFlow checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "yuezhengrong/UniFlow",
    "revision": "main",
    "files": ["model.safetensors"],
    "licence": "MIT",                             # by the header of the model file; the repository has no licence file
    "source": "https://huggingface.co/yuezhengrong/UniFlow",
}
# the release's config.json, as far as the network depends on it; the class's own defaults are those of InternViT-6B
RELEASED = {
    "hidden_size": 1024, "vit_hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "image_size": 448, "patch_size": 14, "num_channels": 3, "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "qkv_bias": True,
    "qk_normalization": False, "initializer_factor": 1.0, "drop_path_rate": 0.1, "latent_ch": 64, "global_blocks_depth": 6,
    "num_decoder_layers": 12, "num_sampling_steps": "1", "use_chal_proj": True, "hidden_act": "gelu",
}
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"^encoder\.(class_embedding|patch_embedding|position_embedding)", r"embeddings.\1"),
    (r"^project\.fc1\.", "chal_proj.c_fc."),
    (r"^project\.fc2\.", "chal_proj.c_proj."),
    (r"^conditioner\.unproject\.fc1\.", "chal_unproj.c_fc."),
    (r"^conditioner\.unproject\.fc2\.", "chal_unproj.c_proj."),
    (r"^conditioner\.global_positions$", "global_block_pos_embed"),
    (r"^conditioner\.blocks\.", "global_blocks."),
    (r"^conditioner\.positions$", "decoder_pos_embed"),
    (r"^flow\.blocks\.(\d+)\.norm\.", r"flow.res_blocks.\1.in_ln."),
    (r"^flow\.blocks\.(\d+)\.mlp\.", r"flow.res_blocks.\1.mlp."),
    (r"^flow\.blocks\.(\d+)\.modulation\.", r"flow.res_blocks.\1.adaLN_modulation.1."),
    (r"^flow\.out_modulation\.", "flow.final_layer.adaLN_modulation.1."),
    (r"^flow\.out\.", "flow.final_layer.linear."),
    (r"^flow\.", "flow_head.net."),
]
OURS_ONLY = ("latent_mean", "latent_std")              # statistics: the authors released none


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for UniFlow(model), latent statistics 0 and 1
    heads: dict[str, Tensor]                    # empty: the adapters of training were not released


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our tokenizer from an official state dict.

    config: the authors' config.json, or constructor arguments (`constructor_args`); none: the release's.
    Raises CheckpointError on a key that is missing, left over or of another shape, ConfigError on options that we do not have.
    """
    state = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if not state or len(state) != len(checkpoint):
        raise CheckpointError("this is no UniFlow checkpoint: it is no state dict")
    model = model_config(RELEASED if config is None else config.get("constructor_args", config))
    with torch.device("meta"):
        ours = UniFlow(model).state_dict()
    by_official = {official_name(k): k for k in ours if k not in OURS_ONLY}
    check_fit({official: ours[k].shape for official, k in by_official.items()}, state, RELEASE)
    statistics = {"latent_mean": torch.zeros(model.latent_channels), "latent_std": torch.ones(model.latent_channels)}
    return Converted(model, {k: state[official] for official, k in by_official.items()} | statistics, {})


def to_official(tokenizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`. Latent statistics are dropped."""
    return {official_name(k): v for k, v in tokenizer.items() if k not in OURS_ONLY}


def official_name(key: str) -> str:
    """The official key of one of ours."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def model_config(arguments: Mapping[str, Any]) -> ModelConfig:
    """Our model config from the authors' arguments. Raises ConfigError on a missing one, or on a network that we do not have.

    Dropout is left out: it is 0 in the release and does nothing outside training.
    """
    try:
        found = {name: arguments[name] for name in RELEASED if name not in ("hidden_act", "num_channels")}
    except KeyError as error:
        raise ConfigError(f"the UniFlow config lacks {error.args[0]}: the authors' defaults are another model's") from error
    if found["hidden_size"] != found["vit_hidden_size"]:
        raise ConfigError("hidden_size and vit_hidden_size of a UniFlow config are two names of one number, and must agree")
    if not found["use_chal_proj"] or arguments.get("num_channels", 3) != 3 or arguments.get("hidden_act", "gelu") != "gelu":
        raise ConfigError("a UniFlow needs use_chal_proj true, 3 channels and exact GELU: others are not supported")
    width = found["hidden_size"]
    return ModelConfig(
        image_size=found["image_size"],
        patch=found["patch_size"],
        latent_channels=found["latent_ch"],
        encoder=EncoderConfig(
            width=width,
            depth=found["num_hidden_layers"],
            heads=found["num_attention_heads"],
            hidden=found["intermediate_size"],
            norm=found["norm_type"],
            norm_eps=float(found["layer_norm_eps"]),
            qkv_bias=found["qkv_bias"],
            qk_norm=found["qk_normalization"],
            layer_scale=float(found["initializer_factor"]),
            drop_path=float(found["drop_path_rate"]),
        ),
        width=width,
        global_blocks=found["global_blocks_depth"],
        global_heads=16,                          # fixed in the authors' code
        flow_blocks=found["num_decoder_layers"],
        steps=int(found["num_sampling_steps"]),
    )
