"""What the authors' checkpoints of diffusion transformers have in common: wrappings, names, sizes that shapes show."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.nn.dit import mlp_hidden

WRAPPINGS = ("ema", "model_ema", "model")      # state dicts inside a checkpoint, the one to take first
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")      # of DistributedDataParallel and torch.compile
OURS_ONLY = ("latent_mean", "latent_std")      # statistics: the authors keep them in files of their own
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"^(x|s)_embed\.", r"\1_embedder.proj."),
    (r"^t_embed\.frequencies$", "t_embedder.W"),
    (r"^t_embed\.", "t_embedder."),
    (r"^y_embed\.", "y_embedder.embedding_table."),
    (r"^positions$", "pos_embed"),
    (r"^(blocks\.\d+\.attn)\.out\.", r"\1.proj."),
    (r"^(blocks\.\d+\.mlp)\.gate_up\.", r"\1.w12."),
    (r"^(blocks\.\d+\.mlp)\.down\.", r"\1.w3."),
    (r"^final\.norm\.", "final_layer.norm_final."),
    (r"^final\.", "final_layer."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
]


def official_state(checkpoint: Mapping[str, Any], release: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint: its moving average if it has one. Raises CheckpointError if there is none."""
    state = next((checkpoint[name] for name in WRAPPINGS if isinstance(checkpoint.get(name), Mapping)), checkpoint)
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"this is no checkpoint of {release}: it has none of {', '.join(WRAPPINGS)}, and is no state dict")
    return {PREFIXES.sub("", k): v for k, v in state.items()}


def official_arguments(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The authors' constructor arguments, given as they are or as `constructor_args`."""
    return {} if config is None else config.get("constructor_args", config)


def to_official(ours: Mapping[str, Tensor], tables: Mapping[str, str]) -> dict[str, Tensor]:
    """The official state dict from ours. tables: our rotary tables → the official prefix. Latent statistics are dropped."""
    state: dict[str, Tensor] = {}
    for key, value in ours.items():
        if key in tables:
            cos, sin = value.chunk(2, dim=-1)
            state |= {f"{tables[key]}.freqs_cos": cos.contiguous(), f"{tables[key]}.freqs_sin": sin.contiguous()}
        elif key not in OURS_ONLY:
            state[official_name(key)] = value
    return state


def to_ours(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], tables: Mapping[str, str]) -> dict[str, Tensor]:
    """Our state dict from an official one that fits: `ours` names the keys. Latent statistics are 0 and 1."""
    found: dict[str, Tensor] = {}
    for key, value in ours.items():
        if key in tables:
            found[key] = torch.cat([state[f"{tables[key]}.freqs_{part}"] for part in ("cos", "sin")], dim=-1)
        elif key in OURS_ONLY:
            found[key] = torch.full(tuple(value.shape), float(key == "latent_std"))
        else:
            found[key] = state[official_name(key)]
    return found


def official_name(key: str) -> str:
    """The official key of one of ours, rotary tables and statistics excepted."""
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """Blocks whose keys are there, up to the last."""
    return 1 + max((int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)


def head_count(
    state: Mapping[str, Tensor], width: int, block: int, table: str, told: int | None, known: int | None, what: str
) -> int:
    """Attention heads: as told, or as the rotary table or the norm of the queries shows, or of the authors' size of that width.

    Raises ConfigError if nothing says it.
    """
    if told is not None:
        return int(told)
    for key in (f"{table}.freqs_cos", f"blocks.{block}.attn.q_norm.weight"):
        if key in state:
            return max(1, width // state[key].shape[-1])
    if known is None:
        refuse_guess(f"{what} is {width} wide, no size in the authors' table, and nothing in it shows its heads", "num_heads")
    return int(known)


def refuse_guess(what: str, argument: str) -> NoReturn:
    """Raise ConfigError that asks for an argument which the weights do not show."""
    raise ConfigError(f"{what}: give the authors' constructor arguments, with {argument}")


def square_side(tokens: int, release: str) -> int:
    """Tokens a side. Raises CheckpointError if they are no square."""
    if math.isqrt(tokens) ** 2 != tokens:
        raise CheckpointError(f"{release} has {tokens} positions, which is no square grid")
    return math.isqrt(tokens)


def class_count(rows: int, arguments: Mapping[str, Any], drop: str) -> tuple[int, bool]:
    """Classes, and whether the label table has a row for none: one more, unless the probability of dropping labels (the
    argument `drop`) was 0."""
    unconditional = float(arguments.get(drop, 0.1)) > 0
    return rows - unconditional, unconditional


def mlp_ratio(sizes: Sequence[tuple[int, int]], swiglu: bool, told: float | None = None) -> float:
    """The ratio from which `mlp_hidden` gives every (hidden channels, width): as told, or 4, or the shortest number that does.

    Raises ConfigError if none does.
    """
    least = max((-(-3 * hidden // 2) if swiglu else hidden) / width for hidden, width in sizes)
    rounded = [math.ceil(least * 10**digits) / 10**digits for digits in range(8)]
    for ratio in [told or 4.0, *rounded]:
        if all(mlp_hidden(width, ratio, swiglu) == hidden for hidden, width in sizes):
            return float(ratio)
    raise ConfigError(f"no mlp_ratio gives the MLPs of these weights: hidden channels and widths {list(sizes)}")


def block_options(state: Mapping[str, Tensor], at: int = 0) -> dict[str, Any]:
    """What a block's keys and shapes tell: norm, qk_norm, swiglu, shifts, hidden. Raises KeyError with a key that is missing."""
    prefix = f"blocks.{at}."
    swiglu = f"{prefix}mlp.w12.weight" in state
    hidden = state[f"{prefix}mlp.w12.weight"].shape[0] // 2 if swiglu else state[f"{prefix}mlp.fc1.weight"].shape[0]
    rows, width = state[f"{prefix}adaLN_modulation.1.weight"].shape
    return {
        "norm": "rms_norm" if f"{prefix}norm1.weight" in state else "layer_norm",
        "qk_norm": f"{prefix}attn.q_norm.weight" in state, "swiglu": swiglu, "shifts": rows == 6 * width, "hidden": hidden,
    }


def check_told(arguments: Mapping[str, Any], seen: Mapping[str, Any], release: str) -> None:
    """Raise ConfigError if the authors' arguments say something else than the weights show. seen: argument → what they show."""
    for name, value in seen.items():
        if name in arguments and arguments[name] != value:
            raise ConfigError(f"{name} is {arguments[name]} in the config, but {value} by the weights of {release}")


def with_tables(state: Mapping[str, Tensor], computed: Mapping[str, Tensor], tables: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict with the rotary tables that it lacks: moving averages of parameters alone have none.

    computed: our tables by our names; tables: our names → the official prefix.
    """
    return to_official(computed, tables) | dict(state)
