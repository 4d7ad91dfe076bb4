"""The DM-Codec tokenizer (arXiv 2410.15017): SEANet encoder, residual VQ, SEANet decoder."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.nn.norm import scale_weight_norms
from tokenizers_lab.nn.seanet import SEANetDecoder, SEANetEncoder
from tokenizers_lab.nn.streams import InTurn, Pointwise, Stream
from tokenizers_lab.quantizers.residual import ResidualVQ
from tokenizers_lab.tokenizer import CONTEXT_SECONDS, SpeechEncoding, SpeechTokenizer, equal_lengths

from .config import ModelConfig, check_model


class DMCodec(SpeechTokenizer):
    """DM-Codec: mono audio (B, 1, samples) in [−1, 1] to codes (B, 8, frames), 50 frames a second in the release, and back.

    Its encoder's LSTM runs over the whole clip in both directions, so that it is not local, and its padding reflects the clip's
    ends: items of a padded batch are computed in groups of equal length.
    """

    system = "dm_codec"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        self.sample_rate, self.hop = cfg.sample_rate, prod(cfg.strides)
        self.codebooks, self.codebook_size = cfg.codebooks, cfg.codebook_size
        shared: dict[str, Any] = {
            "filters": cfg.filters, "strides": cfg.strides, "residual_layers": cfg.residual_layers,
            "residual_kernel": cfg.residual_kernel, "dilation_base": cfg.dilation_base, "lstm_layers": cfg.lstm_layers,
            "activation": cfg.activation,
        }
        self.encoder = SEANetEncoder(cfg.width, bidirectional=cfg.bidirectional, **shared)
        self.quantizer = ResidualVQ(
            cfg.codebooks, cfg.codebook_size, cfg.width, cfg.decay, kmeans_iterations=cfg.kmeans_iterations,
            dead_threshold=cfg.dead_threshold, released_start=cfg.released_start,
        )
        self.decoder = SEANetDecoder(cfg.width, **shared)
        scale_weight_norms(self, cfg.init_gain)

    def encode(self, audio: Tensor, lengths: Tensor | None = None, codebooks: int | None = None) -> SpeechEncoding:
        """Codes (B, K, T), T = ⌈samples / hop⌉. codebooks: only the first so many. Raises InputError on unusable audio.

        lengths: (B,) samples of each item in a padded batch. Without it padding counts as sound and changes the codes of its
        clip, as in the authors' code.
        """
        self.check_audio(audio, lengths)
        codes = self.analyse(audio, lengths, codebooks)
        return SpeechEncoding(codes=codes, lengths=None if lengths is None else -(-lengths // self.hop))

    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio (B, 1, T · hop) in [−1, 1] from codes (B, K, T), K at most `codebooks`. Raises InputError on unusable codes."""
        self.check_codes(codes, lengths)
        return self.synthesise(codes, lengths).clamp(-1, 1)

    def analyse(self, audio: Tensor, lengths: Tensor | None = None, codebooks: int | None = None) -> Tensor:
        """The codes of `encode`, of audio in any range."""
        books = codebooks or self.codebooks
        codes = torch.zeros(audio.shape[0], books, self.frames(audio.shape[2]), dtype=torch.int64, device=audio.device)
        for items, samples in equal_lengths(lengths, audio.shape[2], audio.shape[0]):
            found = self.quantizer.encode(self.encoder(audio[items, :, :samples].to(self.dtype)), last=books)
            codes[items, :, : found.shape[2]] = found
        return codes

    def synthesise(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The audio of `decode`, not limited in range."""
        audio = torch.zeros(codes.shape[0], 1, codes.shape[2] * self.hop, device=codes.device)
        for items, frames in equal_lengths(lengths, codes.shape[2], codes.shape[0]):
            made = self.decoder(self.quantizer.decode(codes[items, :, :frames]))
            audio[items, :, : made.shape[2]] = made.float()
        return audio

    def encode_stream(self, context: float = CONTEXT_SECONDS) -> Stream:
        """See SpeechTokenizer. Exact but for the LSTM's backward direction, which starts anew at least `context` seconds behind a
        frame, in each layer; all that came before a frame counts.

        The difference falls with the context as fast as the LSTM forgets. Measured on a small network of two layers with weights
        as drawn, 20 s of speech in blocks of 3 s: every code is equal from 0.5 s of context on. With 1 added to the bias of the
        forget gates 91 % of the codes are at 0.5 s, 99.9 % at 1 s and all at 2 s; with 2 added, 37 % at 2 s and 89 % at 4 s.
        """
        ahead = max(1, round(context * self.sample_rate / self.hop))
        return InTurn([
            Pointwise(lambda audio: audio.to(self.dtype)), self.encoder.stream(ahead), Pointwise(self.quantizer.encode)])

    def decode_stream(self, context: float = CONTEXT_SECONDS) -> Stream:
        """See SpeechTokenizer. Exact with an LSTM too, since it has one direction: its state is carried on."""
        return InTurn([
            Pointwise(self.quantizer.decode), self.decoder.stream(), Pointwise(lambda audio: audio.float().clamp(-1, 1))])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype
