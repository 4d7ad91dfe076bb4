"""Decoded blocks become codes or latents, where the network is. A block is computed the same way wherever and whenever it is."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizers_lab.chunks import encode_pieces
from tokenizers_lab.data.audio import read_blocks
from tokenizers_lab.data.buckets import plan_batches
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Raw
from tokenizers_lab.data.tokens import TokenSample
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError, InputError
from tokenizers_lab.tokenizer import ImageTokenizer, SpeechTokenizer
from tokenizers_lab.tokenizing.decoding import Decoded

SMALL_CODES = 1 << 16      # entries of a codebook up to which uint16 holds every code
Values = dict[int, np.ndarray | str]      # by the item's place: its codes or latents, or why there are none


@dataclass(frozen=True)
class Settings:
    """How blocks are run through the network."""

    model: str                 # folder with config.json and model.safetensors
    sha256: str                # of its weights
    dtype: str = "float32"     # of stored latents: float32 or float16
    batch_seconds: float = 120.0      # speech: the clips of a batch × the longest stay within it


@dataclass
class Made:
    """What a block became."""

    shard: int
    number: int
    last: bool
    kind: str                  # codes or latents
    dtype: str                 # that they are stored in
    samples: list[TokenSample] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def load_network(settings: Settings, device: str) -> ImageTokenizer | SpeechTokenizer:
    """The tokenizer. Raises CheckpointError if there are other weights than those that the command was started with."""
    from tokenizers_lab.cli.common import load_tokenizer
    from tokenizers_lab.hub import weights_sha256

    if weights_sha256(Path(settings.model)) != settings.sha256:
        raise CheckpointError(f"the weights in {settings.model} have changed since the run began; restore them")
    return load_tokenizer(settings.model, device)


def encode_block(tokenizer: ImageTokenizer | SpeechTokenizer, block: Decoded, settings: Settings) -> Made:
    """Codes or latents of all samples of a block, in their order; those that the network refuses are listed.

    Raises ConfigError where latents do not fit into float16.
    """
    if isinstance(tokenizer, SpeechTokenizer):
        values = encode_clips(tokenizer, block, settings)
        kind, size = ("codes" if tokenizer.codebooks else "latents"), max(tokenizer.codebook_sizes, default=0)
    else:
        values, kind = encode_pictures(tokenizer, block)
        size = SMALL_CODES + 1      # image tokenizers do not say
    dtype = settings.dtype if kind == "latents" else "uint16" if size <= SMALL_CODES else "int32"
    made = Made(block.shard, block.number, block.last, kind, dtype, bad=list(block.bad))
    for place, item in enumerate(block.items):
        value = values[place]
        if isinstance(value, str):
            made.bad.append(Bad(item.about["key"], value))
        elif kind == "latents" and not np.isfinite(value).all():
            made.bad.append(Bad(item.about["key"], f"{item.about['file']}: its latents hold NaN or infinity"))
        else:
            made.samples.append(TokenSample(kind, stored(value, dtype), item.about))
    return made


def stored(value: np.ndarray, dtype: str) -> np.ndarray:
    """In the type that goes into the shard. Raises ConfigError where latents do not fit into float16."""
    if dtype == "float16" and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
        raise ConfigError("latents above 65,504 do not fit into float16; store them with --dtype float32")
    return np.ascontiguousarray(value, dtype)


# --- images ---------------------------------------------------------------------------------------------------------------

def encode_pictures(tokenizer: ImageTokenizer, block: Decoded) -> tuple[Values, str]:
    """Codes (K, h, w) or latents (C, h, w) of each image, by its place, and which of them these are."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for place, item in enumerate(block.items):
        shapes.setdefault(item.shape, []).append(place)
    values: Values = {}
    if not shapes:      # a shard without images is written all the same, and its kind must be known
        side = int(getattr(tokenizer.cfg, "image_size", 256))
        with torch.inference_mode():
            empty = tokenizer.encode(torch.zeros(1, 3, side, side, device=tokenizer.device))
        return values, "codes" if empty.latents is None else "latents"
    kind = ""
    for places in shapes.values():
        pixels = torch.stack([block.of(block.items[place]) for place in places]).to(tokenizer.device)
        with torch.inference_mode():
            encoding = tokenizer.encode(pixels.float() / 255)
        kind = "codes" if encoding.latents is None else "latents"
        values |= zip(places, encoding.code.cpu().numpy())
    return values, kind


# --- speech ---------------------------------------------------------------------------------------------------------------

def encode_clips(tokenizer: SpeechTokenizer, block: Decoded, settings: Settings) -> Values:
    """Codes (K, T) or latents (C, T) of each clip, by its place: clips of similar length together, long ones piece by piece."""
    values: Values = {}
    short = [place for place, item in enumerate(block.items) if item.long is None]
    seconds = np.array([block.items[place].shape[1] / tokenizer.sample_rate for place in short])
    plan = plan_batches(seconds, settings.batch_seconds, max(1, len(short)))
    for number in range(len(plan)):
        values |= encode_together(tokenizer, block, [short[i] for i in plan.batch(number)])
    for place, item in enumerate(block.items):
        if item.long is not None:
            values[place] = encode_long(tokenizer, item.long)
    return values


def encode_together(tokenizer: SpeechTokenizer, block: Decoded, places: list[int]) -> Values:
    """Clips in one padded batch. Where the network refuses it, such as for a clip that is too short, one by one."""
    clips = [block.of(block.items[place]) for place in places]
    lengths = torch.tensor([clip.shape[1] for clip in clips])
    audio = torch.zeros(len(clips), tokenizer.channels, int(lengths.max()))
    for row, clip in zip(audio, clips):
        row[:, : clip.shape[1]] = clip
    try:
        with torch.inference_mode():
            encoding = tokenizer.encode(audio.to(tokenizer.device), lengths.to(tokenizer.device))
    except InputError as error:
        if len(places) == 1:
            return {places[0]: f"{block.items[places[0]].about['file']}: {error}"}
        found: Values = {}
        for place in places:
            found |= encode_together(tokenizer, block, [place])
        return found
    code: Any = encoding.code.cpu().numpy()
    return {place: row[:, : tokenizer.frames(int(n))] for place, row, n in zip(places, code, lengths)}


def encode_long(tokenizer: SpeechTokenizer, raw: Raw) -> np.ndarray | str:
    """A clip of any length in constant memory but for its codes; or why it cannot be encoded."""
    def pieces() -> Iterator[Tensor]:
        for piece in read_blocks(raw.content, tokenizer.sample_rate, tokenizer.channels, name=raw.name):
            yield piece.clamp(-1, 1)[None].to(tokenizer.device)

    largest = max(tokenizer.codebook_sizes, default=0)
    small = torch.float32 if not tokenizer.codebooks else torch.int32 if largest > 1 << 15 else torch.int16
    try:
        return torch.cat([piece[0].to(small).cpu() for piece in encode_pieces(tokenizer, pieces())], dim=-1).numpy()
    except DataError as error:
        return str(error)
    except InputError as error:
        return f"{raw.name}: {error}"
