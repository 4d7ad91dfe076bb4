"""Sound files of any sample rate, number of channels and length for a speech tokenizer, in constant memory."""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.chunks import decode_pieces, encode_pieces
from tokenizers_lab.data.audio import audio_info, read_blocks, write_blocks
from tokenizers_lab.data.resample import resample_blocks, resampled_length
from tokenizers_lab.errors import InputError
from tokenizers_lab.tokenizer import SpeechTokenizer

from .common import decoder_options
from .encoded import Encoded
from .sound_meter import Clock, PairMeter

LOUD = 2.5                   # peaks above 1 are clipped; above this, which neither lossy formats nor resampling make, one is told
FRAMES_AT_ONCE = 1024        # of stored codes that are handed over at a time
CODE_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Sound:
    """A sound file and how it is coded; what decoding must know of it."""

    file: str
    samples: int            # of each channel, in the file
    original_rate: int      # Hz of the file
    sample_rate: int        # Hz that the network hears
    channels: int           # that decoding gives
    each: int               # 1: every channel was coded on its own

    def texts(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {key: str(value) for key, value in asdict(self).items()}

    def length(self, rate: int) -> int:
        """Samples of each channel at a rate in Hz."""
        return resampled_length(self.samples, self.original_rate, rate)

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.samples / self.original_rate

    @property
    def picks(self) -> list[int | None]:
        """The file's channels that are coded in turn; none: all, mixed down."""
        return list(range(self.channels)) if self.each else [None]


def find_sounds(files: Sequence[str], tokenizer: SpeechTokenizer, channels: str) -> list[Sound]:
    """What the headers of the files say, before any of them is worked on.

    channels: "mix" to the tokenizer's, or "each" on its own. Raises DataError on a file that is missing or no sound, InputError
    if the tokenizer takes more than one channel and each shall be coded on its own.
    """
    each = channels == "each"
    if each and tokenizer.channels != 1:
        raise InputError(f"--channels each needs a tokenizer of one channel; this {tokenizer.system} takes {tokenizer.channels}")
    sounds = []
    for file in files:
        info = audio_info(file)
        coded = info.channels if each else tokenizer.channels
        sounds.append(Sound(file, info.samples, info.sample_rate, tokenizer.sample_rate, coded, int(each)))
    return sounds


def bit_rate(tokenizer: SpeechTokenizer) -> float:
    """Nominal bits a second of one stream of codes: every code at log₂ of its codebook's size; 0 where there are none."""
    return tokenizer.sample_rate / tokenizer.hop * sum(math.log2(size) for size in tokenizer.codebook_sizes)


def rate_text(tokenizer: SpeechTokenizer, streams: int) -> str:
    """The bit rate of so many streams of codes, or the rate of frames of latents."""
    if not tokenizer.codebooks:
        return f"{tokenizer.sample_rate / tokenizer.hop * streams:g} frames of latents a second"
    return f"{bit_rate(tokenizer) * streams:,.0f} bit/s"


# --- encode ---------------------------------------------------------------------------------------------------------------

def encode_sound(tokenizer: SpeechTokenizer, sound: Sound, advance: Advance) -> Tensor:
    """Codes (K, T) of a file, or (channels, K, T) of each of its channels, in the smallest integer type that holds them; latents
    likewise, in float32.

    advance is told which share of the file is done. Raises DataError where the file turns out to be damaged.
    """
    largest = max(tokenizer.codebook_sizes, default=0) - 1
    smallest = next(t for t in CODE_TYPES if torch.iinfo(t).max >= largest) if tokenizer.codebooks else torch.float32
    streams = []
    for pick in sound.picks:
        pieces = watched(read_sound(tokenizer, sound, pick), sound.length(tokenizer.sample_rate) * len(sound.picks), advance)
        codes = torch.cat([piece[0].cpu().to(smallest) for piece in encode_pieces(tokenizer, pieces)], dim=-1)
        streams.append(codes)
    return torch.stack(streams) if sound.each else streams[0]


def read_sound(tokenizer: SpeechTokenizer, sound: Sound, pick: int | None) -> Iterator[Tensor]:
    """Pieces (1, channels, n) of a file at the tokenizer's rate, clipped to [-1, 1]. pick: one channel; none: all mixed down."""
    peak = 0.0
    for block in read_blocks(sound.file, tokenizer.sample_rate, tokenizer.channels, pick=pick):
        peak = max(peak, block.abs().max().item())
        yield block.clamp(-1, 1)[None].to(tokenizer.device)
    if peak > LOUD:
        warnings.warn(f"{sound.file}: peaks of {peak:.3g} were clipped to 1; scale it if that is not meant", stacklevel=1)


def watched(pieces: Iterator[Tensor], total: int, advance: Advance) -> Iterator[Tensor]:
    """The pieces; advance is told each one's share of `total` steps."""
    for piece in pieces:
        yield piece
        advance(piece.shape[-1] / total)


# --- decode ---------------------------------------------------------------------------------------------------------------

def read_codes(encoded: Encoded, tokenizer: SpeechTokenizer) -> tuple[Tensor, Sound]:
    """Codes (streams, K, T) int64, or latents (streams, C, T), of a file that `toklab encode` wrote, and the sound they are of.

    Raises InputError.
    """
    name = "codes" if tokenizer.codebooks else "latents"
    file, header, codes = encoded.file, encoded.header, encoded.tensors.get(name)
    if "original_rate" not in header or codes is None:
        raise InputError(f"{file} does not hold {name} of a sound, which this {tokenizer.system} tokenizer decodes")
    numbers = ("samples", "original_rate", "sample_rate", "channels", "each")
    try:
        sound = Sound(header["file"], *(int(header[name]) for name in numbers))
    except (KeyError, ValueError) as error:
        raise InputError(f"{file}: its header is damaged ({error}); encode the sound again") from error
    if tokenizer.codebooks and codes.dtype not in CODE_TYPES:
        raise InputError(f"{file}: codes must be whole numbers (uint8, int16, int32 or int64), not {codes.dtype}")
    streams, made = (sound.channels, sound.channels) if sound.each else (1, tokenizer.channels)
    stacked = codes if sound.each else codes[None]
    numbers_fit = min(sound.samples, sound.original_rate, sound.sample_rate, sound.channels) > 0 and sound.channels == made
    if stacked.dim() != 3 or len(stacked) != streams or not numbers_fit:
        raise InputError(f"{file}: {name} of shape {tuple(codes.shape)} do not fit its header; encode the sound again")
    if tokenizer.codebooks and not 1 <= stacked.shape[1] <= tokenizer.codebooks:
        raise InputError(f"{file}: its codes are of {stacked.shape[1]} codebooks, but the model has {tokenizer.codebooks}")
    frames = tokenizer.frames(sound.length(sound.sample_rate))
    if sound.sample_rate != tokenizer.sample_rate or stacked.shape[2] != frames:
        raise InputError(f"{file}: its {sound.seconds:.2f} s at {sound.sample_rate} Hz have {stacked.shape[2]} frames; the model "
                         f"would have {frames} at {tokenizer.sample_rate} Hz")
    stacked = stacked.long() if tokenizer.codebooks else stacked
    try:
        tokenizer.check_codes(stacked)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return stacked, sound


@dataclass(frozen=True)
class Wav:
    """How sounds are decoded and written."""

    decode: dict[str, Any]      # options of the tokenizer's `decode`
    rate: int                   # Hz of what it gives then
    original_rate: bool         # the WAV has the rate of the file that was encoded, instead
    floats: bool                # 32-bit floats, else 16-bit integers


def wav_options(args: argparse.Namespace, tokenizer: SpeechTokenizer) -> Wav:
    """What --rate, --float, --decoding, --steps, --cfg and --seed say. Raises InputError on what the tokenizer does not have."""
    if args.decoding and args.decoding not in tokenizer.decodings:
        ways = f"it has {', '.join(tokenizer.decodings)}" if tokenizer.decodings else "it has but one"
        raise InputError(f"{args.model} has no way of decoding called '{args.decoding}'; {ways}")
    options = {"decoding": args.decoding} if args.decoding else {}
    rate = tokenizer.output_rate(**options)
    return Wav({**options, **decoder_options(args, tokenizer)}, rate, args.rate == "original", args.float)


def decode_codes(tokenizer: SpeechTokenizer, codes: Tensor, wav: Wav, advance: Advance) -> Iterator[Tensor]:
    """Pieces (channels, n) at `wav.rate` of codes (streams, K, T)."""
    def stored(stream: Tensor) -> Iterator[Tensor]:
        for piece in stream[None].split(FRAMES_AT_ONCE, dim=-1):
            yield piece.to(tokenizer.device)

    pieces = [watched(stored(stream), codes.shape[2] * len(codes), advance) for stream in codes]
    yield from side_by_side([decode_pieces(tokenizer, piece, **wav.decode) for piece in pieces])


def side_by_side(streams: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Pieces (channels, n) on the CPU of streams of pieces (1, channels, n), which come in equal lengths."""
    for parts in zip(*streams, strict=True):
        yield torch.cat([part[0].cpu() for part in parts])


def save_sound(target: Path, pieces: Iterator[Tensor], sound: Sound, wav: Wav) -> None:
    """Write pieces (channels, n) at `wav.rate` as a file of the sound's exact duration."""
    rate = sound.original_rate if wav.original_rate else wav.rate
    blocks = resample_blocks(pieces, wav.rate, rate)
    write_blocks(target, blocks, sound.length(rate), sound.channels, rate, "FLOAT" if wav.floats else "PCM_16")


# --- reconstruct ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Reconstruction:
    """What came out of one file."""

    mel: float                # distance, mean over the channels that were coded on their own
    sisdr: float              # dB, the same
    encode_seconds: float     # of computing
    decode_seconds: float


def reconstruct_sound(
    tokenizer: SpeechTokenizer, sound: Sound, target: Path, wav: Wav, advance: Advance
) -> Reconstruction:
    """Encode and decode a file in one go and write the WAV. advance is told which share of the file is done."""
    clock = Clock(tokenizer.device)
    meters = [PairMeter(tokenizer.sample_rate, wav.rate) for _ in sound.picks]
    total = sound.length(tokenizer.sample_rate) * len(sound.picks)

    def heard(pick: int | None, meter: PairMeter) -> Iterator[Tensor]:
        for piece in watched(read_sound(tokenizer, sound, pick), total, advance):
            meter.push_original(piece[0].cpu())
            yield piece

    def restored(pick: int | None, meter: PairMeter) -> Iterator[Tensor]:
        codes = clock.timed("encode", encode_pieces(tokenizer, clock.timed("read", heard(pick, meter))))
        for piece in clock.timed("decode", decode_pieces(tokenizer, codes, **wav.decode)):
            meter.push_reconstruction(piece[0].cpu())
            yield piece

    pieces = side_by_side([restored(pick, meter) for pick, meter in zip(sound.picks, meters)])
    save_sound(target, pieces, sound, wav)
    values = [meter.result() for meter in meters]
    mel, sisdr = (sum(value[name] for value in values) / len(values) for name in ("mel", "sisdr"))
    spent = clock.seconds
    return Reconstruction(mel, sisdr, spent["encode"] - spent["read"], spent["decode"] - spent["encode"])
