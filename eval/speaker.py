"""Speaker similarity: cosine of speaker embeddings of a reconstruction and its original, and of another clip of the speaker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.errors import CheckpointError
from tokenizers_lab.teachers.networks import RANDOM_SEED, local_folder, missing_teacher

from .bootstrap import mean_summary
from .provenance import weights_sha256

SAMPLE_RATE = 16_000
SHORTEST = SAMPLE_RATE // 2      # samples that an x-vector needs for a frame; shorter clips are filled with zeros
RANDOM = "random"                # a tiny seeded network: for tests, and called so in results


@dataclass(frozen=True)
class SpeakerEncoder:
    """A network that tells speakers apart. embed: audio (samples,) at 16 kHz -> (size,) of length 1, on the CPU."""

    embed: Callable[[Tensor], Tensor]
    provenance: str


def build_speaker_encoder(source: str = "resemblyzer", device: torch.device | str = "cpu") -> SpeakerEncoder:
    """resemblyzer (GE2E, of the assets table), a hub id or folder of a WavLMForXVector such as microsoft/wavlm-base-plus-sv, or
    random: such a network, tiny and untrained, whose numbers mean nothing.

    Raises WeightsMissing, CheckpointError.
    """
    if source == "resemblyzer":
        return _resemblyzer(device)
    return _x_vectors(source, device)


def _resemblyzer(device: torch.device | str) -> SpeakerEncoder:
    from .resemblyzer import load_resemblyzer, raise_volume

    network, source = load_resemblyzer()
    network.to(device)
    return SpeakerEncoder(lambda audio: network.embed(raise_volume(audio).to(device)).cpu(), f"{source}; silences are kept")


def _x_vectors(source: str, device: torch.device | str) -> SpeakerEncoder:
    from transformers import Wav2Vec2FeatureExtractor

    if source == RANDOM:
        network, extractor, provenance = random_x_vectors(), Wav2Vec2FeatureExtractor(), f"random weights (seed {RANDOM_SEED})"
    else:
        network, extractor = load_x_vectors(source)
        name = Path(source).name if Path(source).expanduser().is_dir() else source      # results name no folders
        provenance = f"{name} (transformers), SHA-256 {weights_sha256(network)[:12]}"
    network.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def embed(audio: Tensor) -> Tensor:
        filled = F.pad(audio.float().cpu(), (0, max(0, SHORTEST - len(audio))))
        values = extractor(filled.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        return F.normalize(network(values.to(device)).embeddings[0], dim=0).cpu()

    return SpeakerEncoder(embed, provenance)


def load_x_vectors(source: str) -> tuple[Any, Any]:
    """transformers' WavLMForXVector by hub id or folder, and its feature extractor. Raises WeightsMissing, CheckpointError."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMForXVector

    folder = local_folder(source)
    try:
        loaded: Any = WavLMForXVector.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    network, info = loaded
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith("objective."))     # a head of the training
    if lacking:
        raise CheckpointError(f"the weights of '{source}' lack {lacking[0]}: not a whole WavLMForXVector")
    return network, extractor


def random_x_vectors() -> Any:
    """A tiny WavLMForXVector with seeded random weights."""
    from transformers import WavLMConfig, WavLMForXVector

    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, tdnn_dim=(16, 16, 16, 16, 32), xvector_output_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        return WavLMForXVector(config)


class Similarity:
    """Cosine in [−1, 1] of a reconstruction's embedding and its original's, as the table of metrics wants it."""

    def __init__(self, source: str = "resemblyzer", device: torch.device | str = "cpu"):
        """source: see `build_speaker_encoder`."""
        self.encoder = build_speaker_encoder(source, device)
        self.provenance = self.encoder.provenance

    def __call__(self, original: Tensor, made: Tensor, about: dict[str, Any]) -> dict[str, Any]:
        """A clip's cosine, and both embeddings for `against_prompts`."""
        if not len(original):
            return {"value": None, "reason": "it is empty"}
        first, second = self.encoder.embed(original), self.encoder.embed(made)
        # Embeddings travel between processes as lists: they are short.
        return {"value": float(first @ second), "_original": first.tolist(), "_made": second.tolist(), "_about": about}


def against_prompts(values: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The cosine of each reconstruction with another clip of its speaker, the next one by name (the last's is the first).

    {"prompt": {value, uncertainty, n, originals}}, where originals is the same of the originals: what no codec can be expected
    to exceed. Nothing if no speaker has two clips.
    """
    clips = [value.get("channels", [value])[0] for value in values]
    by_speaker: dict[str, list[dict[str, Any]]] = {}
    for clip in sorted(clips, key=lambda clip: clip["_about"]["key"]):
        if clip["_about"]["speaker"] is not None:
            by_speaker.setdefault(clip["_about"]["speaker"], []).append(clip)
    made, originals = [], []
    for mine in by_speaker.values():
        for clip, prompt in zip(mine, mine[1:] + mine[:1]):
            if clip is not prompt:
                made.append(_cosine(clip["_made"], prompt["_original"]))
                originals.append(_cosine(clip["_original"], prompt["_original"]))
    if not made:
        return {}
    return {"prompt": {**mean_summary(made, seed), "n": len(made), "originals": mean_summary(originals, seed)["value"],
                       "which": "the speaker's next original by name"}}


def _cosine(one: list[float], two: list[float]) -> float:
    return float(torch.tensor(one, dtype=torch.float64) @ torch.tensor(two, dtype=torch.float64))
