"""Blocks of samples become pixels and sound, in decoding processes: no network is needed here."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenizers_lab.cli.pictures import fit_picture
from tokenizers_lab.data.audio import open_audio, to_channels
from tokenizers_lab.data.decode import read_image
from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Raw
from tokenizers_lab.data.resample import resample
from tokenizers_lab.errors import DataError
from tokenizers_lab.tokenizing.plan import Block


@dataclass(frozen=True)
class View:
    """What the network is shown of a sample."""

    speech: bool
    downsample: int = 1              # images: their sides are multiples of it
    size: int | None = None          # images: pixels a side of the centre crop; none: whole, padded by reflection
    sample_rate: int = 0             # speech: Hz
    channels: int = 1                # speech
    window: float = 0.0              # speech: clips of more seconds are read piece by piece, where the network is


@dataclass
class Item:
    """A decoded sample. Its values stand in the block's; a long clip has none."""

    about: dict[str, Any]
    shape: tuple[int, ...] = ()
    start: int = 0                   # of its values in those of the block
    long: Raw | None = None


@dataclass
class Decoded(Fetched):
    """A block whose samples are decoded: their values one behind another, which crosses processes as one piece."""

    shard: int = 0
    number: int = 0
    last: bool = False
    items: list[Item] = field(default_factory=list)
    values: Tensor = field(default_factory=lambda: torch.empty(0))      # uint8 pixels, or float32 samples in [-1, 1]

    def of(self, item: Item) -> Tensor:
        """An item's own: uint8 (3, H, W), or float32 (channels, samples)."""
        size = 1
        for n in item.shape:
            size *= n
        return self.values[item.start : item.start + size].view(item.shape)


class Decoder(Dataset):
    """Item: of a block. Decodes it."""

    def __init__(self, view: View):
        self.view = view

    def __getitem__(self, block: Block) -> Decoded:
        return decode_block(block, self.view)


def decode_block(block: Block, view: View) -> Decoded:
    """Decode all samples of a block; those that cannot be are listed."""
    decoded = Decoded(bad=list(block.bad), shard=block.shard, number=block.number, last=block.last)
    pieces, start = [], 0
    for raw in block.raws:
        about = {"key": raw.key, "file": raw.key if raw.content.__class__ is not bytes else raw.name, **raw.about}
        try:
            value, said = (decode_clip if view.speech else decode_picture)(raw, view)
        except DataError as error:
            decoded.bad.append(Bad(raw.key, str(error)))
            continue
        about |= said
        if value is None:
            decoded.items.append(Item(about, long=raw))
            continue
        decoded.items.append(Item(about, tuple(value.shape), start))
        pieces.append(value.reshape(-1))
        start += value.numel()
    if pieces:
        decoded.values = torch.cat(pieces)
    return decoded


def decode_picture(raw: Raw, view: View) -> tuple[Tensor, dict[str, Any]]:
    """Pixels uint8 (3, H, W) of an image and its geometry. Raises DataError."""
    pixels, geometry = fit_picture(read_image(raw.content, name=raw.name), view.downsample, view.size)
    return pixels[0], dict(vars(geometry))


def decode_clip(raw: Raw, view: View) -> tuple[Tensor | None, dict[str, Any]]:
    """Audio (channels, samples) in [-1, 1] of a clip, none of a long one, and what is to be known of it. Raises DataError."""
    with open_audio(raw.content, raw.name) as file:
        said = {
            "seconds": file.info.seconds, "samples": file.info.samples, "original_rate": file.info.sample_rate,
            "sample_rate": view.sample_rate, "channels": view.channels, "each": 0}
        if file.info.seconds > view.window:
            return None, said
        audio = to_channels(file.read(), view.channels, raw.name)
        return resample(audio, file.info.sample_rate, view.sample_rate).clamp(-1, 1), said
