"""Maps the released vocoder of TaDiCodec, and its discriminators, onto ours and back."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit
from tokenizers_lab.nn.vocos import Vocos

from .vocoder_config import VocoderObjectiveConfig

RELEASE = "TaDiCodec's vocoder"                             # in errors
JUDGES = "the checkpoint of the vocoder's discriminators"
WINDOW = "head.istft.window"                                # theirs only: ours follows from n_fft
# official option of `vocos`: argument of Vocos
SIZES = {"input_channels": "bands", "dim": "width", "intermediate_dim": "hidden", "num_layers": "layers", "n_fft": "n_fft",
         "hop_size": "hop"}
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"^backbone\.last_norm\.", "backbone.final_layer_norm."),
    (r"^backbone\.blocks\.", "backbone.convnext."),
    (r"\.depthwise\.", ".dwconv."),
    (r"\.expand\.", ".pwconv1."),
    (r"\.contract\.", ".pwconv2."),
    (r"\.scale$", ".gamma"),
]
WEIGHT_NORM = [(r"\bparametrizations\.weight\.original0$", "weight_g"), (r"\bparametrizations\.weight\.original1$", "weight_v")]
PERIOD = [(r"^period\.", "period_gan."), (r"\.convs\.(\d+)\.", r".convs.\1.0."), (r"\.conv_post\.", ".output_conv.")]
SPECTRAL = [
    (r"^spectral\.discriminators\.(\d+)\.", r"spec_gan.model.disc_\1.model."),
    (r"\.convs\.(\d+)\.", r".layer_\1.0."),
]


# --- vocoder ----------------------------------------------------------------------------------------------------------------

def vocoder_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Arguments of `Vocos` from the authors' `vocos` options. Raises ConfigError on what is missing or not supported."""
    missing = sorted(SIZES.keys() - config.keys())
    if missing:
        raise ConfigError(f"the authors' config of the vocoder has no '{missing[0]}'")
    if config.get("padding", "same") != "same":
        raise ConfigError(f"the vocoder's padding must be 'same', not '{config['padding']}'")
    return {ours: int(config[theirs]) for theirs, ours in SIZES.items()}


def vocoder_name(key: str) -> str:
    """The official key of one of `Vocos`."""
    return rename(key, RENAMES)


def vocoder_from_official(state: Mapping[str, Tensor], vocoder: nn.Module) -> dict[str, Tensor]:
    """State for our `vocoder` (a Vocos; its sizes must be right already) from the official state dict.

    Raises CheckpointError on a key that is missing, left over or of another shape, and on a window that is not Hann's.
    """
    assert isinstance(vocoder, Vocos)
    ours, window = vocoder.state_dict(), vocoder.head.istft.window
    names = {k: vocoder_name(k) for k in ours}
    check_fit({names[k]: v.shape for k, v in ours.items()} | {WINDOW: window.shape}, state, RELEASE)
    found = state[WINDOW]
    if not found.is_meta and not torch.allclose(found.float().cpu(), torch.hann_window(len(found), device="cpu"), atol=1e-5):
        raise CheckpointError(f"{RELEASE} has another window than Hann's: {WINDOW}")
    return {k: state[name] for k, name in names.items()}


def vocoder_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict of our Vocos' one: the inverse of `vocoder_from_official`."""
    window = torch.hann_window(state["head.out.bias"].shape[0] - 2)
    return {vocoder_name(k): v for k, v in state.items()} | {WINDOW: window}


# --- discriminators ---------------------------------------------------------------------------------------------------------

def vocoder_objective(config: Mapping[str, Any]) -> VocoderObjectiveConfig:
    """Our options of the authors' `period_gan` and `spec_gan`. Raises ConfigError on what is missing or not supported.

    Their `down_scales` is not read, as in their class: it has always three strided layers behind the first.
    """
    try:
        period, spectral = config["period_gan"], config["spec_gan"]
        transform = spectral["stft_params"]
        fixed = {"in_channels": 1, "out_channels": 1, "use_weight_norm": True, "use_complex": False}
        for name, value in fixed.items():
            if spectral.get(name, value) != value:
                raise ConfigError(f"spec_gan.{name} must be {value}, not {spectral[name]}")
        if transform.get("window", "hann_window") != "hann_window":
            raise ConfigError(f"spec_gan.stft_params.window must be hann_window, not {transform['window']}")
        return VocoderObjectiveConfig(
            enabled=True,
            period_channels=growing(period["channels"], period["channel_increasing_factor"], period["max_downsample_channels"]),
            spectral_ffts=list(transform["fft_sizes"]), spectral_hops=list(transform["hop_sizes"]),
            spectral_windows=list(transform["win_lengths"]), spectral_kernels=list(spectral["kernel_sizes"]),
            spectral_channels=growing(spectral["channels"], 2, spectral["max_downsample_channels"]),
        )
    except KeyError as error:
        raise ConfigError(f"the authors' config of the discriminators has no '{error.args[0]}'") from error


def growing(first: int, factor: int, most: int) -> list[int]:
    """Channels of the five layers: each has `factor` times those of the one before, at most `most`; the first has `first`."""
    channels = [int(first)]
    while len(channels) < 5:
        channels.append(min(channels[-1] * factor, most))
    return channels


def discriminator_names(module: nn.Module) -> dict[str, str]:
    """Our key: the official one, for `VocoderLosses.discriminators`."""
    names = {}
    for key in module.state_dict():
        spectral = key.startswith("spectral.")
        names[key] = rename(key, WEIGHT_NORM + (SPECTRAL if spectral else PERIOD))
        if spectral and ".conv_post." in key:
            last = len(module.get_submodule(key.split(".conv_post.")[0] + ".convs"))      # type: ignore[arg-type]
            names[key] = names[key].replace(".conv_post.", f".layer_{last}.")
    return names


def discriminators_from_official(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """State for our discriminators `module` from `period_gan.…` and `spec_gan.…`. Raises CheckpointError if it does not fit."""
    ours, names = module.state_dict(), discriminator_names(module)
    check_fit({names[k]: v.shape for k, v in ours.items()}, state, JUDGES)
    return {k: state[name] for k, name in names.items()}


def rename(key: str, rules: list[tuple[str, str]]) -> str:
    """The key after all rules."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
