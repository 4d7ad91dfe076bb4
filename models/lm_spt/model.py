"""The LM-SPT network (arXiv 2506.16738, sec. III): two encoders, dual residual quantization, two decoders."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.dac import Decoder, Encoder, zero_behind
from tokenizers_lab.nn.norm import scale_weight_norms
from tokenizers_lab.nn.streams import Filled, InTurn, Pointwise, Stream, Together
from tokenizers_lab.quantizers.dual import DualResult, DualRVQ
from tokenizers_lab.tokenizer import CONTEXT_SECONDS, SpeechEncoding, SpeechTokenizer

from .config import DECODINGS, ModelConfig, check_model


@dataclass
class Resynthesis:
    """What the whole network makes of a batch."""

    quantized: DualResult      # latents and codes, with the codebooks' losses
    reconstruction: Tensor     # (B, 1, L') from all codebooks, at the output rate
    resynthesis: Tensor        # (B, 1, L'') from the semantic codebook, at the auxiliary rate


class LMSPT(SpeechTokenizer):
    """Codes (B, K, T) of audio: the semantic codebook first, then the acoustic ones.

    Any first k codebooks can be decoded. `decode` has four ways (`decoding`, by default the config's): `all` codebooks;
    the `semantic` one alone through the main decoder; the semantic one through the `auxiliary` decoder, at its own sample
    rate; the `acoustic` ones without the semantic part.
    """

    system = "lm_spt"
    cfg: ModelConfig

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        check_model(cfg)
        common = (cfg.latent, cfg.kernel, cfg.dilations, cfg.causal)
        self.semantic_encoder = Encoder(cfg.semantic_width, cfg.strides, *common)
        if not cfg.shared_encoder:
            self.acoustic_encoder = Encoder(cfg.acoustic_width, cfg.strides, *common)
        self.quantizer = DualRVQ(
            cfg.latent, cfg.codebooks, cfg.semantic_size, cfg.semantic_dim, cfg.acoustic_size, cfg.acoustic_dim, cfg.subtract,
            cfg.fsq_levels)
        self.decoder = Decoder(cfg.latent, cfg.decoder_width, cfg.decoder_strides, cfg.kernel, cfg.dilations, cfg.causal)
        aux = cfg.auxiliary
        self.aux_decoder = Decoder(cfg.latent, aux.width, aux.strides, aux.kernel, aux.dilations, aux.causal)
        for name, module in self.named_children():
            if name.endswith("_encoder"):
                scale_weight_norms(module, cfg.init_gain)
        self.sample_rate, self.hop = cfg.sample_rate, prod(cfg.strides)
        self.codebooks = cfg.codebooks
        self.decodings = tuple(name for name in DECODINGS if name != cfg.decoding)
        self.codebook_size = max(self.quantizer.semantic_size, cfg.acoustic_size)

    def output_rate(self, decoding: str | None = None) -> int:
        """Sample rate in Hz of what `decode` gives."""
        if (decoding or self.cfg.decoding) == "auxiliary":
            return self.cfg.auxiliary.sample_rate
        return self.cfg.output_sample_rate or self.cfg.sample_rate

    def frame_samples(self, decoding: str | None = None) -> int:
        """Samples that `decode` makes of a frame."""
        return self.hop * self.output_rate(decoding) // self.sample_rate

    @property
    def codebook_sizes(self) -> list[int]:
        """Entries of the semantic codebook, then of each acoustic one."""
        return [self.quantizer.semantic_size] + [self.cfg.acoustic_size] * (self.codebooks - 1)

    def latents(self, audio: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Semantic and acoustic latents (B, latent, T) of audio (B, 1, L), 0 behind `lengths` samples."""
        audio = audio.to(next(self.parameters()).dtype)
        semantic = self.semantic_encoder(audio, lengths)
        return semantic, semantic if self.cfg.shared_encoder else self.acoustic_encoder(audio, lengths)

    def encode(self, audio: Tensor, lengths: Tensor | None = None, pad: bool = True) -> SpeechEncoding:
        """Codes (B, K, T) of audio (B, 1, samples); a last frame that is not full is filled with zeros.

        pad=False leaves the audio as it is, as the authors' code does: samples behind the last whole frame then get no code,
        unless the convolutions are causal. Raises InputError on unusable audio.
        """
        self.check_audio(audio, lengths)
        samples = audio.shape[-1]
        ends = lengths
        if lengths is not None:
            lengths = ends = lengths.to(audio.device)
            audio = zero_behind(audio, lengths)
        if pad:
            audio = F.pad(audio, (0, self.frames(samples) * self.hop - samples))
            ends = None if lengths is None else -(-lengths // self.hop) * self.hop
        frames = None if ends is None else self.semantic_encoder.out_length(ends)
        shortest = self.semantic_encoder.out_length(audio.shape[-1]) if frames is None else int(frames.min())
        if shortest < 1:
            raise InputError(f"audio must be at least {self.hop} samples (one frame) if it is not padded")
        codes = self.quantizer.encode(*self.latents(audio, ends))
        return SpeechEncoding(codes if frames is None else zero_behind(codes, frames), lengths=frames)

    def decode(self, codes: Tensor, lengths: Tensor | None = None, decoding: str | None = None) -> Tensor:
        """Audio (B, 1, T · frame) at `output_rate(decoding)` from codes (B, k, T) of the first k codebooks.

        A decoder with odd strides gives a few samples less than whole frames; they are 0. Raises InputError on codes that are
        out of range and on another `decoding`.
        """
        self.check_codes(codes, lengths)
        quantized = self.quantized(codes, decoding)
        if lengths is not None:
            lengths = lengths.to(codes.device)
            quantized = zero_behind(quantized, lengths)
        audio = self.synthesise(quantized, lengths, decoding)
        return F.pad(audio, (0, codes.shape[2] * self.frame_samples(decoding) - audio.shape[-1]))

    def encode_stream(self, context: float = CONTEXT_SECONDS) -> Stream:
        """See SpeechTokenizer. Exact: the network is local."""
        parts = [self.semantic_encoder.stream()] + ([] if self.cfg.shared_encoder else [self.acoustic_encoder.stream()])
        latents = Together(parts, lambda *found: self.quantizer.encode(found[0], found[-1]))
        dtype = next(self.parameters()).dtype
        return Filled(InTurn([Pointwise(lambda audio: audio.to(dtype)), latents]), step_in=self.hop)

    def decode_stream(self, context: float = CONTEXT_SECONDS, decoding: str | None = None) -> Stream:
        """See SpeechTokenizer. Exact: the network is local. Raises InputError on another `decoding`."""
        self.check_decoding(decoding)
        decoder = self.aux_decoder if (decoding or self.cfg.decoding) == "auxiliary" else self.decoder
        parts = [Pointwise(lambda codes: self.quantized(codes, decoding)), decoder.stream(), Pointwise(Tensor.float)]
        return Filled(InTurn(parts), step_out=self.frame_samples(decoding))

    def quantized(self, codes: Tensor, decoding: str | None = None) -> Tensor:
        """Latents (B, latent, T) that the decoder of that `decoding` is given."""
        self.check_decoding(decoding)
        decoding = decoding or self.cfg.decoding
        if decoding == "acoustic":
            if codes.shape[1] < 2:
                raise InputError("there are no acoustic codes to decode: only the semantic codebook was given")
            return self.quantizer.decode_acoustic(codes)
        return self.quantizer.decode(codes if decoding == "all" else codes[:, :1])

    def synthesise(self, quantized: Tensor, lengths: Tensor | None = None, decoding: str | None = None) -> Tensor:
        """Audio (B, 1, L), as long as the decoder makes it, from latents (B, latent, T); float32."""
        decoder = self.aux_decoder if (decoding or self.cfg.decoding) == "auxiliary" else self.decoder
        return decoder(quantized, lengths).float()

    @torch.inference_mode()
    def reconstruct(self, audio: Tensor, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """decode(encode(audio)) at `output_rate()`, cut to the duration of the input; 0 behind the end of a shorter item.

        options: `decoding`.
        """
        encoding = self.encode(audio, lengths)
        rate = self.output_rate(**options)
        restored = self.decode(encoding.code, encoding.lengths, **options)[..., : audio.shape[-1] * rate // self.sample_rate]
        return restored if lengths is None else zero_behind(restored, lengths * rate // self.sample_rate)

    def forward(self, audio: Tensor, used: Tensor | None = None) -> Resynthesis:
        """The training pass. audio: (B, 1, L), all items whole; used: (B,) acoustic codebooks that count, none: all.

        Both outputs are filled with zeros, or cut, to the input's duration.
        """
        quantized = self.quantizer(*self.latents(audio), used)
        seconds = audio.shape[-1] / self.sample_rate
        made = {}
        for decoding, latents in (("all", quantized.quantized), ("auxiliary", quantized.semantic.quantized)):
            out = self.synthesise(latents, decoding=decoding)
            made[decoding] = F.pad(out, (0, int(seconds * self.output_rate(decoding)) - out.shape[-1]))
        return Resynthesis(quantized, made["all"], made["auxiliary"])

    def check_decoding(self, decoding: str | None) -> None:
        """Raise InputError on an unknown `decoding`."""
        if decoding and decoding not in DECODINGS:
            raise InputError(f"decoding must be one of {', '.join(DECODINGS)}; not '{decoding}'")

    def check_codes(self, codes: Tensor, lengths: Tensor | None = None) -> None:
        """Raise InputError on codes that are not int64 (B, k, T), 1 ≤ k ≤ K, each within its own codebook."""
        super().check_codes(codes, lengths)
        if codes.device.type == "meta" or torch.compiler.is_compiling():
            return
        for name, part, size in (("semantic", codes[:, :1], self.quantizer.semantic_size),
                                 ("acoustic", codes[:, 1:], self.cfg.acoustic_size)):
            if part.numel() and int(part.max()) >= size:
                raise InputError(f"{name} codes must be below {size}, not {int(part.max())}")
