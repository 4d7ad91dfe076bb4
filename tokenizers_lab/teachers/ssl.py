"""Frozen self-supervised speech networks (HuBERT, WavLM, wav2vec 2.0), Whisper's encoder in their place, CTC recognizers."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_lab.errors import ConfigError
from tokenizers_lab.nn.mel import whisper_log_mel

from .hidden import AVERAGE, pick_layer
from .networks import local_folder, missing_teacher
from .speech import from_transformers as whisper_encoder
from .whisper import WHISPER_ASSETS, hear, whisper_from_asset

SAMPLE_RATE = 16_000
HOP = 320                 # samples of a frame: 50 frames a second


def normalise_clips(audio: Tensor, eps: float) -> Tensor:
    """Each clip of audio (B, T) to zero mean and unit variance; eps is added to the variance."""
    mean, variance = audio.mean(-1, keepdim=True), audio.var(-1, keepdim=True, correction=0)
    return (audio - mean) / (variance + eps).sqrt()


class SSLTeacher(nn.Module):
    """Features of 16 kHz audio. `width`: their channels; `provenance`: where the weights come from.

    layer: which hidden state; −1: the mean of all of them, the input of the first layer included.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, network: Any, layer: int = AVERAGE, provenance: str = "network given by the caller"):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        layers = int(network.config.num_hidden_layers)
        if not AVERAGE <= layer <= layers:
            raise ConfigError(f"a speech teacher's layer must be 0 to {layers}, or -1 for the mean, not {layer}")
        self.layer, self.width, self.provenance = layer, int(network.config.hidden_size), provenance
        self.eval()

    def train(self, mode: bool = True) -> "SSLTeacher":
        """A teacher stays in eval mode."""
        return super().train(False)

    def input_values(self, audio: Tensor) -> Tensor:
        """What the network is given: audio (B, T), normalised clip by clip (eps 1e-7, as transformers' feature extractor)."""
        return normalise_clips(audio.float(), 1e-7)

    @torch.no_grad()
    def hidden_states(self, audio: Tensor) -> Tensor:
        """(layers + 1, B, frames, D) of audio (B, T): the input of the first layer, then each layer's output."""
        return torch.stack(self.network(self.input_values(audio), output_hidden_states=True).hidden_states)

    def features(self, audio: Tensor) -> Tensor:
        """(B, frames, D) of audio (B, T) at 16 kHz; 50 frames a second, one fewer than hops of 320 samples."""
        return pick_layer(self.hidden_states(audio), self.layer)


class WhisperSSLTeacher(SSLTeacher):
    """Whisper's encoder as a teacher of speech features, 50 frames a second: one for each hop of 320 samples.

    The encoder sees the clip's own frames, and not 30 s of padding: a segment of 3 s costs a tenth. Its last hidden state is
    the one after the final layer norm. Longer clips than its window are heard window by window.
    """

    positions: Tensor                 # (window's frames, D), all position embeddings of the encoder

    def __init__(self, network: Any, layer: int = AVERAGE, provenance: str = "network given by the caller"):
        """network: transformers' WhisperEncoder; it is changed at each call."""
        super().__init__(network, layer, provenance)
        self.register_buffer("positions", network.embed_positions.weight.detach().clone(), persistent=False)

    def input_values(self, audio: Tensor) -> Tensor:
        """Log-mels (B, bands, 2 · frames) of audio (B, T), padded with zeros to whole frames."""
        frames = -(-audio.shape[-1] // HOP)
        return whisper_log_mel(audio, int(self.network.config.num_mel_bins), frames * HOP)

    @torch.no_grad()
    def hidden_states(self, audio: Tensor) -> Tensor:
        """(layers + 1, B, frames, D) of audio (B, T): the input of the first layer, then each layer's output."""
        heard = []
        for window in audio.split(len(self.positions) * HOP, dim=-1):
            values = self.input_values(window)
            hear(self.network, self.positions, values.shape[-1] // 2)
            result = self.network(values, output_hidden_states=True)
            heard.append(torch.stack([*result.hidden_states[:-1], result.last_hidden_state]))
        return torch.cat(heard, dim=2)


class W2vBertTeacher(SSLTeacher):
    """w2v-BERT 2.0 as a teacher: it takes log-mels of two frames at a time (160 values), 50 a second."""

    def input_values(self, audio: Tensor) -> Tensor:
        """Its inputs (B, frames, 160) of audio (B, T), at least 400 samples: transformers' own front end, clip by clip."""
        from transformers import SeamlessM4TFeatureExtractor

        clips = [clip.cpu().numpy() for clip in audio.float()]
        features = SeamlessM4TFeatureExtractor()(clips, sampling_rate=SAMPLE_RATE, padding=False, return_tensors="pt")
        return features["input_features"].to(audio.device)


class CTCRecognizer(nn.Module):
    """Transcripts of 16 kHz audio by a CTC network and its tokenizer."""

    sample_rate = SAMPLE_RATE

    def __init__(self, network: Any, tokenizer: Any, provenance: str = "network given by the caller"):
        """tokenizer: transformers' Wav2Vec2CTCTokenizer."""
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.tokenizer, self.provenance = tokenizer, provenance
        self.eval()

    def train(self, mode: bool = True) -> "CTCRecognizer":
        """A recognizer stays in eval mode."""
        return super().train(False)

    def input_values(self, audio: Tensor) -> Tensor:
        """What the network is given: audio (B, T), normalised clip by clip (eps 1e-5, as wav2vec 2.0's old tokenizer)."""
        return normalise_clips(audio.float(), 1e-5)

    @torch.no_grad()
    def logits(self, audio: Tensor) -> Tensor:
        """(B, frames, characters) of audio (B, T)."""
        return self.network(self.input_values(audio)).logits

    def transcribe(self, audio: Tensor) -> list[str]:
        """Transcripts of audio (B, T): the likeliest character of each frame, repeats and blanks dropped."""
        return self.tokenizer.batch_decode(self.logits(audio).argmax(-1))


def build_ssl_teacher(source: str, layer: int = AVERAGE) -> SSLTeacher:
    """A teacher by hub id or local folder, or whisper-tiny.en or whisper-base of the assets table, which stand in for HuBERT.

    Raises WeightsMissing if it is not here and cannot be fetched.
    """
    from transformers import AutoConfig, AutoModel

    if source in WHISPER_ASSETS:
        whisper = whisper_from_asset(source)
        return WhisperSSLTeacher(whisper.network.get_encoder(), layer, f"{whisper.provenance}; stands in for HuBERT")
    folder = local_folder(source)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind == "whisper":
            return WhisperSSLTeacher(whisper_encoder(source), layer, f"{source} (transformers)")
        network = AutoModel.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    teacher = W2vBertTeacher if kind == "wav2vec2-bert" else SSLTeacher
    return teacher(network, layer, f"{source} (transformers)")


def build_recognizer(source: str) -> CTCRecognizer:
    """A CTC recognizer by hub id or local folder. Raises WeightsMissing if it is not here and cannot be fetched."""
    from transformers import AutoModelForCTC, AutoTokenizer

    folder = local_folder(source)
    try:
        network, tokenizer = AutoModelForCTC.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise missing_teacher(source, error) from error
    return CTCRecognizer(network, tokenizer, f"{source} (transformers)")
