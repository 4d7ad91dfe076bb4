"""The XY-Tokenizer network (arXiv 2506.23325): two encoders of Whisper's shape, one stream of residual codes, a decoder."""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, InputError
from tokenizers_lab.network import load_weights
from tokenizers_lab.nn.dac import zero_behind
from tokenizers_lab.nn.mel import WHISPER_HOP, whisper_log_mel
from tokenizers_lab.nn.streams import Stream
from tokenizers_lab.nn.vocos import Vocos
from tokenizers_lab.nn.whisper import STRIDE, WhisperAdapter, WhisperDecoder, WhisperEncoder, encoder_state
from tokenizers_lab.nn.windows import PlannedStream, WindowPlan, both_sides, in_windows, look_ahead
from tokenizers_lab.quantizers.codebook import full_precision
from tokenizers_lab.quantizers.masked import MaskedResidualVQ
from tokenizers_lab.quantizers.result import QuantizerResult
from tokenizers_lab.teachers.speech import from_transformers
from tokenizers_lab.teachers.whisper import WHISPER_ASSETS, whisper_from_asset
from tokenizers_lab.tokenizer import CONTEXT_SECONDS, SpeechEncoding, SpeechTokenizer

from .config import AdapterConfig, ModelConfig, QuantizerConfig, StackConfig, check_model, hop_of, vocoder_hop, window_codes

Frames = TypeVar("Frames", int, Tensor)
SIDES = ("both", "ahead")      # where windows of long audio have context


@dataclass
class Coded:
    """What the whole network makes of a batch."""

    quantized: QuantizerResult     # codes (B, K, T), losses by name, health
    features: Tensor               # (B, code_channels, T): behind the post-RVQ adapter; what a language model listens to
    lengths: Tensor                # (B,) int64: code frames of each item; features behind them say nothing
    reconstruction: Tensor         # (B, 1, samples) at `output_rate`, float32, of no fixed range; 0 behind an item's end


class Downsample(nn.Module):
    """`pool` tokens to one frame of pool times the channels: a gated convolution on top of the tokens side by side, a norm."""

    def __init__(self, width: int, pool: int):
        super().__init__()
        self.pool = pool
        self.gate_proj = nn.Conv1d(width, pool * width, pool, pool, bias=False)
        self.up_proj = nn.Conv1d(width, pool * width, pool, pool, bias=False)
        self.down_proj = nn.Linear(pool * width, pool * width, bias=False)
        self.layer_norm = nn.LayerNorm(pool * width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width), T a multiple of `pool`. Returns (B, T / pool, pool · width)."""
        beside = x.unflatten(1, (-1, self.pool)).flatten(2)                                  # (B, T / pool, pool · width)
        x = x.transpose(1, 2)
        gated = (F.silu(self.gate_proj(x)) * self.up_proj(x)).transpose(1, 2)
        return self.layer_norm(self.down_proj(gated) + beside)


class Upsample(nn.Module):
    """One frame to `pool` tokens, by a transposed convolution whose kernels do not overlap."""

    def __init__(self, width: int, pool: int):
        super().__init__()
        self.up_conv = nn.ConvTranspose1d(pool * width, width, pool, pool, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, pool · width). Returns (B, pool · T, width)."""
        return self.up_conv(x.transpose(1, 2)).transpose(1, 2)


