"""Maps REG's released weights (and REPA's, which have no class token) onto ours and back. Kinds come from the keys, sizes from
the shapes, depth and heads from the authors' table or config: a file that lacks its last blocks is refused."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.eval.generation.objective import projector
from tokenizers_lab.eval.generation.official import OURS_ONLY, official_state
from tokenizers_lab.network import check_fit

from .config import SIZES, ModelConfig, Size
from .model import SiT

RELEASE = "the official REG checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "Martinser/REG",
    "revision": "main",
    "files": ["last.pt"],                          # the name in the authors' code; 800 epochs on SD-VAE's latents
    "licence": "MIT (of the code)",
    "source": "https://huggingface.co/Martinser/REG",
}
SD_VAE_CHANNELS, SD_VAE_SCALE = 4, 0.18215         # latents of the releases are SD-VAE's, times this; mean 0
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"^projector\.", "projectors.0."),
    (r"^embed\.", "x_embedder.proj."),
    (r"^time_embed\.", "t_embedder."),
    (r"^label_embed\.", "y_embedder.embedding_table."),
    (r"^positions$", "pos_embed"),
    (r"^(blocks\.\d+)\.modulation\.", r"\1.adaLN_modulation.1."),
    (r"^(blocks\.\d+\.attn)\.out\.", r"\1.proj."),
    (r"^final\.modulation\.", "final_layer.adaLN_modulation.1."),
    (r"^final\.linear\.", "final_layer.linear."),
    (r"^class_out\.", "final_layer.linear_cls."),
    (r"^class_embed\.", "cls_projectors2."),
    (r"^class_norm\.", "wg_norm."),
]


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]      # for SiT(model)
    heads: dict[str, Tensor]          # for SiTObjective.heads: projector.…; empty if not released


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our network and projector from an official checkpoint (its moving average), or from the state dict inside it.

    config: the authors' constructor arguments (`depth`, `num_heads`), needed only where a width is not in their table of sizes.
    Raises CheckpointError on a key that is missing, left over or of another shape, and on several projectors.
    """
    state = official_state(checkpoint, "REG")
    model, width_out = infer_model(state, config or {}), infer_projector(state)
    with torch.device("meta"):
        network = SiT(model)
        heads = {} if width_out is None else projector(model.width, width_out[0], width_out[1]).state_dict(prefix="projector.")
    ours = {**network.state_dict(), **heads}
    by_official = {official_name(k): k for k in ours if k not in OURS_ONLY}
    check_fit({official: ours[k].shape for official, k in by_official.items()}, state, RELEASE)
    found = {k: state[official] for official, k in by_official.items()}
    std = 1 / SD_VAE_SCALE if model.channels == SD_VAE_CHANNELS else 1.0
    shape = (model.channels, 1, 1)
    statistics = {"latent_mean": torch.zeros(shape), "latent_std": torch.full(shape, std)}
    return Converted(
        model, {k: v for k, v in found.items() if k not in heads} | statistics, {k: v for k, v in found.items() if k in heads}
    )


def to_official(tokenizer: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`. Latent statistics are dropped."""
    return {official_name(k): v for k, v in {**tokenizer, **(heads or {})}.items() if k not in OURS_ONLY}


def official_name(key: str) -> str:
    """The official key of one of ours (of the network, or of the heads)."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def infer_model(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelConfig:
    """Our model config from the official shapes. Raises CheckpointError if the telling keys are missing."""
    try:
        width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
        class_token = state["cls_projectors2.weight"].shape[1] if "cls_projectors2.weight" in state else None
        tokens = state["pos_embed"].shape[1] - (class_token is not None)
        size = official_size(width, config)
        return ModelConfig(
            channels=channels, grid=math.isqrt(tokens) * patch, classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
            patch=patch, width=width, depth=size.depth, heads=size.heads,
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
            qk_norm="blocks.0.attn.q_norm.weight" in state, class_token=class_token,
        )
    except KeyError as error:
        raise CheckpointError(f"{RELEASE} misses {error.args[0]}") from error


def infer_projector(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(hidden, output) channels of the projector; none: there is none. Raises CheckpointError if it lacks a layer."""
    if not any(k.startswith("projectors.") for k in state):
        return None
    try:
        return state["projectors.0.0.weight"].shape[0], state["projectors.0.4.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"{RELEASE} misses {error.args[0]}") from error


def official_size(width: int, config: Mapping[str, Any]) -> Size:
    """Depth and heads of a width: those that the arguments name, or the authors' size of that width."""
    named = next((size for size in SIZES.values() if size.width == width), None)
    depth, heads = config.get("depth", named and named.depth), config.get("num_heads", named and named.heads)
    if depth is None or heads is None:
        raise ConfigError(f"this SiT is {width} wide, no size in the authors' table: give their config with depth and num_heads")
    return Size(width, int(depth), int(heads))
