"""Maps the authors' released XY-Tokenizer weights onto ours and back."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit
from tokenizers_lab.nn.mel import WHISPER_FFT, WHISPER_HOP, WHISPER_RATE
from tokenizers_lab.nn.whisper import STRIDE

from .config import AdapterConfig, ModelConfig, QuantizerConfig, StackConfig, VocoderConfig, check_model, hop_of
from .model import XYTokenizer

RELEASE = "the official XY-Tokenizer checkpoint"      # in errors
OFFICIAL = {
    "hub_id": "fdugyt/XY_Tokenizer",
    "revision": "main",
    "files": ["xy_tokenizer.ckpt"],
    "licence": "Apache-2.0",      # by the README of the code, which has no licence file
    "source": "https://github.com/gyt1145028706/XY-Tokenizer",
}
# ours → official, applied in order to whole dotted keys; all others are alike
RENAMES = [
    (r"^quantizer\.codebooks\.", "quantizer.quantizers."),
    (r"^(quantizer\.quantizers\.\d+)\.embed$", r"\1.codebook"),
    (r"^(quantizer\.quantizers\.\d+)\.embed_sum$", r"\1.embed_avg"),
    (r"^(quantizer\.quantizers\.\d+)\.started$", r"\1.inited"),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"^vocoder\.", "vocos."),
    (r"^vocos\.backbone\.last_norm\.", "vocos.backbone.final_layer_norm."),
    (r"^vocos\.backbone\.blocks\.", "vocos.backbone.convnext."),
    (r"^(vocos\..*)\.depthwise\.", r"\1.dwconv."),
    (r"^(vocos\..*)\.expand\.", r"\1.pwconv1."),
    (r"^(vocos\..*)\.contract\.", r"\1.pwconv2."),
    (r"^(vocos\..*)\.scale$", r"\1.gamma"),
]
# names of the sibling checkpoints (MOSS-TTSD's, and those of a port to transformers) → official
ALIASES = [
    (r"^enhanced_vocos\.", "vocos."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
]
WINDOW, STARTED = "vocos.head.istft.window", ".inited"      # theirs only: ours follows from n_fft; a bool of theirs
# official options that ours follow from or that we do not have: the only value taken
FIXED: dict[str, dict[str, Any]] = {
    "feature_extractor_kwargs": {"sampling_rate": WHISPER_RATE, "hop_length": WHISPER_HOP, "n_fft": WHISPER_FFT,
                                 "padding_value": 0.0, "dither": 0.0, "do_normalize": False},
    "quantizer_kwargs": {"skip_rvq_ratio": 0.0},
    "vocos_kwargs": {"padding": "same"},
}
STACK = {"sampling_rate": WHISPER_RATE, "hop_length": WHISPER_HOP, "stride_size": STRIDE, "kernel_size": 3}
FIXED |= {f"{name}_kwargs": STACK for name in ("semantic_encoder", "acoustic_encoder", "acoustic_decoder")}
QUANTIZER = {      # official option: ours
    "num_quantizers": "codebooks", "codebook_size": "codebook_size", "rvq_dim": "width", "commitment": "commitment",
    "quantizer_dropout": "dropout", "decay": "decay", "epsilon": "epsilon", "threshold_ema_dead": "dead_threshold",
    "kmeans_iters": "kmeans_iterations",
}
VOCODER = {"dim": "width", "intermediate_dim": "hidden", "num_layers": "layers", "n_fft": "n_fft"}


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]      # for XYTokenizer(model)
    heads: dict[str, Tensor]          # none: what only training needs was not released


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our tokenizer from an official state dict, or from a checkpoint that has it as `generator`.

    config: the authors' `generator_params`, for sizes other than the release's, or the config that has them; nothing is guessed
    from shapes. Raises CheckpointError on a key that is missing, left over or of another shape, ConfigError on an option that
    we do not have.
    """
    state = official_state(checkpoint)
    model = official_config(config)
    with torch.device("meta"):
        empty = XYTokenizer(model)
    names = {key: official_name(key) for key in empty.state_dict()}
    shapes = {names[key]: value.shape for key, value in empty.state_dict().items()}
    check_fit(shapes | {WINDOW: empty.vocoder.head.istft.window.shape}, state, RELEASE)
    window = state[WINDOW]
    if not window.is_meta and not torch.allclose(window.float().cpu(), torch.hann_window(len(window), device="cpu"), atol=1e-5):
        raise CheckpointError(f"{RELEASE} has another window than Hann's: {WINDOW}")
    found = {key: state[name].float() if name.endswith(STARTED) else state[name] for key, name in names.items()}
    return Converted(model, found, {})


