"""Whisper networks as transformers' classes: out of the assets table (CTranslate2's format), the hub, or a local folder."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError, ConfigError

from .networks import local_folder, missing_teacher

WHISPER_ASSETS = ("whisper-tiny.en", "whisper-base")
MULTILINGUAL_TOKENS = 51_865      # a vocabulary of at least this many tokens has languages (openai-whisper, tokenizer.py)


@dataclass
class Whisper:
    """A whole Whisper: encoder, decoder and its settings for generating, its tokenizer, and where the weights come from."""

    network: Any         # transformers' WhisperForConditionalGeneration, eval mode, float32
    tokenizer: Any       # has decode(ids, skip_special_tokens=True)
    provenance: str


def whisper_from_asset(name: str) -> Whisper:
    """A Whisper of the assets table. Raises ConfigError for another asset, and as `assets.find`."""
    from tokenizers import Tokenizer

    from tokenizers_lab.asset_readers import CTRANSLATE2_FILE, read_ctranslate2
    from tokenizers_lab.assets import find, get_asset

    get_asset(name)
    if name not in WHISPER_ASSETS:
        raise ConfigError(f"the asset '{name}' is no Whisper; use {' or '.join(WHISPER_ASSETS)}")
    found = find(name)
    tokenizer = Tokenizer.from_file(str(found.path / "tokenizer.json"))
    network = build_whisper(read_ctranslate2(found.path / CTRANSLATE2_FILE), str(found.path))
    network.generation_config = generation_config(tokenizer, found.path, network.config.vocab_size)
    return Whisper(network, tokenizer, f"{name}, {found.source}")


def whisper_from_transformers(source: str) -> Whisper:
    """A Whisper by hub id or local folder; code from the hub is never run. Raises WeightsMissing, CheckpointError."""
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    folder = local_folder(source)
    options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        loaded: Any = WhisperForConditionalGeneration.from_pretrained(folder, **options)
        network, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    if info["missing_keys"]:
        raise CheckpointError(f"the weights of '{source}' lack {sorted(info['missing_keys'])[0]}: not a whole Whisper")
    return Whisper(network.eval(), tokenizer, f"{source} (transformers)")


def build_whisper(arrays: dict[str, np.ndarray], shown: str) -> Any:
    """WhisperForConditionalGeneration, float32 and in eval mode, with the arrays of a CTranslate2 model; sizes are the arrays'.

    Raises CheckpointError unless the arrays are exactly a Whisper's.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    try:
        embedding = arrays["decoder/embeddings/weight"]
        config = WhisperConfig(
            vocab_size=embedding.shape[0], d_model=embedding.shape[1], num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
            encoder_layers=layers_of(arrays, "encoder"), decoder_layers=layers_of(arrays, "decoder"),
            encoder_attention_heads=int(arrays["encoder/num_heads"]), decoder_attention_heads=int(arrays["decoder/num_heads"]),
            encoder_ffn_dim=arrays["encoder/layer_0/ffn/linear_0/weight"].shape[0],
            decoder_ffn_dim=arrays["decoder/layer_0/ffn/linear_0/weight"].shape[0],
            max_source_positions=len(arrays["encoder/position_encodings/encodings"]),
            max_target_positions=len(arrays["decoder/position_encodings/encodings"]))
        with torch.device("meta"):      # no random start, which would take longer than reading
            network = WhisperForConditionalGeneration(config)
        network.load_state_dict(transformers_names(arrays), strict=True, assign=True)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{shown} holds no whole Whisper: {str(error).splitlines()[0]}") from error
    network.tie_weights()
    return network.eval()


def layers_of(arrays: dict[str, np.ndarray], part: str) -> int:
    """Number of layers of `encoder` or `decoder`."""
    return len({found[0] for name in arrays if (found := re.match(rf"{part}/layer_\d+/", name))})


# CTranslate2's attentions stack their projections by rows. Keys have no bias; CTranslate2 stores zeros.
_STACKED = {
    "self_attention/linear_0": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention/linear_1": ("self_attn", ("out_proj",)),
    "attention/linear_0": ("encoder_attn", ("q_proj",)),
    "attention/linear_1": ("encoder_attn", ("k_proj", "v_proj")),
    "attention/linear_2": ("encoder_attn", ("out_proj",)),
}
_RENAMED = {
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings/weight": "embed_tokens.weight",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}


def transformers_names(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """A CTranslate2 Whisper's tensors, float32, under the names of transformers' WhisperForConditionalGeneration."""
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if array.ndim == 0 or name.endswith("alignment_heads"):
            continue                                          # settings, not weights
        tensor = torch.from_numpy(array).float()
        part, rest = name.split("/", 1)
        layer = re.match(r"layer_(\d+)/", rest)
        where = f"model.{part}." + (f"layers.{layer[1]}." if layer else "")
        rest = rest[layer.end() :] if layer else rest
        kind = {"gamma": "weight", "beta": "bias"}.get(last := rest.rsplit("/", 1)[-1], last)
        block = rest.rpartition("/")[0]
        if block in _STACKED:
            attention, projections = _STACKED[block]
            for projection, rows in zip(projections, tensor.chunk(len(projections))):
                if (projection, kind) != ("k_proj", "bias"):
                    state[f"{where}{attention}.{projection}.{kind}"] = rows.contiguous()
        else:
            state[where + _RENAMED.get(rest, f"{_RENAMED.get(block, block)}.{kind}")] = tensor
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def generation_config(tokenizer: Any, folder: Path, vocabulary: int) -> Any:
    """transformers' GenerationConfig: the prompt's tokens by the tokenizer, the tokens never said by the model's config.json."""
    from transformers import GenerationConfig

    settings = json.loads((folder / "config.json").read_text())
    start, end = (tokenizer.token_to_id(f"<|{name}|>") for name in ("startoftranscript", "endoftext"))
    translate, transcribe = (tokenizer.token_to_id(f"<|{name}|>") for name in ("translate", "transcribe"))
    options: dict[str, Any] = {
        "is_multilingual": vocabulary >= MULTILINGUAL_TOKENS, "no_timestamps_token_id": tokenizer.token_to_id("<|notimestamps|>")}
    if options["is_multilingual"]:
        options["lang_to_id"] = {tokenizer.id_to_token(i): i for i in range(start + 1, translate)}
        options["task_to_id"] = {"translate": translate, "transcribe": transcribe}
    return GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        suppress_tokens=settings["suppress_ids"], begin_suppress_tokens=settings["suppress_ids_begin"],
        return_timestamps=False, **options)


def hear(network: Any, positions: Tensor, tokens: int) -> None:
    """Let a Whisper encoder take 2 · tokens frames instead of 30 s: it sees the first of its `positions` (N, D) only."""
    if network.config.max_source_positions != tokens or network.embed_positions.num_embeddings != tokens:
        network.embed_positions = nn.Embedding.from_pretrained(positions[:tokens].clone())
        network.config.max_source_positions = network.max_source_positions = tokens
