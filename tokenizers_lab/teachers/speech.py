"""Frozen speech networks whose features a codec learns to keep."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import CheckpointError, ConfigError, InputError
from tokenizers_lab.nn.mel import WHISPER_HOP, WHISPER_RATE, whisper_log_mel

from .networks import RANDOM_SEED, _literal, local_folder, missing_teacher
from .whisper import hear, whisper_from_asset

FULL_WINDOW = 30.0             # seconds that Whisper was trained on
TOKEN_SAMPLES = 2 * WHISPER_HOP
PUBLISHED = "openai/whisper-large-v3"     # LM-SPT's teacher


class WhisperTeacher(nn.Module):
    """Whisper's encoder, frozen: 16 kHz audio in, features of 50 tokens a second out, with gradient to the audio.

    `width`: channels of a feature. `provenance`: where the weights come from. Audio is padded with zeros, or cut, to
    `seconds`; with less than 30 the encoder sees the first position embeddings only, at a fraction of the cost.
    """

    sample_rate = WHISPER_RATE

    def __init__(self, network: Any, seconds: float = FULL_WINDOW, provenance: str = "network given by the caller"):
        """network: transformers' WhisperEncoder; it is changed if `seconds` is shorter than its own window.
        Raises ConfigError unless 0 < seconds ≤ 30."""
        super().__init__()
        self.tokens = math.ceil(round(seconds * WHISPER_RATE) / TOKEN_SAMPLES)
        own = network.embed_positions.num_embeddings
        if not 1 <= self.tokens <= own:
            raise ConfigError(f"a Whisper teacher's window must be above 0 and at most {own / 50:g} s, not {seconds:g}")
        hear(network, network.embed_positions.weight, self.tokens)
        self.network = network.requires_grad_(False).eval()
        self.width, self.bands = int(network.config.d_model), int(network.config.num_mel_bins)
        self.provenance = provenance
        self.eval()

    def train(self, mode: bool = True) -> "WhisperTeacher":
        """A teacher stays in eval mode."""
        return super().train(False)

    def log_mel(self, audio: Tensor, floor_over_batch: bool = False) -> Tensor:
        """Input features (B, bands, 2 · tokens) of audio (B, L) at 16 kHz; see `nn.mel.whisper_log_mel`."""
        if audio.dim() != 2 or not audio.is_floating_point():
            raise InputError(f"a speech teacher's audio must be float (B, samples), not {audio.dtype} {tuple(audio.shape)}")
        return whisper_log_mel(audio, self.bands, self.tokens * TOKEN_SAMPLES, floor_over_batch)

    def encode(self, log_mel: Tensor) -> Tensor:
        """Features (B, tokens, width) after the final layer norm, of input features (B, bands, 2 · tokens)."""
        return self.network(log_mel).last_hidden_state

    def features(self, audio: Tensor, floor_over_batch: bool = False) -> Tensor:
        """Features (B, tokens, width) of audio (B, L) at 16 kHz, the padding's tokens included; with gradient to the audio."""
        return self.encode(self.log_mel(audio, floor_over_batch))


def build_speech_teacher(cfg: Any, seconds: float = FULL_WINDOW) -> WhisperTeacher:
    """The teacher of a config with the fields `backend`, `source`, `config`.

    backend: `transformers` (hub id or folder of a Whisper), `asset` (whisper-tiny.en or whisper-base of `toklab assets`),
    `random` (`config` is a transformers config; seeded weights, as `provenance` says). Raises WeightsMissing if the weights are
    not here and cannot be fetched, ConfigError on another choice.
    """
    if cfg.backend == "transformers":
        return WhisperTeacher(from_transformers(cfg.source), seconds, f"{cfg.source} (transformers)")
    if cfg.backend == "asset":
        whisper = whisper_from_asset(cfg.source)
        return WhisperTeacher(whisper.network.get_encoder(), seconds, f"{whisper.provenance}; stands in for {PUBLISHED}")
    if cfg.backend == "random":
        return WhisperTeacher(from_random(dict(cfg.config or {})), seconds, f"random weights (seed {RANDOM_SEED})")
    raise ConfigError(f"there is no speech teacher backend '{cfg.backend}'; known: transformers, asset, random")


def from_transformers(source: str) -> nn.Module:
    """The encoder of a Whisper by hub id or local folder; code from the hub is never run. Raises WeightsMissing."""
    from transformers import WhisperModel

    folder = local_folder(source)
    try:
        loaded: Any = WhisperModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    lacking = sorted(key for key in info["missing_keys"] if "encoder." in key)
    if lacking:
        raise CheckpointError(f"the weights of teacher '{source}' lack {lacking[0]}: not a whole Whisper encoder")
    return model.encoder


def from_random(config: dict[str, Any]) -> nn.Module:
    """An encoder of that transformers config, such as {"d_model": "16", "encoder_layers": "2"}, seeded."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    options = {name: _literal(value) for name, value in config.items()}
    if options.pop("model_type", "whisper") != "whisper":
        raise ConfigError("a speech teacher's config must have the model_type whisper")
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        return WhisperEncoder(WhisperConfig(**options))
