"""Maps the authors' released LightningDiT weights onto ours and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError
from tokenizers_lab.eval.generation import official
from tokenizers_lab.eval.generation.config import SamplingConfig
from tokenizers_lab.network import check_fit
from tokenizers_lab.nn.rope import integer_table

from .config import ModelConfig, check_model
from .model import LightningDiT

RELEASE = "the official LightningDiT checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "hustvl/lightningdit-xl-imagenet256-800ep",
    "revision": "main",
    # XL/1 on VA-VAE after 800 epochs. That of 64 epochs is the one file of hustvl/lightningdit-xl-imagenet256-64ep, for
    # `toklab convert`. Generators on VTP's latents were not released.
    "files": ["lightningdit-xl-imagenet256-800ep.pt"],
    "licence": "MIT",
    "source": "https://huggingface.co/hustvl/lightningdit-xl-imagenet256-800ep",
}
# width: depth and heads, which the weights alone need not show
SIZES = {768: (12, 12), 1024: (24, 16), 1152: (28, 16), 1536: (24, 24), 1792: (28, 28)}
TABLES = {"rope": "feat_rope"}


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for LightningDiT(model), latent statistics 0 and 1
    heads: dict[str, Tensor]                    # empty: training needs none


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our generator from an official checkpoint, or from the state dict inside it; the moving average where there is one.

    config: the authors' constructor arguments, needed where neither the weights nor the table of sizes say the heads.
    The latents' statistics are in a file of their own: set them by `set_latent_statistics`.
    Raises CheckpointError on a key that is missing, left over or of another shape, ConfigError on options that do not fit.
    """
    state = official.official_state(checkpoint, RELEASE)
    try:
        model = infer_model(state, official.official_arguments(config))
    except KeyError as error:
        raise CheckpointError(f"{RELEASE} misses {error.args[0]}") from error
    check_model(model, "the config of this LightningDiT")
    with torch.device("meta"):
        ours = LightningDiT(model).state_dict()
    if model.rope:
        side = model.grid // model.patch
        state = official.with_tables(state, {"rope": integer_table(model.width // model.heads, side, side)}, TABLES)
    check_fit({k: v.shape for k, v in to_official(ours).items()}, state, RELEASE)
    return Converted(model, official.to_ours(state, ours, TABLES), {})


def to_official(tokenizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`. Latent statistics are dropped."""
    return official.to_official(tokenizer, TABLES)


def infer_model(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> ModelConfig:
    """Our model config from shapes, the authors' arguments and their table of sizes. Raises KeyError with a missing key."""
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth, heads = SIZES.get(width, (official.count_blocks(state), None))
    block = official.block_options(state)
    rope = bool(arguments.get("use_rope", "feat_rope.freqs_cos" in state))
    outputs = state["final_layer.linear.weight"].shape[0]
    official.check_told(arguments, {
        "in_channels": channels, "hidden_size": width, "patch_size": patch, "use_qknorm": block["qk_norm"],
        "use_swiglu": block["swiglu"], "use_rmsnorm": block["norm"] == "rms_norm", "wo_shift": not block["shifts"],
        "learn_sigma": outputs == 2 * patch**2 * channels,
    }, RELEASE)
    classes, unconditional = official.class_count(state["y_embedder.embedding_table.weight"].shape[0], arguments,
                                                  "class_dropout_prob")
    return ModelConfig(
        channels=channels,
        grid=official.square_side(state["pos_embed"].shape[1], RELEASE) * patch,
        classes=classes,
        sampling=SamplingConfig(steps=249, shift=1 / 0.3, guided_channels=3),      # the authors' 250 points and timestep_shift
        width=width,
        depth=int(arguments.get("depth", depth)),
        heads=official.head_count(state, width, 0, "feat_rope", arguments.get("num_heads"), heads, RELEASE),
        patch=patch,
        mlp_ratio=official.mlp_ratio([(block["hidden"], width)], block["swiglu"], arguments.get("mlp_ratio")),
        norm=block["norm"],
        qk_norm=block["qk_norm"],
        swiglu=block["swiglu"],
        rope=rope,
        shifts=block["shifts"],
        learn_sigma=outputs == 2 * patch**2 * channels,
        unconditional=unconditional,
    )
