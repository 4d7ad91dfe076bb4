"""Base classes of all tokenizers: encode and decode."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.errors import CheckpointError, InputError
from tokenizers_lab.network import Network
from tokenizers_lab.nn.fold import fold_weight_norms
from tokenizers_lab.nn.streams import Context, Stream, WindowStream, context_of

CONTEXT_SECONDS = 2.0      # that windows of a network that is not local overlap, where nothing else is asked for


@dataclass
class ImageEncoding:
    """Result of `ImageTokenizer.encode`: continuous `latents`, or discrete `codes`, or both."""

    latents: Tensor | None = None     # (B, C, h, w), normalised by the saved statistics
    codes: Tensor | None = None       # (B, K, h, w) int64
    posterior: Any = None             # distribution over un-normalised latents, where the system has one

    @property
    def code(self) -> Tensor:
        """What `decode` takes: the latents, or the codes where there are no latents."""
        code = self.codes if self.latents is None else self.latents
        assert code is not None
        return code


@dataclass
class SpeechEncoding:
    """Result of `SpeechTokenizer.encode`. Item i has `lengths[i]` frames; behind them codes and latents are 0."""

    codes: Tensor | None = None       # (B, K, T) int64
    latents: Tensor | None = None     # (B, C, T)
    lengths: Tensor | None = None     # (B,) int64, frames of each item; none: all T

    @property
    def code(self) -> Tensor:
        """What `decode` takes: the codes, or the latents where there are no codes."""
        code = self.latents if self.codes is None else self.codes
        assert code is not None
        return code


@dataclass
class SpeechPrompt:
    """Speech of the voice that a text-aware decoder shall go on in: one clip for the whole batch, or one an item."""

    audio: Tensor                              # (1 or B, channels, samples) in [−1, 1] at the tokenizer's rate
    texts: list[str | None] | None = None      # what is said in it, (1 or B); none: not known


class Tokenizer(Network):
    """A network that encodes and decodes."""

    decode_options: tuple[str, ...] = ()       # further keywords that its `decode` takes, such as steps of a diffusion decoder


class ImageTokenizer(Tokenizer):
    """Images enter and leave as float (B, 3, H, W) in [0, 1]; each system normalises inside."""

    downsample: int                   # pixels a side of one latent position
    latent_mean: Tensor               # (C,) by which continuous latents are normalised; a system adds both by
    latent_std: Tensor                # `add_latent_statistics`, if it has any

    def add_latent_statistics(self, channels: int) -> None:
        """Buffers `latent_mean` and `latent_std`: 0 and 1 until they are collected."""
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Normalise latents by these: (C,) each, of the un-normalised latents or posterior means. Raises InputError unless
        std > 0, and of a tokenizer without continuous latents."""
        wanted = getattr(self, "latent_mean", None)
        if wanted is None:
            raise InputError(f"this {self.system} tokenizer has no continuous latents to normalise")
        if mean.shape != wanted.shape or std.shape != wanted.shape or not bool((std > 0).all()):      # also for NaN
            raise InputError(f"latent statistics must be two vectors of {len(wanted)} numbers, the second above 0")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> ImageEncoding:
        """Latents or codes of the images. Deterministic unless `sample` asks for a draw from the posterior."""
        raise NotImplementedError

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from what `encode` gave; stochastic decoders draw from `generator`, or, without one,
        always start from the same noise."""
        raise NotImplementedError

    @torch.inference_mode()
    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """decode(encode(images)) in eval mode. options: of `decode`, see `decode_options`."""
        return self.decode(self.encode(images, generator=generator).code, generator=generator, **options)

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless images are finite floats (B, 3, H, W) in [0, 1], H and W multiples of `downsample`."""
        if not torch.is_floating_point(images) or images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise InputError(f"images must be float (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        if images.shape[2] % self.downsample or images.shape[3] % self.downsample:
            size = tuple(images.shape[2:])
            raise InputError(f"height and width must be multiples of {self.downsample}, not {size}: crop or pad first")
        if images.device.type == "meta" or torch.compiler.is_compiling():
            return
        low, high = images.aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):      # also false for NaN
            raise InputError(f"images must be finite and in [0, 1], not in [{low:.3g}, {high:.3g}]")


