"""Audio of any length to codes and back, in memory that does not grow with the length.

Local networks (`tokenizer.local`: LM-SPT, DM-Codec without LSTMs): the joined pieces are what `encode` and `decode` make of the
whole, the codes equal and the audio within 1e-5. Every layer keeps what its next outputs still need, so that nothing is
computed twice and padding is put only at the true start and end. Sums are in another order: in float32 a code at the border of
two may move (untrained DM-Codec, whose entries lie close: 10 of 26,802; LM-SPT: none seen), in float64 none did.

Other networks: an LSTM of one direction (DM-Codec's decoder) carries its state on, which is as exact. Of an LSTM of both
directions (DM-Codec's encoder) the backward one starts anew at least `context` seconds behind what is given out, in every
layer. After `dm_codec/tiny` was trained to its end, all 12,812 codes of 64 s were equal, with a context of 1 s as with 4 s;
untrained networks that remember longer lose more (`models/dm_codec/model.py`). A tokenizer that does not say how it works in
pieces is run in windows that overlap by `context` seconds on both sides. What fits into one block of `seconds` is computed
whole, and is exact, in any case.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.errors import InputError
from tokenizers_lab.nn.streams import Stream, join, tail
from tokenizers_lab.tokenizer import CONTEXT_SECONDS, SpeechTokenizer


def encode_pieces(
    tokenizer: SpeechTokenizer, pieces: Iterable[Tensor], seconds: float = 10.0, context: float = CONTEXT_SECONDS
) -> Iterator[Tensor]:
    """Codes (B, K, t), one piece after another, of audio (B, channels, n) in pieces of any size at `sample_rate`.

    seconds: audio that is in work at a time. context: see the top of this file. Raises InputError on unusable audio, or none.
    """
    size = max(tokenizer.hop, round(seconds * tokenizer.sample_rate))
    yield from _run(tokenizer.encode_stream(context), _blocks(pieces, size, tokenizer.check_audio, "audio"))


def decode_pieces(
    tokenizer: SpeechTokenizer, pieces: Iterable[Tensor], seconds: float = 10.0, context: float = CONTEXT_SECONDS, **options: Any
) -> Iterator[Tensor]:
    """Audio (B, channels, n), one piece after another, of codes (B, K, t) in pieces of any size.

    options: those of the system's `decode`, such as LM-SPT's `decoding`. Else as `encode_pieces`; a last frame is given whole.
    """
    size = max(1, round(seconds * tokenizer.sample_rate / tokenizer.hop))
    yield from _run(tokenizer.decode_stream(context, **options), _blocks(pieces, size, tokenizer.check_codes, "codes"))


def _run(stream: Stream, blocks: Iterator[tuple[Tensor, bool]]) -> Iterator[Tensor]:
    """What the stream makes of the blocks, without empty pieces."""
    for block, last in blocks:
        with torch.inference_mode():      # not around the yield: the caller's own work is none of ours
            made = stream.finish(block) if last else stream.push(block)
        if made.shape[-1]:
            yield made


def _blocks(
    pieces: Iterable[Tensor], size: int, check: Callable[[Tensor], None], name: str
) -> Iterator[tuple[Tensor, bool]]:
    """(block, whether it is the last) of pieces of any size: all of `size` steps but the last, which has 1 to `size`."""
    kept: Tensor | None = None
    for piece in pieces:
        if piece.dim() == 3 and not piece.shape[-1]:
            continue
        check(piece)
        if kept is not None and piece.shape[:-1] != kept.shape[:-1]:
            raise InputError(f"pieces of {name} must have one shape but for their length, not {tuple(kept.shape)} and "
                             f"{tuple(piece.shape)}")
        kept = join(kept, piece)
        while kept.shape[-1] > size:
            yield kept[..., :size], False
            kept = tail(kept, size)
    if kept is None:
        raise InputError(f"{name}: there is nothing in it")
    yield kept, True