def to_official(tokenizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from ours: the inverse of `from_official`."""
    made = {official_name(key): value for key, value in tokenizer.items()}
    made = {key: value.bool() if key.endswith(STARTED) else value for key, value in made.items()}
    head = tokenizer["vocoder.head.out.bias"]
    return made | {WINDOW: torch.hann_window(head.shape[0] - 2, device=head.device)}


def official_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint, under the official names. Raises CheckpointError if there is none."""
    nested = checkpoint.get("generator")
    state = nested if isinstance(nested, Mapping) else checkpoint
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("this is no XY-Tokenizer checkpoint: it has no 'generator', and is no state dict")
    return {rename(key, ALIASES): value for key, value in state.items()}


def official_name(key: str) -> str:
    """The official key of one of ours."""
    return rename(key, RENAMES)


def rename(key: str, rules: list[tuple[str, str]]) -> str:
    """The key after all rules."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def official_config(config: Mapping[str, Any] | None) -> ModelConfig:
    """Our model config of the authors' `generator_params`; none: of the release.

    Raises ConfigError on an option of theirs that is missing, that we do not have, or whose sizes do not fit together.
    """
    if config is None:
        return ModelConfig()
    options = config.get("generator_params", config)
    try:
        model = model_of(options)
        check_sizes(options, model)
    except KeyError as error:
        raise ConfigError(f"the authors' config has no '{error.args[0]}'") from error
    check_model(model)
    return model


def model_of(options: Mapping[str, Any]) -> ModelConfig:
    """Our model config of the authors' options. Raises KeyError on one that is missing."""
    pool = int(options["downsample_kwargs"]["avg_pooler"])
    seconds = float(options["feature_extractor_kwargs"].get("chunk_length", 30))
    tokens = round(seconds * WHISPER_RATE) // (WHISPER_HOP * STRIDE)
    book, vocos = options["quantizer_kwargs"], options["vocos_kwargs"]
    quantizer = QuantizerConfig(**{ours: book[theirs] for theirs, ours in QUANTIZER.items() if theirs in book})
    quantizer.out = None if book["output_dim"] == book["input_dim"] else int(book["output_dim"])
    voice = VocoderConfig(**{ours: int(vocos[theirs]) for theirs, ours in VOCODER.items()})
    voice.n_fft = None if voice.n_fft == 4 * vocos["hop_size"] else voice.n_fft
    post = adapter_of(options["post_rvq_adapter_kwargs"], tokens // pool)
    post.out = None      # it follows from the decoder
    semantic, decoder = options["semantic_encoder_kwargs"], options["acoustic_decoder_kwargs"]
    return ModelConfig(
        sample_rate=int(options.get("sample_rate", options.get("input_sample_rate", WHISPER_RATE))),
        bands=int(semantic["num_mel_bins"]), window_seconds=seconds, overlap_seconds=seconds / 3,
        semantic=StackConfig(**stack_of(semantic, "encoder", tokens)),
        semantic_adapter=adapter_of(options["semantic_encoder_adapter_kwargs"], tokens),
        acoustic=StackConfig(**stack_of(options["acoustic_encoder_kwargs"], "encoder", tokens)),
        pre_adapter=adapter_of(options["pre_rvq_adapter_kwargs"], tokens), pool=pool,
        quantizer=quantizer, post_adapter=post,
        decoder=StackConfig(**stack_of(decoder, "decoder", tokens)), decoder_bands=int(decoder["num_mel_bins"]),
        vocoder=voice, output_rate=int(vocos["hop_size"]) * WHISPER_RATE // WHISPER_HOP)


def stack_of(options: Mapping[str, Any], kind: str, needed: int) -> dict[str, Any]:
    """Arguments of StackConfig; kind: what their names begin with; needed: positions of a window."""
    positions = options.get("max_source_positions")
    if positions is None:
        positions = int(options["max_audio_seconds"] * WHISPER_RATE) // WHISPER_HOP // STRIDE
    return {
        "width": int(options["d_model"]), "layers": int(options[f"{kind}_layers"]),
        "heads": int(options[f"{kind}_attention_heads"]), "hidden": int(options[f"{kind}_ffn_dim"]),
        "activation": str(options.get("activation_function", "gelu")),
        "positions": None if positions == needed else int(positions),
    }


def adapter_of(options: Mapping[str, Any], needed: int) -> AdapterConfig:
    """An adapter's config; needed: positions of a window."""
    out = int(options["output_dim"])
    return AdapterConfig(**stack_of(options, "encoder", needed), out=None if out == options["d_model"] else out)


def check_sizes(options: Mapping[str, Any], model: ModelConfig) -> None:
    """Raise ConfigError if the authors' options have a value that we do not have, or parts that do not fit together."""
    width = model.pre_adapter.out or model.pre_adapter.width
    joined = (model.semantic_adapter.out or model.semantic_adapter.width) + model.acoustic.width
    wanted: dict[str, dict[str, Any]] = {
        "semantic_encoder_adapter_kwargs": {"input_dim": model.semantic.width},
        "acoustic_encoder_kwargs": {"num_mel_bins": model.bands},
        "feature_extractor_kwargs": {"feature_size": model.bands},
        "pre_rvq_adapter_kwargs": {"input_dim": joined},
        "downsample_kwargs": {"d_model": width},
        "quantizer_kwargs": {"input_dim": model.pool * width, "codebook_dim": model.quantizer.width},
        "post_rvq_adapter_kwargs": {"input_dim": model.quantizer.out or model.pool * width, "output_dim": model.code_channels},
        "upsample_kwargs": {"d_model": model.decoder.width, "stride": model.pool},
        "vocos_kwargs": {"input_channels": model.decoder_bands},
    }
    for part in wanted | FIXED:
        for name, value in (wanted.get(part, {}) | FIXED.get(part, {})).items():
            if options[part].get(name, value) != value:
                raise ConfigError(f"{part}.{name} must be {value}, not {options[part][name]}")
    if options.get("downsample_rate", hop_of(model)) != hop_of(model):
        raise ConfigError(f"downsample_rate must be {hop_of(model)}, not {options['downsample_rate']}")