class SpeechTokenizer(Tokenizer):
    """Audio enters and leaves as float (B, channels, samples) in [−1, 1] at `sample_rate`; each system normalises inside.

    In a padded batch `lengths` says where each item ends: it is then encoded and decoded as if it were alone.
    """

    sample_rate: int                  # Hz
    hop: int                          # samples of one code frame
    codebooks: int                    # K codes of a frame
    codebook_size: int                # entries of a codebook
    channels: int = 1                 # audio channels that the network takes
    fused: bool = False               # whether its weight norms are folded, see `fuse`
    decodings: tuple[str, ...] = ()   # further ways to decode, where there are: values of `decode`'s argument `decoding`
    takes_texts: bool = False         # whether `decode` takes what is said: texts, one or None for each item

    def output_rate(self, decoding: str | None = None) -> int:
        """Sample rate in Hz of what `decode` gives."""
        return self.sample_rate

    def encode(self, audio: Tensor, lengths: Tensor | None = None) -> SpeechEncoding:
        """Codes (B, K, T) of audio (B, channels, samples). lengths: (B,) samples of each item; none: all of them."""
        raise NotImplementedError

    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Audio (B, channels, T · hop) from codes (B, K, T). lengths: (B,) frames of each item; behind them the audio is 0."""
        raise NotImplementedError

    @torch.inference_mode()
    def reconstruct(self, audio: Tensor, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """decode(encode(audio)), cut to the samples of the input; 0 behind the end of a shorter item. options: of `decode`."""
        encoding = self.encode(audio, lengths)
        restored = self.decode(encoding.code, encoding.lengths, **options)[..., : audio.shape[-1]]
        if lengths is not None:
            position = torch.arange(restored.shape[-1], device=restored.device)
            restored = restored * (position < lengths.to(restored.device)[:, None, None])
        return restored

    @property
    def codebook_sizes(self) -> list[int]:
        """Entries of each of the K codebooks."""
        return [self.codebook_size] * self.codebooks

    def code_vectors(self, codes: Tensor) -> Tensor:
        """The quantized vectors (B, D, T) that codes (B, K, T) stand for. Raises InputError of a tokenizer that keeps none."""
        quantizer: Any = getattr(self, "quantizer", None)
        if not hasattr(quantizer, "decode"):
            raise InputError(f"a {self.system} tokenizer does not show the vectors of its codes")
        return quantizer.decode(codes)

    def encode_stream(self, context: float = CONTEXT_SECONDS) -> Stream:
        """`encode` in pieces, from audio (B, channels, n) to codes; `tokenizers_lab.chunks` and `.streaming` use it.

        Joined, the codes are those of `encode` if the network is local. Here nothing is known of the network: windows that
        overlap by `context` seconds on both sides are encoded. A system whose layers have streams overrides it.
        """
        return WindowStream(lambda audio: self.encode(audio).code, self.hop, 1, self._frames_of(context))

    def decode_stream(self, context: float = CONTEXT_SECONDS) -> Stream:
        """`decode` in pieces, from codes (B, K, n) to audio; as `encode_stream`. A system's takes the options of its `decode`."""
        return WindowStream(self.decode, 1, self.frame_samples(), self._frames_of(context))

    def frame_samples(self) -> int:
        """Samples that `decode` makes of a frame."""
        return self.hop

    def encode_context(self) -> Context | None:
        """Samples before a frame's first and behind its last that its codes depend on; none: there is no bound."""
        return context_of(self.encode_stream(), self.hop, 1)

    def decode_context(self, **options: Any) -> Context | None:
        """Frames before and behind a frame that its audio depends on; none: there is no bound. options: of `decode`."""
        return context_of(self.decode_stream(**options), 1, self.frame_samples(**options))

    @property
    def local(self) -> bool:
        """Whether every frame, and its audio, depends on a bounded stretch only, so that pieces give the same as the whole."""
        return self.encode_context() is not None and self.decode_context() is not None

    @property
    def causal(self) -> bool:
        """Whether no frame depends on later audio, and no audio on later frames (a network that is not local counts as no)."""
        contexts = (self.encode_context(), self.decode_context())
        return all(context is not None and context.behind == 0 for context in contexts)

    def fuse(self) -> "SpeechTokenizer":
        """Fold the weight norms, in place, for inference; returns itself. It can then be neither saved nor trained further."""
        fold_weight_norms(self)
        self.fused = True
        return self.requires_grad_(False)

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> Path:
        """See Network. Raises CheckpointError if it is fused."""
        if self.fused:
            raise CheckpointError("a fused tokenizer has other keys than a saved one: save it before fuse(), or load it again")
        return super().save_pretrained(folder, card)

    def _frames_of(self, seconds: float) -> int:
        """Whole frames in that many seconds, at least 1."""
        return max(1, round(seconds * self.sample_rate / self.hop))

    def frames(self, samples: int) -> int:
        """Code frames of that many samples: rounded up."""
        return -(-samples // self.hop)

    def check_audio(self, audio: Tensor, lengths: Tensor | None = None) -> None:
        """Raise InputError unless audio is finite float (B, channels, samples) in [−1, 1], not empty, and lengths fit it."""
        if not torch.is_floating_point(audio) or audio.dim() != 3 or audio.shape[1] != self.channels:
            raise InputError(f"audio must be float (B, {self.channels}, samples), not {audio.dtype} {tuple(audio.shape)}")
        if 0 in audio.shape:
            raise InputError(f"audio is empty: {tuple(audio.shape)}")
        check_lengths(lengths, audio.shape[0], audio.shape[2], "samples")      # len() would fix it in an export
        if audio.device.type == "meta" or torch.compiler.is_compiling():
            return
        low, high = audio.aminmax()
        if not (low >= -1 - 1e-3 and high <= 1 + 1e-3):      # also false for NaN
            raise InputError(f"audio must be finite and in [-1, 1], not in [{low:.3g}, {high:.3g}]: scale or clamp it first")

    def check_codes(self, codes: Tensor, lengths: Tensor | None = None) -> None:
        """Raise InputError unless codes are int64 (B, at most K, T) in [0, codebook_size), not empty, and lengths fit them."""
        wanted = f"int64 (B, 1 to {self.codebooks}, T)"
        if codes.dtype != torch.int64 or codes.dim() != 3 or not 1 <= codes.shape[1] <= self.codebooks or 0 in codes.shape:
            raise InputError(f"codes must be {wanted}, not {codes.dtype} {tuple(codes.shape)}")
        check_lengths(lengths, codes.shape[0], codes.shape[2], "frames")
        if codes.device.type == "meta" or torch.compiler.is_compiling():
            return
        low, high = codes.aminmax()
        if low < 0 or high >= self.codebook_size:
            raise InputError(f"codes must be in [0, {self.codebook_size}), not in [{low}, {high}]")


def check_lengths(lengths: Tensor | None, items: int, longest: int, unit: str) -> None:
    """Raise InputError unless lengths is none or an integer (items,) in [1, longest]."""
    if lengths is None:
        return
    if lengths.is_floating_point() or lengths.dtype == torch.bool or tuple(lengths.shape) != (items,):
        raise InputError(f"lengths must be integers ({items},), not {lengths.dtype} {tuple(lengths.shape)}")
    if not lengths.is_meta and (int(lengths.min()) < 1 or int(lengths.max()) > longest):
        raise InputError(f"lengths must be 1 to {longest} {unit}, not {int(lengths.min())} to {int(lengths.max())}")


def equal_lengths(lengths: Tensor | None, longest: int, items: int) -> Iterator[tuple[Tensor | slice, int]]:
    """(which items, their length) for each different length of a padded batch, for networks in which nothing is local.

    Everything at once without lengths.
    """
    if lengths is None:
        yield slice(None), longest
        return
    for length in lengths.unique().tolist():
        yield (lengths == length).nonzero().flatten(), length
