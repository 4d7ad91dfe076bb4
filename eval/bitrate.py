"""What the codes of a speech tokenizer cost and how well they fill their codebooks, or what its latents cost; how fast it
encodes and decodes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.errors import InputError
from tokenizers_lab.tokenizer import SpeechTokenizer

from .provenance import processor_name

FEW_FRAMES = 10        # frames for each entry of a codebook below which usage and entropy are flagged as too low
SPEED_SECONDS = 10.0   # of sound that encode and decode are timed on
SPEED_REPEATS = 5      # the median counts
NO_CODES = "it gives continuous latents and no codes: usage, bitrate and entropy are of codes"


@dataclass
class CodeTally:
    """How often each code occurs. Whole numbers, so that the order of the clips does not matter."""

    counts: list[Tensor] = field(default_factory=list)     # (entries,) int64 of each codebook
    frames: int = 0
    samples: int = 0                                       # of the clips, at the tokenizer's rate

    def add(self, codes: Tensor, sizes: Sequence[int], samples: int) -> None:
        """codes: (K, frames) of a clip of that many samples. sizes: entries of each codebook; only the first K count."""
        if not self.counts:
            self.counts = [torch.zeros(size, dtype=torch.int64) for size in sizes[: len(codes)]]
        for count, row in zip(self.counts, codes.cpu()):
            count += torch.bincount(row, minlength=len(count))
        self.frames, self.samples = self.frames + codes.shape[1], self.samples + samples

    def merge(self, other: "CodeTally") -> "CodeTally":
        """Both together."""
        if not self.counts or not other.counts:
            return self if self.counts else other
        counts = [one + two for one, two in zip(self.counts, other.counts)]
        return CodeTally(counts, self.frames + other.frames, self.samples + other.samples)


@dataclass
class LatentTally:
    """How many latent vectors there are."""

    channels: int = 0
    frames: int = 0
    samples: int = 0                                       # of the clips, at the tokenizer's rate

    def add(self, latents: Tensor, samples: int) -> None:
        """latents: (C, frames) of a clip of that many samples."""
        self.channels, self.frames, self.samples = len(latents), self.frames + latents.shape[1], self.samples + samples

    def merge(self, other: "LatentTally") -> "LatentTally":
        """Both together."""
        return LatentTally(
            max(self.channels, other.channels), self.frames + other.frames, self.samples + other.samples)


def latent_rates(tally: LatentTally, tokenizer: SpeechTokenizer) -> dict[str, Any]:
    """What the latents of a tokenizer without codes cost, as JSON data.

    floats_per_second: the frame rate times the channels; measured_floats_per_second: of the frames that were made. `no_codes`
    says why there is no bitrate. Raises InputError without latents.
    """
    if not tally.frames:
        raise InputError("the tokenizer gave no latents")
    rate, seconds = tokenizer.sample_rate / tokenizer.hop, tally.samples / tokenizer.sample_rate
    return {
        "kind": "continuous", "channels": tally.channels, "frame_rate": rate, "floats_per_second": rate * tally.channels,
        "measured_floats_per_second": tally.frames * tally.channels / seconds, "frames": tally.frames, "seconds": seconds,
        "no_codes": NO_CODES,
    }


def code_statistics(tally: CodeTally, tokenizer: SpeechTokenizer) -> dict[str, Any]:
    """Bitrate and use of the codebooks, as JSON data.

    bitrate: bit/s, the frame rate times the bits of a frame, Σ log2(entries); measured_bitrate: the same of the frames that were
    made, which a last frame that is not full raises; entropy_bitrate: bit/s that an ideal code of the entries' frequencies, each
    codebook by itself, needs on these data. Each codebook's entropy is that of the frequencies (plug-in), perplexity 2 to it.
    Raises InputError without codes.
    """
    if not tally.counts:
        raise InputError("the tokenizer gave no codes: usage and bitrate are of codes")
    books = [_codebook(counts) for counts in tally.counts]
    sizes = [book["size"] for book in books]
    bits = sum(math.log2(size) for size in sizes)
    rate, seconds = tokenizer.sample_rate / tokenizer.hop, tally.samples / tokenizer.sample_rate
    few = [size for size in sizes if tally.frames < FEW_FRAMES * size]
    return {
        "codebooks": len(books), "sizes": sizes, "frame_rate": rate, "bits_per_frame": bits, "bitrate": rate * bits,
        "frames": tally.frames, "seconds": seconds, "measured_bitrate": tally.frames * bits / seconds,
        "entropy_bitrate": rate * math.fsum(book["entropy_bits"] for book in books),
        "usage": math.fsum(book["usage"] for book in books) / len(books),
        "perplexity": math.fsum(book["perplexity"] for book in books) / len(books),
        "dead": sum(book["dead"] for book in books),
        "per_codebook": books,
        "warnings": [] if not few else [
            f"{tally.frames} frames are few for codebooks of {max(few)} entries: usage, perplexity and entropy are too low, "
            "dead codes too many"],
    }


def _codebook(counts: Tensor) -> dict[str, Any]:
    """Use of one codebook, whose entries occurred that often."""
    total, used = int(counts.sum()), int((counts > 0).sum())
    shares = [count / total for count in counts.tolist() if count]
    entropy = math.fsum(share * math.log2(1 / share) for share in shares)
    return {
        "size": len(counts), "used": used, "usage": used / len(counts), "dead": len(counts) - used,
        "entropy_bits": entropy, "perplexity": 2**entropy,
    }


@torch.inference_mode()
def measure_speed(tokenizer: SpeechTokenizer, audio: Tensor, **options: Any) -> dict[str, Any]:
    """Real-time factors of encode and decode: seconds of computation for each second of sound, below 1 is faster than real time.

    audio: (1, channels, samples) at the tokenizer's rate, cut to 10 s. The median of five runs after one that is not counted,
    with all threads of this process. It depends on the machine, which is named. options: of decode; there is no text.
    """
    audio = audio[..., : round(SPEED_SECONDS * tokenizer.sample_rate)]
    parameter = next(tokenizer.parameters())
    audio = audio.to(parameter.device, parameter.dtype)
    seconds = audio.shape[-1] / tokenizer.sample_rate
    encoding = tokenizer.encode(audio)
    encode = _seconds(lambda: tokenizer.encode(audio), audio.device)
    decode = _seconds(lambda: tokenizer.decode(encoding.code, encoding.lengths, **options), audio.device)
    return {
        "encode_rtf": encode / seconds, "decode_rtf": decode / seconds, "audio_seconds": seconds, "repeats": SPEED_REPEATS,
        "threads": torch.get_num_threads(), "processor": processor_name(audio.device),
    }


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median duration of a call, after one that is not counted."""
    times = []
    for _ in range(SPEED_REPEATS + 1):
        _finish(device)
        begin = time.perf_counter()
        function()
        _finish(device)
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def _finish(device: torch.device) -> None:
    """Wait for what a GPU still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
