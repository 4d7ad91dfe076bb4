"""Maps the authors' released LM-SPT weights onto ours and back. Sizes come from the shapes, the rest from their config."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit

from .config import AuxiliaryConfig, ModelConfig
from .model import LMSPT

RELEASE = "the official LM-SPT checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "kakaocorp/lmspt",
    "revision": "main",
    "files": ["lmspt_12d5hz_16384_4096.safetensors"],
    "licence": "Apache-2.0",                           # by the repository of the code, github.com/kakao/lmspt
    "source": "https://huggingface.co/kakaocorp/lmspt",
}
OURS_ONLY = ("quantizer.usage_updates",)               # the authors count the updates of a process only
LEAVES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
QUANTIZER = [                                          # ours → official
    (r"^quantizer\.semantic\.levels\b", "quantizer.rvq_first.quantizers"),
    (r"^quantizer\.semantic\.", "quantizer.rvq_first."),
    (r"^quantizer\.acoustic\.levels\b", "quantizer.rvq_rest.quantizers"),
    (r"^quantizer\.(semantic|acoustic)_usage$", r"quantizer.\1_vocab_usage"),
]


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for LMSPT(model)
    heads: dict[str, Tensor]                    # none: LM-SPT trains nothing beside the tokenizer and the discriminators


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our tokenizer from the authors' state dict.

    config: the authors' constructor arguments, flat or under `constructor_args`, with those of the auxiliary decoder under
    `aux_decoder`. They tell what no shape does (dilations, sample rates, FSQ levels, whether the semantic part is subtracted
    and the encoder shared); without them these are the release's. Raises CheckpointError on a key that is missing, left over
    or of another shape, ConfigError where config and shapes disagree.
    """
    if not checkpoint or not all(isinstance(v, Tensor) for v in checkpoint.values()):
        raise CheckpointError("this is no LM-SPT checkpoint: the authors' file is a bare state dict")
    model = infer_model(checkpoint, *arguments_of(config))
    with torch.device("meta"):
        ours = LMSPT(model).state_dict()
    names = {key: official_names(key, model) for key in ours if key not in OURS_ONLY}
    check_fit({name: ours[key].shape for key, found in names.items() for name in found}, checkpoint, RELEASE)
    for found in names.values():
        if len(found) == 2 and not torch.equal(checkpoint[found[0]], checkpoint[found[1]]):
            raise CheckpointError(f"the encoder is said to be shared, but {found[0]} and {found[1]} differ")
    tokenizer = {key: checkpoint[found[0]] for key, found in names.items()}
    return Converted(model, tokenizer | {key: torch.zeros((), dtype=torch.int64) for key in OURS_ONLY}, {})


