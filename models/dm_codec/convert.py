"""Maps the authors' released DM-Codec weights onto ours and back. SpeechTokenizer's have the same keys and shapes."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit

from .config import ModelConfig
from .model import DMCodec

RELEASE = "the official DM-Codec checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "mubtasimahasan/DM-Codec",      # of the code, on GitHub
    "download": "links in the README of https://github.com/mubtasimahasan/DM-Codec",
    "revision": "25c742ad5f4ee2033031d68fe7dc6045b67d33e4",
    "files": ["DM-Codec_checkpoint_LM_SM.pt", "DM-Codec_checkpoint_LM.pt"],
    "licence": "Apache-2.0",
    "source": "https://github.com/mubtasimahasan/DM-Codec",
}
# official option: ours
OPTIONS = {
    "n_filters": "filters", "strides": "strides", "dimension": "width", "n_residual_layers": "residual_layers",
    "residual_kernel_size": "residual_kernel", "dilation_base": "dilation_base", "lstm_layers": "lstm_layers",
    "bidirectional": "bidirectional", "codebook_size": "codebook_size", "n_q": "codebooks", "sample_rate": "sample_rate",
}
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"\bconv\.(?=parametrizations|bias$)", "conv.conv."),
    (r"\bconvtr\.(?=parametrizations|bias$)", "convtr.convtr."),
    (r"\bparametrizations\.weight\.original0$", "weight_g"),
    (r"\bparametrizations\.weight\.original1$", "weight_v"),
    (r"^quantizer\.codebooks\.(\d+)\.started$", r"quantizer.vq.layers.\1._codebook.inited"),
    (r"^quantizer\.codebooks\.(\d+)\.embed_sum$", r"quantizer.vq.layers.\1._codebook.embed_avg"),
    (r"^quantizer\.codebooks\.(\d+)\.", r"quantizer.vq.layers.\1._codebook."),
]
# the same for discriminators; their names there are mpd, msd and mstftd
DISCRIMINATORS = {"mpd": "mpd", "msd": "msd", "msstft": "mstftd"}
DISCRIMINATOR_RENAMES = [
    (r"\bparametrizations\.weight\.original0$", "weight_g"),
    (r"\bparametrizations\.weight\.original1$", "weight_v"),
    (r"\bparametrizations\.weight\.original$", "weight_orig"),
    (r"\bparametrizations\.weight\.0\.([uv])$", r"weight_\1"),
]
STFT_RENAMES = [(r"\b(convs\.\d+|conv_post)\.", r"\1.conv."), (r"\bwindow$", "spec_transform.window")]


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for DMCodec(model)
    heads: dict[str, Tensor]                    # for DMCodecObjective.heads: transform.…, to the teachers' width
    skipped: list[str]                          # parts of a training checkpoint that are not the codec's weights
    teacher_width: int                          # channels of the teachers' features


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our tokenizer and head from an official state dict, or from the trainer's checkpoint around it.

    config: the authors' config dict, for sizes other than the release's; nothing is guessed from shapes, so that a file that
    lacks a layer is refused. Raises CheckpointError on a key that is missing, left over or of another shape.
    """
    state, skipped = official_state(checkpoint)
    model, teacher_width = official_config(config)
    ours = our_tensors(model, teacher_width)
    names = {k: official_name(k) for k in ours}
    check_fit({names[k]: v.shape for k, v in ours.items()}, state, RELEASE)
    found = {k: state[official] for k, official in names.items()}
    return Converted(
        model, {k: v for k, v in found.items() if not k.startswith("transform.")},
        {k: v for k, v in found.items() if k.startswith("transform.")}, skipped, teacher_width,
    )


def to_official(tokenizer: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`."""
    return {official_name(k): v for k, v in {**tokenizer, **(heads or {})}.items()}


def official_state(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a checkpoint, and what else it holds: released files are bare, the trainer's have it as `generator`."""
    nested = isinstance(checkpoint.get("generator"), Mapping)
    state = checkpoint["generator"] if nested else checkpoint
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError("this is no DM-Codec checkpoint: it has no 'generator', and is no state dict")
    return dict(state), [k for k in checkpoint if k != "generator"] if nested else []


def official_config(config: Mapping[str, Any] | None) -> tuple[ModelConfig, int]:
    """(our model config, width of the teachers' features) of the authors' config dict; none: of the release.

    Raises ConfigError on an option of theirs that is missing or that we do not have.
    """
    if config is None:
        return ModelConfig(), 768
    options = config.get("model_and_trainer_config", config)
    try:
        values = {ours: options[theirs] for theirs, ours in OPTIONS.items() if theirs != "sample_rate" or theirs in options}
        activation, width = options["activation"], options["semantic_dimension"]
    except KeyError as error:
        raise ConfigError(f"the authors' config has no '{error.args[0]}'") from error
    if activation.lower() not in ("elu", "snake"):
        raise ConfigError(f"DM-Codec's activation '{activation}' is not supported: ELU and Snake are")
    values["strides"] = list(values["strides"])
    return ModelConfig(**values, activation=activation.lower()), int(width)


def official_name(key: str) -> str:
    """The official key of one of ours."""
    return rename(key, RENAMES)


def rename(key: str, rules: list[tuple[str, str]]) -> str:
    """The key after all rules."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def discriminator_name(key: str) -> str:
    """The official key of one of `DMCodecObjective.discriminators`."""
    family, _, rest = key.partition(".")
    rules = DISCRIMINATOR_RENAMES + (STFT_RENAMES if family == "msstft" else [])
    return f"{DISCRIMINATORS[family]}.{rename(rest, rules)}"


def discriminators_from_official(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of our discriminators `module` from the official one, `mpd.…`, `msd.…`, `mstftd.…`. Raises CheckpointError."""
    ours = module.state_dict()
    names = {k: discriminator_name(k) for k in ours}
    check_fit({names[k]: v.shape for k, v in ours.items()}, state, RELEASE)
    return {k: state[name] for k, name in names.items()}


def our_tensors(model: ModelConfig, teacher_width: int) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of these sizes has in our names, without memory (on the meta device)."""
    with torch.device("meta"):
        found = dict(DMCodec(model).state_dict())
        found |= {f"transform.{k}": v for k, v in build_transform(model.width, teacher_width).state_dict().items()}
    return found


def build_transform(width: int, teacher_width: int) -> nn.Module:
    """From a codebook's values to the teachers' features: linear, or nothing where the widths agree."""
    return nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width)