class XYTokenizer(SpeechTokenizer):
    """XY-Tokenizer: mono audio (B, 1, samples) in [−1, 1] at 16 kHz to codes (B, K, T), 12.5 frames a second, and back.

    Its transformers see a window of `window_seconds`, and the mel's floor follows the loudest frame in it: nothing is local.
    Longer audio is coded, and decoded, in windows that overlap. Items of a padded batch come out as if they were alone.
    """

    system = "xy_tokenizer"
    cfg: ModelConfig

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        self.sample_rate, self.hop = cfg.sample_rate, hop_of(cfg)
        self.codebooks, self.codebook_size = cfg.quantizer.codebooks, cfg.quantizer.codebook_size
        codes = window_codes(cfg)
        tokens = codes * cfg.pool
        self.semantic_encoder = WhisperEncoder(cfg.bands, *sizes(cfg.semantic, tokens))
        self.semantic_encoder_adapter = adapter(cfg.semantic.width, cfg.semantic_adapter, tokens)
        self.acoustic_encoder = WhisperEncoder(cfg.bands, *sizes(cfg.acoustic, tokens))
        joined = (cfg.semantic_adapter.out or cfg.semantic_adapter.width) + cfg.acoustic.width
        self.pre_rvq_adapter = adapter(joined, cfg.pre_adapter, tokens)
        width = cfg.pre_adapter.out or cfg.pre_adapter.width
        self.downsample = Downsample(width, cfg.pool)
        self.quantizer_channels = cfg.pool * width
        self.quantizer = build_quantizer(cfg.quantizer, self.quantizer_channels)
        self.post_rvq_adapter = adapter(cfg.quantizer.out or self.quantizer_channels, cfg.post_adapter, codes, cfg.code_channels)
        self.upsample = Upsample(cfg.decoder.width, cfg.pool)
        self.acoustic_decoder = WhisperDecoder(cfg.decoder_bands, *sizes(cfg.decoder, tokens))
        voice, hop = cfg.vocoder, vocoder_hop(cfg)
        self.vocoder = Vocos(cfg.decoder_bands, voice.width, voice.hidden, voice.layers, voice.n_fft or 4 * hop, hop)

    # --- the public way ---------------------------------------------------------------------------------------------------

    def output_rate(self, decoding: str | None = None) -> int:
        """Sample rate in Hz of what `decode` gives."""
        return self.cfg.output_rate

    def frame_samples(self) -> int:
        """Samples that `decode` makes of a frame."""
        return self.hop * self.cfg.output_rate // self.sample_rate

    def encode(
        self, audio: Tensor, lengths: Tensor | None = None, overlap_seconds: float | None = None, context: str = "both",
        pad: bool = True,
    ) -> SpeechEncoding:
        """Codes (B, K, T), T = ⌈samples / hop⌉, of audio (B, 1, samples); lengths: (B,) samples of each item of a padded batch.

        Audio longer than a window is coded in windows that overlap by `overlap_seconds` (none: the config's).
        context="ahead", pad=False: the authors' way. Windows then have look-ahead only, and samples behind the last whole frame
        get no code. Raises InputError on unusable audio, and without padding on less than a frame.
        """
        self.check_audio(audio, lengths)
        codes = self.analyse(audio, lengths, overlap_seconds, context, pad)
        if lengths is None:
            return SpeechEncoding(codes)
        frames = self.code_frames(lengths.to(audio.device), pad)
        return SpeechEncoding(zero_behind(codes, frames), lengths=frames)

    def decode(
        self, codes: Tensor, lengths: Tensor | None = None, overlap_seconds: float | None = None, context: str = "both"
    ) -> Tensor:
        """Audio (B, 1, T · frame) in [−1, 1] at `output_rate()` of codes (B, K, T), K at most `codebooks`.

        lengths: (B,) frames of each item of a padded batch. Windows as in `encode`. Raises InputError on unusable codes.
        """
        self.check_codes(codes, lengths)
        return self.synthesise(codes, lengths, overlap_seconds, context).clamp(-1, 1)

    def encode_stream(self, context: float = CONTEXT_SECONDS) -> Stream:
        """See SpeechTokenizer. The same windows as `encode`, whatever the context: the codes are equal."""
        return PlannedStream(self.window_encode, self.plan(), self.hop, 1)

    def decode_stream(self, context: float = CONTEXT_SECONDS) -> Stream:
        """See SpeechTokenizer. The same windows as `decode`, whatever the context."""
        return PlannedStream(
            lambda codes, lengths: self.window_decode(codes, lengths).clamp(-1, 1), self.plan(), 1, self.frame_samples())

    @torch.inference_mode()
    def reconstruct(self, audio: Tensor, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """decode(encode(audio)) at `output_rate()`, cut to the duration of the input; 0 behind the end of a shorter item.

        options: of `decode`.
        """
        encoding, rate = self.encode(audio, lengths), self.cfg.output_rate
        restored = self.decode(encoding.code, encoding.lengths, **options)[..., : audio.shape[-1] * rate // self.sample_rate]
        return restored if lengths is None else zero_behind(restored, lengths.to(restored.device) * rate // self.sample_rate)

    def forward(self, audio: Tensor, lengths: Tensor | None = None, draw: Draw | None = None) -> Coded:
        """The training pass over audio (B, 1, samples) of at most a window; what lies behind `lengths` (B,) samples is not heard.

        T = ⌈samples / hop⌉ frames; the reconstruction is as long as the audio (at the output rate). The codebooks move if the
        quantizer is in training mode, which takes a `draw`. A semantic encoder whose parameters need no gradient runs
        without one. Raises InputError on longer audio.
        """
        whole = lengths if lengths is not None else torch.full((len(audio),), audio.shape[2], device=audio.device)
        latents, frames = self.latents(audio, lengths)
        quantized = self.quantizer(latents, draw, lengths=frames)
        features = self.features(quantized.quantized, frames)
        made = self.voice(features, frames)[..., : audio.shape[2] * self.cfg.output_rate // self.sample_rate]
        return Coded(quantized, features, -(-whole // self.hop), made)

    def start_part(self, part: str, source: str) -> str:
        """See Tokenizer. Both encoders also start from a Whisper: a hub id or a folder of transformers' format, or one of
        `toklab assets`. A longer table of positions is cut. Raises CheckpointError if it has other sizes."""
        from tokenizers_lab.hub import is_tokenizer

        if part not in ("semantic_encoder", "acoustic_encoder") or is_tokenizer(source):
            return super().start_part(part, source)
        own = self.get_submodule(part)
        assert isinstance(own, WhisperEncoder)
        if source in WHISPER_ASSETS:
            whisper = whisper_from_asset(source)
            network, origin = whisper.network.get_encoder(), whisper.provenance
        else:
            network, origin = from_transformers(source), f"{source} (transformers)"
        cfg = self.cfg.semantic if part == "semantic_encoder" else self.cfg.acoustic
        found = (network.config.encoder_attention_heads, network.config.activation_function)
        if found != (cfg.heads, cfg.activation):
            raise CheckpointError(f"init_parts: {source} has {found[0]} heads and {found[1]}, but {part} has {cfg.heads} and "
                                  f"{cfg.activation}")
        load_weights(own, encoder_state(network, len(own.positional_embedding)), f"init_parts: the encoder of {source}")
        return origin

    # --- parts, which training and parity call too ------------------------------------------------------------------------

    def plan(self, overlap_seconds: float | None = None, context: str = "both") -> WindowPlan:
        """The windows of audio longer than one. Raises InputError on an overlap that is no part of a window, or no whole
        frames with context="ahead"."""
        if context not in SIDES:
            raise InputError(f"context must be one of {', '.join(SIDES)}; not '{context}'")
        seconds = self.cfg.overlap_seconds if overlap_seconds is None else overlap_seconds
        size, overlap = window_codes(self.cfg), seconds * self.sample_rate / self.hop
        frames = int(overlap + 1e-6)
        if not 0 <= frames < size or overlap < 0:
            raise InputError(f"windows of {self.cfg.window_seconds:g} s cannot overlap by {seconds:g} s")
        if context == "ahead" and abs(overlap - frames) > 1e-6:
            raise InputError(f"an overlap with look-ahead only must be a multiple of {self.hop / self.sample_rate:g} s, "
                             f"not {seconds:g}")
        return both_sides(size, frames) if context == "both" else look_ahead(size, frames)

    def analyse(
        self, audio: Tensor, lengths: Tensor | None = None, overlap_seconds: float | None = None, context: str = "both",
        pad: bool = True,
    ) -> Tensor:
        """The codes of `encode` of audio in any range; behind an item's end they say nothing."""
        plan, samples = self.plan(overlap_seconds, context), audio.shape[2]
        if not pad and (samples if lengths is None else int(lengths.min())) < self.hop:
            raise InputError(f"audio must be at least {self.hop} samples (one frame) if it is not padded")
        ends = None if lengths is None else lengths.to(audio.device)
        codes = in_windows(partial(self.window_encode, pad=pad), audio, ends, plan, self.hop, 1)
        return codes[..., : self.code_frames(samples, pad)]

    def synthesise(
        self, codes: Tensor, lengths: Tensor | None = None, overlap_seconds: float | None = None, context: str = "both",
        padding_counts: bool = False,
    ) -> Tensor:
        """The audio of `decode`, not limited in range. padding_counts: see `voice`."""
        plan, ends = self.plan(overlap_seconds, context), None if lengths is None else lengths.to(codes.device)
        function = partial(self.window_decode, padding_counts=padding_counts)
        return in_windows(function, codes, ends, plan, 1, self.frame_samples())

    @torch.no_grad()
    def window_encode(self, audio: Tensor, lengths: Tensor | None = None, pad: bool = True) -> Tensor:
        """Codes (B, K, T) of one window of audio (B, 1, samples); behind an item's end they say nothing."""
        latents, _ = self.latents(audio, lengths, pad)
        return self.quantizer.encode(latents)

    def window_decode(self, codes: Tensor, lengths: Tensor | None = None, padding_counts: bool = False) -> Tensor:
        """Audio (B, 1, T · frame) of one window of codes (B, K, T), float32, not limited in range."""
        return self.voice(self.features(self.quantizer.decode(codes), lengths), lengths, padding_counts)

    def code_frames(self, samples: Frames, pad: bool = True) -> Frames:
        """Code frames of so many samples."""
        return -(-samples // self.hop) if pad else samples // self.hop

    def log_mel(self, audio: Tensor, lengths: Tensor | None = None, pad: bool = True) -> tuple[Tensor, Tensor]:
        """(log-mels (B, bands, F), mel frames (B,) of each item) of audio (B, 1, samples), each item with a floor of its own.

        F is what the encoders need: whole code frames, and one token of silence behind unless the window is full. pad: items
        are filled with zeros to whole code frames. Raises InputError if the audio is longer than a window.
        """
        longest = window_codes(self.cfg) * self.hop
        if audio.shape[2] > longest:
            raise InputError(f"{audio.shape[2]} samples are more than a window of {longest}")
        unit = self.hop if pad else WHISPER_HOP
        if lengths is None:
            frames = torch.full((audio.shape[0],), -(-audio.shape[2] // unit) * unit // WHISPER_HOP, device=audio.device)
        else:
            frames = -(-lengths // unit) * unit // WHISPER_HOP
            audio = zero_behind(audio, lengths)
        samples = min(-(-audio.shape[2] // self.hop) * self.hop + STRIDE * WHISPER_HOP, longest)
        with full_precision(audio):
            return whisper_log_mel(audio[:, 0], self.cfg.bands, samples), frames

    def latents(self, audio: Tensor, lengths: Tensor | None = None, pad: bool = True) -> tuple[Tensor, Tensor | None]:
        """The quantizer's input (B, channels, T) of audio (B, 1, samples) of at most a window, T = ⌈samples / hop⌉, and its
        frames of each item (B,); none if all have T."""
        mel, frames = self.log_mel(audio, lengths, pad)
        tokens = -(-audio.shape[2] // self.hop) * self.cfg.pool
        ends = None if lengths is None and pad else frames // STRIDE
        down = self.downsample(self.tokens(mel, ends, tokens))                               # (B, T, channels)
        return down.transpose(1, 2), None if ends is None else ends // self.cfg.pool

    def tokens(self, mel: Tensor, lengths: Tensor | None, tokens: int) -> Tensor:
        """(B, tokens, channels) behind the pre-RVQ adapter, of log-mels (B, bands, F); lengths: (B,) tokens of each item."""
        trained = any(p.requires_grad for p in self.semantic_encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            semantic = self.semantic_encoder(mel, lengths, tokens)
        semantic = self.semantic_encoder_adapter(semantic, lengths)
        acoustic = self.acoustic_encoder(mel, lengths, tokens)
        return self.pre_rvq_adapter(torch.cat([semantic, acoustic], dim=2), lengths)

    def features(self, quantized: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, code_channels, T) behind the post-RVQ adapter, of the quantizer's output (B, C, T)."""
        return self.post_rvq_adapter(quantized.transpose(1, 2), lengths).transpose(1, 2)

    def voice(self, features: Tensor, lengths: Tensor | None = None, padding_counts: bool = False) -> Tensor:
        """Audio (B, 1, T · frame), float32, not limited in range, of features (B, code_channels, T).

        lengths: (B,) frames of each item; behind them the audio is 0. padding_counts: the vocoder takes padding for sound, as in
        the authors' code, which changes the last second of shorter items, and leaves there what comes.
        """
        ends = None if lengths is None else lengths * self.cfg.pool
        frames = self.acoustic_decoder(self.upsample(features.transpose(1, 2)), ends)        # (B, bands, 2 · pool · T)
        return self.vocoder(frames, None if ends is None or padding_counts else STRIDE * ends).float()


def sizes(cfg: StackConfig, positions: int) -> tuple[int, int, int, int, int, str]:
    """Arguments of a stack; `positions` are those that a window needs."""
    return cfg.width, cfg.layers, cfg.heads, cfg.hidden, cfg.positions or positions, cfg.activation


def adapter(width_in: int, cfg: AdapterConfig, positions: int, width_out: int | None = None) -> WhisperAdapter:
    """An adapter of that config."""
    return WhisperAdapter(width_in, width_out or cfg.out or cfg.width, *sizes(cfg, positions))


def build_quantizer(cfg: QuantizerConfig, channels: int) -> MaskedResidualVQ:
    """The quantizer of that config; channels: those that enter it."""
    return MaskedResidualVQ(
        channels, cfg.out or channels, cfg.codebooks, cfg.codebook_size, cfg.width, cfg.decay, cfg.epsilon, cfg.kmeans_iterations,
        cfg.dead_threshold, cfg.released_start, cfg.released_replacement, cfg.commitment, cfg.dropout)
