"""Maps the authors' released DiT-DH weights, of RecTok and of RAE, onto ours and back. Both have the same keys."""

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
from .model import DiTDH

RELEASE = "the official DiT-DH checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "QingyuShi/RecTok",
    "revision": "main",
    # XL after 80 and 600 epochs; S after 30, for autoguidance. RAE's `stage2_model.pt` converts too (`toklab convert`).
    "files": ["ditdhxl_epoch_0079.pth", "ditdhxl_epoch_0599.pth", "ditdhs_epoch_0029.pth"],
    "licence": "Apache-2.0",                           # by the README of github.com/Shi-qingyu/RecTok
    "source": "https://huggingface.co/QingyuShi/RecTok",
}
# width of the encoder, and of the head: depth and heads, which the weights alone need not show
SIZES = {384: (12, 6), 768: (12, 12), 1024: (24, 16), 1152: (28, 16)}
HEADS = {2048: (2, 16)}
TABLES = {"encoder_rope": "enc_feat_rope", "head_rope": "dec_feat_rope"}
# the authors' names of one argument, RecTok's first
CHANNELS = ("token_channels", "in_channels")
DROP = ("label_dropout_prob", "class_dropout_prob")


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for DiTDH(model), latent statistics 0 and 1
    heads: dict[str, Tensor]                    # empty: training needs none


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our generator from an official checkpoint, or from the state dict inside it; the moving average where there is one.

    config: the authors' constructor arguments, needed where neither the weights nor the table of sizes say the heads. Weights are
    taken for RAE's, whose time is 1 at noise, if the checkpoint holds `ema` or the arguments have RAE's names (`in_channels`), or
    as `config["clock"]` says. Rotary tables that a moving average lacks are computed.
    Raises CheckpointError on a key that is missing, left over or of another shape, ConfigError on options that do not fit.
    """
    state, arguments = official.official_state(checkpoint, RELEASE), official.official_arguments(config)
    noise = "ema" in checkpoint or "in_channels" in arguments or "input_size" in arguments
    try:
        model = infer_model(state, arguments, (config or {}).get("clock", "noise" if noise else "data"))
    except KeyError as error:
        raise CheckpointError(f"{RELEASE} misses {error.args[0]}") from error
    check_model(model, "the config of this DiT-DH")
    with torch.device("meta"):
        ours = DiTDH(model).state_dict()
    widths = {"encoder_rope": model.width // model.heads, "head_rope": model.head_width // model.head_heads}
    computed = {name: integer_table(width, model.grid, model.grid) for name, width in widths.items()}
    state = official.with_tables(state, computed, TABLES)
    check_fit({k: v.shape for k, v in to_official(ours).items()}, state, RELEASE)
    return Converted(model, official.to_ours(state, ours, TABLES), {})


def to_official(tokenizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`. Latent statistics are dropped."""
    return official.to_official(tokenizer, TABLES)


def infer_model(state: Mapping[str, Tensor], arguments: Mapping[str, Any], clock: str) -> ModelConfig:
    """Our model config from shapes, the authors' arguments and their table of sizes. Raises KeyError with a missing key."""
    width, channels = state["s_embedder.proj.weight"].shape[:2]
    head_width = state["x_embedder.proj.weight"].shape[0]
    depth, head_depth = block_counts(state, arguments, width, head_width)
    told_heads = arguments.get("num_heads", (None, None))
    block, head = official.block_options(state), official.block_options(state, depth)
    drop = next((name for name in DROP if name in arguments), DROP[0])
    classes, unconditional = official.class_count(state["y_embedder.embedding_table.weight"].shape[0], arguments, drop)
    tokens = state["pos_embed"] if "pos_embed" in state else state["enc_feat_rope.freqs_cos"][None]
    official.check_told(arguments, {
        **dict.fromkeys(CHANNELS, channels), "hidden_size": [width, head_width], "use_qknorm": block["qk_norm"],
        "use_swiglu": block["swiglu"], "use_rmsnorm": block["norm"] == "rms_norm", "wo_shift": False, "use_rope": True,
        "use_pos_embed": "pos_embed" in state,
    }, RELEASE)
    sampling = SamplingConfig(steps=149, shift=0) if clock == "data" else SamplingConfig(steps=49, shift=0, stop=0.001)
    return ModelConfig(
        channels=channels,
        grid=official.square_side(tokens.shape[1], RELEASE),
        classes=classes,
        sampling=sampling,
        clock=clock,
        width=width,
        depth=depth,
        heads=official.head_count(state, width, 0, "enc_feat_rope", told_heads[0], SIZES.get(width, (0, None))[1], RELEASE),
        head_width=head_width,
        head_depth=head_depth,
        head_heads=official.head_count(
            state, head_width, depth, "dec_feat_rope", told_heads[1], HEADS.get(head_width, (0, None))[1], RELEASE),
        mlp_ratio=official.mlp_ratio(
            [(block["hidden"], width), (head["hidden"], head_width)], block["swiglu"], arguments.get("mlp_ratio")),
        norm=block["norm"],
        qk_norm=block["qk_norm"],
        swiglu=block["swiglu"],
        position_table="pos_embed" in state,
        unconditional=unconditional,
    )


def block_counts(state: Mapping[str, Tensor], arguments: Mapping[str, Any], width: int, head_width: int) -> tuple[int, int]:
    """Blocks of the encoder and of the head: as told, or of the authors' sizes, or as many as the keys show of each width.

    Raises ConfigError where both widths are one and nothing else says it.
    """
    if "depth" in arguments:
        return int(arguments["depth"][0]), int(arguments["depth"][1])
    if width in SIZES and head_width in HEADS:
        return SIZES[width][0], HEADS[head_width][0]
    count = official.count_blocks(state)
    if width == head_width:
        official.refuse_guess(f"{RELEASE} has {count} blocks of one width", "depth")
    narrow = sum(state[f"blocks.{i}.attn.proj.bias"].shape[0] == width for i in range(count))
    return narrow, count - narrow
