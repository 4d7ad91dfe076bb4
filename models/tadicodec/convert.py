"""Maps the authors' released TaDiCodec weights, codec and vocoder, onto ours and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, ConfigError
from tokenizers_lab.network import check_fit
from tokenizers_lab.nn.mel import MelConfig

from .config import ModelConfig, VocoderConfig
from .convert_vocoder import rename, vocoder_from_official, vocoder_sizes, vocoder_to_official
from .model import TaDiCodec

RELEASE = "the official TaDiCodec checkpoint"      # in errors
VOCODER = "vocoder."                               # what the vocoder's keys begin with where both are in one state dict
OFFICIAL = {
    "hub_id": "amphion/TaDiCodec",
    "revision": "main",
    "files": ["model.safetensors"],
    "beside": {VOCODER: "vocoder/model.safetensors"},      # the folder is the authors'; the name of its file is inferred
    "licence": "Apache-2.0",                               # by the README of the code, which has no licence file
    "source": "https://huggingface.co/amphion/TaDiCodec",
}
# official option: ours
SIZES = {
    "hidden_size": "width", "encoder_num_layers": "encoder_layers", "decoder_num_layers": "decoder_layers", "num_heads": "heads",
    "down_sample_factor": "downsample", "vq_emb_dim": "bits", "sigma": "sigma", "use_text_cond": "text_condition",
}
MEL = {"num_mels": "bands", "n_fft": "n_fft", "hop_size": "hop", "fmin": "low", "fmax": "high", "mel_mean": "mean",
       "mel_var": "variance"}
# official options that change the network and that we do not have: the only value taken
FIXED = {"vq_type": "bsq", "use_vq": True, "use_repa_loss": False}
# ours → official, applied in order to whole dotted keys
RENAMES = [
    (r"^text_embedding\.", "text_emb."),
    (r"^to_code\.", "vq_in_linear."),
    (r"^from_code\.", "vq_out_linear."),
    (r"\.inward\.", ".in_linear."),
    (r"^decoder\.out\.", "decoder.out_linear."),
    (r"\.time_mlp\.", ".diff_step_mlp."),
    (r"\.condition_mlp\.", ".cond_mlp."),
    (r"\.tower\.", "."),
    (r"\.attention\.(q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.attention\.out\.", ".self_attn.o_proj."),
    (r"\.mlp\.(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.to_scale\.", ".to_weight."),
]


class Converted(NamedTuple):
    """Official weights in our names."""

    model: ModelConfig
    tokenizer: dict[str, Tensor]                # for TaDiCodec(model)
    heads: dict[str, Tensor]                    # none: TaDiCodec trains nothing beside the tokenizer


def from_official(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Converted:
    """Our tokenizer from the authors' state dict of the codec, with the vocoder's under `vocoder.…` if it has one.

    config: the authors' config with `preprocess`, `tadicodec` and, for a vocoder, `vocos`; none: the release's. Without a
    vocoder, decoding is by Griffin and Lim's method. Raises CheckpointError on a key that is missing, left over or of another
    shape, ConfigError on an option that we do not have.
    """
    if not checkpoint or not all(isinstance(v, Tensor) for v in checkpoint.values()):
        raise CheckpointError("this is no TaDiCodec checkpoint: the authors' file is a bare state dict")
    voice = {k.removeprefix(VOCODER): v for k, v in checkpoint.items() if k.startswith(VOCODER)}
    codec = {k: v for k, v in checkpoint.items() if not k.startswith(VOCODER)}
    model = official_config(config, with_vocoder=bool(voice))
    with torch.device("meta"):
        empty = TaDiCodec(model)
    ours = {k: v for k, v in empty.state_dict().items() if not k.startswith(VOCODER)}
    names, constants = {k: official_name(k) for k in ours}, code_constants(model.bits)
    check_fit({names[k]: v.shape for k, v in ours.items()} | {k: v.shape for k, v in constants.items()}, codec, RELEASE)
    for key, value in constants.items():
        if not codec[key].is_meta and not torch.equal(codec[key].cpu(), value):
            raise CheckpointError(f"{RELEASE} counts its bits in another way: {key} is {codec[key].tolist()}")
    found = {k: codec[name] for k, name in names.items()}
    if voice:
        found |= {VOCODER + k: v for k, v in vocoder_from_official(voice, empty.vocoder).items()}
    return Converted(model, found, {})


def to_official(tokenizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict from ours, the vocoder's under `vocoder.…`: the inverse of `from_official`."""
    voice = {k.removeprefix(VOCODER): v for k, v in tokenizer.items() if k.startswith(VOCODER)}
    made = {official_name(k): v for k, v in tokenizer.items() if not k.startswith(VOCODER)}
    made |= code_constants(tokenizer["to_code.bias"].shape[0])
    return made | {VOCODER + k: v for k, v in vocoder_to_official(voice).items()} if voice else made


def official_name(key: str) -> str:
    """The official key of one of the codec's."""
    return rename(key, RENAMES)


def code_constants(bits: int) -> dict[str, Tensor]:
    """The quantizer's buffers in the authors' file: what each bit counts, in a code and in its group of one."""
    return {"bsq.basis": 2 ** torch.arange(bits - 1, -1, -1), "bsq.group_basis": torch.ones(1, dtype=torch.int64)}


def official_config(config: Mapping[str, Any] | None, with_vocoder: bool = True) -> ModelConfig:
    """Our model config of the authors' `preprocess`, `tadicodec` and `vocos`; none: of the release.

    Raises ConfigError on an option of theirs that is missing or that we do not have.
    """
    own = ModelConfig()
    if not with_vocoder:
        own.vocoder.kind = "griffin_lim"
    if config is None:
        return own
    try:
        front, codec = config["preprocess"], config["tadicodec"]
        mel = MelConfig(**{ours: front[theirs] for theirs, ours in MEL.items()})
        sizes = {ours: codec[theirs] for theirs, ours in SIZES.items() if theirs != "use_text_cond"}
        rate, rows = front["sample_rate"], codec["text_vocab_size"]
        if with_vocoder:
            found = vocoder_sizes(config["vocos"])
            if (found.pop("bands"), found.pop("n_fft"), found.pop("hop")) != (mel.bands, mel.n_fft, mel.hop):
                raise ConfigError("the vocoder's bands, n_fft and hop must be those of the mel frames")
            own.vocoder = VocoderConfig("vocos", found["width"], found["hidden"], found["layers"])
    except KeyError as error:
        raise ConfigError(f"the authors' config has no '{error.args[0]}'") from error
    for name, value in FIXED.items():
        if codec.get(name, value) != value:
            raise ConfigError(f"tadicodec.{name} must be {value}, not {codec[name]}")
    if front.get("win_size", mel.n_fft) != mel.n_fft or codec.get("mel_dim", mel.bands) != mel.bands:
        raise ConfigError("the window must be as long as n_fft, and tadicodec.mel_dim be preprocess.num_mels")
    text = replace(own.text, vocabulary=rows, pad=min(own.text.pad, rows - 1))
    return replace(own, sample_rate=rate, mel=mel, text=text, text_condition=codec.get("use_text_cond", True), **sizes)