def to_official(tokenizer: Mapping[str, Tensor], model: ModelConfig | None = None) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`. model: none means the release's."""
    model = model or ModelConfig()
    return {name: v for key, v in tokenizer.items() if key not in OURS_ONLY for name in official_names(key, model)}


def official_names(key: str, model: ModelConfig) -> list[str]:
    """The official key of one of ours; a shared encoder has two."""
    path, leaf = split_leaf(key)
    if path.split(".")[0] == "quantizer":
        name = f"{path}.{LEAVES.get(leaf, leaf)}"
        for pattern, replacement in QUANTIZER:
            name = re.sub(pattern, replacement, name)
        return [name]
    part, *numbers = path.split(".")
    first = "model" if part.endswith("decoder") else "block"
    name = f"{part}.{first}." + ".block.".join(numbers)
    if leaf != "alpha" and (model.auxiliary.causal if part == "aux_decoder" else model.causal):
        name += ".conv"
    names = [f"{name}.{LEAVES.get(leaf, leaf)}"]
    if model.shared_encoder and part == "semantic_encoder":
        names.append(names[0].replace("semantic", "acoustic", 1))
    return names


def split_leaf(key: str) -> tuple[str, str]:
    """(module, parameter) of one of our keys; a weight-normed one is named by its two parts."""
    for leaf in LEAVES:
        if key.endswith(f".{leaf}"):
            return key.removesuffix(f".{leaf}"), leaf
    module, _, leaf = key.rpartition(".")
    return module, leaf


def discriminator_name(key: str, periods: int, rates: int) -> str:
    """The authors' key of one of our `DacDiscriminator`'s: they number all members through."""
    path, leaf = split_leaf(key)
    group, *rest = path.removeprefix("mpd.discriminators").removeprefix("mrd.discriminators").removeprefix("msd").split(".")[1:]
    number = int(group) + {"mpd": 0, "msd": periods, "mrd": periods + rates}[key[:3]]
    name = ".".join(["discriminators", str(number), *rest])
    return f"{name}{'' if rest[-1] == 'conv_post' else '.0'}.{LEAVES.get(leaf, leaf)}"


def discriminator_from_official(
    state: Mapping[str, Tensor], ours: Mapping[str, Tensor], periods: int, rates: int
) -> dict[str, Tensor]:
    """The authors' discriminator for a `DacDiscriminator` whose tensors are `ours`. Raises CheckpointError."""
    names = {key: discriminator_name(key, periods, rates) for key in ours}
    check_fit({name: ours[key].shape for key, name in names.items()}, state, RELEASE)
    return {key: state[name] for key, name in names.items()}


def arguments_of(config: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(constructor arguments, those of the auxiliary decoder) of the authors' config; both empty where there is none."""
    config = config or {}
    arguments = config.get("constructor_args", config)
    return arguments, config.get("aux_decoder") or arguments.get("aux_decoder") or {}


def infer_model(state: Mapping[str, Tensor], told: Mapping[str, Any], told_aux: Mapping[str, Any]) -> ModelConfig:
    """Our model config from the official shapes and arguments. Raises CheckpointError if the telling keys are missing."""
    try:
        causal, aux_causal = (f"{part}.model.0.conv.bias" in state for part in ("decoder", "aux_decoder"))
        bias = ("block.0.conv" if causal else "block.0") + ".bias"
        semantic, acoustic = (state[f"{part}_encoder.{bias}"].shape[0] for part in ("semantic", "acoustic"))
        fsq = "quantizer.rvq_first.in_proj.bias" in state
        first = "quantizer.rvq_first" + ("" if fsq else ".quantizers.0")
        acoustic_size, acoustic_dim = state["quantizer.rvq_rest.quantizers.0.codebook.weight"].shape
        own = ModelConfig()
        levels = list(told.get("semantic_quantizer_kwargs", {}).get("levels", []))
        if fsq and not levels:
            raise ConfigError("these weights have an FSQ semantic part: give the authors' config with semantic_quantizer_kwargs")
        model = ModelConfig(
            sample_rate=told.get("sample_rate", own.sample_rate),
            output_sample_rate=told.get("output_sample_rate") or 0,
            strides=strides_of(state, "semantic_encoder.block", causal),
            decoder_strides=strides_of(state, "decoder.model", causal),
            semantic_width=semantic, acoustic_width=acoustic,
            decoder_width=state[f"decoder.model.0{'.conv' * causal}.bias"].shape[0],
            latent=state[f"{first}.out_proj.bias"].shape[0],
            dilations=list(told.get("dilation", own.dilations)),
            kernel=state[f"semantic_encoder.block.1.block.0.block.1{'.conv' * causal}.weight_v"].shape[2],
            causal=causal,
            shared_encoder=told.get("use_shared_encoder", False),
            codebooks=1 + state["quantizer.acoustic_vocab_usage"].shape[0],
            semantic_size=own.semantic_size if fsq else state[f"{first}.codebook.weight"].shape[0],
            semantic_dim=state[f"{first}.in_proj.bias"].shape[0],
            acoustic_size=acoustic_size, acoustic_dim=acoustic_dim,
            fsq_levels=levels if fsq else [],
            subtract=told.get("semantic_subtraction", True),
            auxiliary=AuxiliaryConfig(
                width=state[f"aux_decoder.model.0{'.conv' * aux_causal}.bias"].shape[0],
                strides=strides_of(state, "aux_decoder.model", aux_causal),
                sample_rate=told_aux.get("sample_rate", own.auxiliary.sample_rate),
                dilations=list(told_aux.get("dilation", own.auxiliary.dilations)),
                kernel=state[f"aux_decoder.model.1.block.2.block.1{'.conv' * aux_causal}.weight_v"].shape[2],
                causal=aux_causal,
            ),
        )
    except KeyError as error:
        raise CheckpointError(f"the official LM-SPT checkpoint misses {error.args[0]}") from error
    check_told(model, told, told_aux)
    return model


def strides_of(state: Mapping[str, Tensor], prefix: str, causal: bool) -> list[int]:
    """The strides of an encoder or decoder: half the kernels of its (transposed) convolutions, each behind a block's Snake."""
    snakes = [re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.block\.(\d+)\.alpha", key) for key in state]
    places = sorted((int(found[1]), int(found[2]) + 1) for found in snakes if found)
    return [state[f"{prefix}.{i}.block.{j}{'.conv' * causal}.weight_v"].shape[2] // 2 for i, j in places]


def check_told(model: ModelConfig, told: Mapping[str, Any], told_aux: Mapping[str, Any]) -> None:
    """Raise ConfigError where the authors' arguments contradict the shapes."""
    width = told.get("encoder_dim")
    seen: list[tuple[str, Any, Any]] = [
        ("encoder_rates", told.get("encoder_rates"), model.strides),
        ("decoder_rates", told.get("decoder_rates"), model.decoder_strides),
        ("semantic_encoder_dim", told.get("semantic_encoder_dim", width), model.semantic_width),
        ("acoustic_encoder_dim", told.get("acoustic_encoder_dim", width), model.acoustic_width),
        ("decoder_dim", told.get("decoder_dim"), model.decoder_width),
        ("latent_dim", told.get("latent_dim"), model.latent),
        ("n_codebooks", told.get("n_codebooks"), model.codebooks),
        ("residual_kernel_size", told.get("residual_kernel_size"), model.kernel),
        ("is_causal", told.get("is_causal"), model.causal),
        ("semantic_codebook_size", None if model.fsq_levels else told.get("semantic_codebook_size"), model.semantic_size),
        ("acoustic_codebook_size", told.get("acoustic_codebook_size"), model.acoustic_size),
        ("aux_decoder.rates", told_aux.get("rates"), model.auxiliary.strides),
        ("aux_decoder.channels", told_aux.get("channels"), model.auxiliary.width),
        ("aux_decoder.is_causal", told_aux.get("is_causal"), model.auxiliary.causal),
    ]
    for name, said, found in seen:
        if said is not None and not same(said, found):
            raise ConfigError(f"the config says {name} {said}, but the weights have {found}")


def same(a: Any, b: Any) -> bool:
    """Whether two options are equal, lists and tuples alike."""
    return list(a) == list(b) if isinstance(a, Sequence) and isinstance(b, Sequence) else bool(a == b)
