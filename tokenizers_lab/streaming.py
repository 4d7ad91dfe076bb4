"""Live audio to codes and back with causal networks (`tokenizer.causal`): pieces of any size in, what is ready out.

The joined outputs are those of `encode` and `decode`, as exact as in `tokenizers_lab.chunks`. The latency is one frame in the
encoder (its codes are there as soon as its last sample is) and none in the decoder: there is no look-ahead. A piece costs what
its own samples cost, however long the stream has run; each layer keeps its last few inputs.
"""

from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.streams import Context
from tokenizers_lab.tokenizer import SpeechTokenizer


class StreamingEncoder:
    """Audio (B, channels, n) at `sample_rate` in, codes (B, K, t) of the frames that are complete out; n and t from 0 on."""

    def __init__(self, tokenizer: SpeechTokenizer):
        """Raises InputError unless the encoder is causal."""
        check_causal(tokenizer.encode_context(), tokenizer, "encoder", "samples", "encode_pieces")
        self.tokenizer, self.stream = tokenizer, tokenizer.encode_stream()
        self.items = 0      # B of what was pushed; 0: nothing yet

    @torch.inference_mode()
    def push(self, audio: Tensor) -> Tensor:
        """The codes of the frames whose last sample is in `audio`. Raises InputError on unusable audio."""
        if audio.dim() == 3 and not audio.shape[-1]:
            return self.codes(audio, len(audio))
        self.tokenizer.check_audio(audio)
        self.items = same_items(self.items, audio)
        return self.codes(self.stream.push(audio), self.items)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The codes of a last frame that is not full, filled with zeros; the next push starts a new recording."""
        items, stream = self.items, self.stream
        self.stream, self.items = self.tokenizer.encode_stream(), 0
        nothing = torch.zeros(max(1, items), self.tokenizer.channels, 0, device=self.tokenizer.device)
        return self.codes(stream.finish(nothing) if items else nothing, max(1, items))

    def codes(self, made: Tensor, items: int) -> Tensor:
        """What the stream gave; in the shape and type of codes where it is nothing."""
        if made.shape[-1]:
            return made
        return torch.zeros(items, self.tokenizer.codebooks, 0, dtype=torch.int64, device=made.device)


class StreamingDecoder:
    """Codes (B, K, t) in, the audio (B, channels, t · samples of a frame) of these frames out, t from 0 on."""

    def __init__(self, tokenizer: SpeechTokenizer, **options: Any):
        """options: those of the system's `decode`, such as LM-SPT's `decoding`. Raises InputError unless it is causal."""
        check_causal(tokenizer.decode_context(**options), tokenizer, "decoder", "frames", "decode_pieces")
        self.tokenizer, self.options = tokenizer, options
        self.stream = tokenizer.decode_stream(**options)
        self.items = 0

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """The audio of these frames. Raises InputError on unusable codes."""
        if codes.dim() == 3 and not codes.shape[-1]:
            return self.audio(codes, len(codes))
        self.tokenizer.check_codes(codes)
        self.items = same_items(self.items, codes)
        return self.audio(self.stream.push(codes), self.items)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """Audio that is left (none, as no frame waits for later ones); the next push starts a new recording."""
        items, stream = self.items, self.stream
        self.stream, self.items = self.tokenizer.decode_stream(**self.options), 0
        nothing = torch.zeros(max(1, items), self.tokenizer.codebooks, 0, dtype=torch.int64, device=self.tokenizer.device)
        return self.audio(stream.finish(nothing) if items else nothing, max(1, items))

    def audio(self, made: Tensor, items: int) -> Tensor:
        """What the stream gave; in the shape and type of audio where it is nothing."""
        return made if made.shape[-1] else torch.zeros(items, self.tokenizer.channels, 0, device=made.device)


def check_causal(context: Context | None, tokenizer: SpeechTokenizer, part: str, unit: str, instead: str) -> None:
    """Raise InputError unless nothing behind a frame is needed."""
    if context is None or context.behind:
        far = "as far as the end" if context is None else f"{context.behind} {unit} ahead"
        raise InputError(f"this {tokenizer.system} cannot stream: its {part} looks {far}; use a causal one, or chunks.{instead}")


def same_items(before: int, piece: Tensor) -> int:
    """B of the piece. Raises InputError if earlier pieces had another."""
    if before and len(piece) != before:
        raise InputError(f"this stream is of {before} recordings at once, not {len(piece)}: flush it first")
    return len(piece)
