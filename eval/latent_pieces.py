"""The images of a latent cache in pieces: batches inside shards, whoever reads them, and what a tokenizer makes of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.images import FetchedImages, ImageReader, ImageView
from tokenizers_lab.data.latent_manifest import NO_LABEL
from tokenizers_lab.data.listed import validation_batch
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Listing, Raw, Reader
from tokenizers_lab.data.shards import sample_name, shard_samples
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import DataError, InputError
from tokenizers_lab.tokenizer import ImageTokenizer

from .deterministic import exact_convolutions, map_in_order
from .latents import as_map

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Wanted:
    """Which shards a process makes."""

    rank: int
    world: int
    there: frozenset[int]      # that are finished

    def __contains__(self, shard: int) -> bool:
        return shard % self.world == self.rank and shard not in self.there


@dataclass(frozen=True)
class Storing:
    """What is stored of an image. sample: one draw in place of the posterior's mode, by `seed` and the image's key."""

    flips: bool = False
    moments: bool = False
    sample: bool = False
    seed: int = 0
    dtype: str = "float32"


@dataclass
class Piece:
    """A batch of a shard, encoded; on the CPU."""

    shard: int
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)      # (n, C, h, w), as they are stored
    sums: np.ndarray | None = None                                # (n, C) float64: the mode's over an image's positions
    squares: np.ndarray | None = None                             # (n, C) float64
    bad: list[Bad] = field(default_factory=list)
    end: bool = False                                             # nothing: `shard` is the number of shards that there are


# --- reading ------------------------------------------------------------------------------------------------------------

class CacheReader(ImageReader):
    """Reads images of which some may have no class: their label is NO_LABEL."""

    def assemble(self, views: Sequence[ImageView], keys: list[str]) -> FetchedImages:
        """A batch of views of one size."""
        fetched = super().assemble(views, keys)
        fetched.labels = torch.tensor([NO_LABEL if view.label is None else view.label for view in views])
        return fetched


class ListedPieces(Dataset):
    """The pieces of wanted shards of a listing: `order` names its samples, shard_size of them a shard."""

    def __init__(self, listing: Listing, order: list[int], reader: Reader, batch_size: int, shard_size: int, wanted: Wanted):
        self.listing, self.order, self.reader = listing, order, reader
        self.shards = -(-len(order) // shard_size)
        self.spans = [
            (shard, first, min(first + batch_size, end))
            for shard in range(self.shards) if shard in wanted
            for end in [min((shard + 1) * shard_size, len(order))]
            for first in range(shard * shard_size, end, batch_size)
        ]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Fetched:
        shard, first, end = self.spans[number]
        fetched = validation_batch(self.reader, map(self.listing.raw, self.order[first:end]), skip=True)
        fetched.stream = shard
        return fetched


class StreamedPieces(IterableDataset):
    """The pieces of wanted shards of webdataset shards, whose number of samples nobody knows beforehand.

    Every worker of every process reads the whole stream, and decodes only its pieces. The last one is empty, has a `position`,
    and its `stream` is the number of shards.
    """

    def __init__(
        self, urls: tuple[str, ...], limit: int | None, reader: Reader, batch_size: int, shard_size: int, wanted: Wanted
    ):
        self.urls, self.limit, self.reader, self.batch_size = urls, limit, reader, batch_size
        self.shard_size, self.wanted = shard_size, wanted

    def __iter__(self) -> Iterator[Fetched]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples = islice(((url, s) for url in self.urls for s in shard_samples(url, parts=self.reader.parts)), self.limit)
        shard = number = 0
        try:
            while (first := next(samples, None)) is not None:
                rest = chain([first], islice(samples, self.shard_size - 1))
                if shard in self.wanted:
                    while part := list(islice(rest, self.batch_size)):
                        if number % workers == worker:      # DataLoader takes from its workers in turn
                            yield self._piece(shard, part)
                        number += 1
                else:
                    for _ in rest:
                        pass
                shard += 1
            yield Fetched(stream=shard, position=[shard])
        except DataError as error:
            yield Fetched(error=str(error))

    def _piece(self, shard: int, part: list[tuple[str, dict[str, Any]]]) -> Fetched:
        raws, bad = list[Raw](), list[Bad]()
        for url, sample in part:
            name = sample_name(url, sample)
            try:
                raws.append(self.reader.from_shard(sample, name))
            except DataError as error:
                bad.append(Bad(name, str(error)))
        fetched = validation_batch(self.reader, raws, skip=True)
        fetched.stream, fetched.bad = shard, bad + fetched.bad
        return fetched


# --- encoding -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def probe(tokenizer: ImageTokenizer, size: int, storing: Storing) -> tuple[int, int, int]:
    """(C, h, w) of an image's latents. Raises InputError if the size does not suit the tokenizer, or it has no continuous
    latents, or no posterior that is to be stored or drawn from."""
    grey = torch.full((1, 3, size, size), 0.5, device=tokenizer.device, dtype=next(tokenizer.parameters()).dtype)
    mode, deviation = mode_and_spread(tokenizer, grey)
    if deviation is None and (storing.moments or storing.sample):
        raise InputError(f"this {tokenizer.system} tokenizer has no posterior: its latents are always the same; leave out "
                         f"{'--moments' if storing.moments else '--sample'}")
    channels, height, width = mode.shape[1:]
    return channels, height, width


def encode_pieces(
    tokenizer: ImageTokenizer, pieces: Iterable[Fetched], storing: Storing, count: Callable[[int, list[Bad]], None]
) -> Iterator[Piece]:
    """Each piece encoded, in order. count: told how many images of a piece were readable, and which were not; may raise.

    Raises DataError of a stream that breaks, InputError where latents are not finite.
    """
    @torch.inference_mode()      # thread-local: it must be entered where the work is done
    def one(fetched: Fetched) -> Piece:
        return _encode(tokenizer, fetched, storing)

    def read() -> Iterator[Fetched]:
        for fetched in pieces:
            if fetched.error:
                raise DataError(fetched.error)
            count(len(fetched.keys), fetched.bad)
            yield fetched

    with exact_convolutions():
        yield from map_in_order(one, read()) if tokenizer.device.type == "cpu" else map(one, read())


def mode_and_spread(tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """The latents (B, C, h, w) that `encode` gives, and their standard deviation under the posterior, where there is one."""
    encoding = tokenizer.encode(images)
    if encoding.latents is None:
        raise InputError(f"this {tokenizer.system} tokenizer gives codes only: there are no continuous latents to store")
    logvar, std = getattr(encoding.posterior, "logvar", None), getattr(encoding.posterior, "std", None)
    if not isinstance(logvar, Tensor) or not isinstance(std, Tensor):
        return encoding.latents.float(), None
    scale = getattr(tokenizer, "latent_std", None)      # the posterior is of latents before they are normalised
    deviation = as_map(std, encoding.latents)
    if isinstance(scale, Tensor):
        deviation = deviation / scale.reshape(1, -1, 1, 1)
    return encoding.latents.float(), deviation.float()


def _encode(tokenizer: ImageTokenizer, fetched: Fetched, storing: Storing) -> Piece:
    if not fetched.keys:
        return Piece(fetched.stream, bad=fetched.bad, end=fetched.position is not None)
    batch: ImageBatch = fetched.batch()
    images = batch.images.to(tokenizer.device, next(tokenizer.parameters()).dtype)
    tensors: dict[str, Tensor] = {}
    sums = squares = None
    for ending in ("", "_flip") if storing.flips else ("",):
        mode, deviation = mode_and_spread(tokenizer, images.flip(3) if ending else images)
        mode, deviation = mode.cpu(), None if deviation is None else deviation.cpu()
        finite = torch.isfinite(mode).flatten(1).all(1)
        if not finite.all():
            bad = batch.keys[int((~finite).nonzero()[0])]
            raise InputError(f"the latents of {bad} are not finite: the model's weights or its precision are broken")
        if not ending:
            values = mode.double().numpy()
            sums, squares = values.sum((2, 3)), np.square(values).sum((2, 3))
        if storing.sample and deviation is not None:
            mode = mode + deviation * torch.stack([_noise(storing.seed, key + ending, mode.shape[1:]) for key in batch.keys])
        tensors[f"latents{ending}"] = _stored(mode, storing.dtype, batch.keys)
        if storing.moments and deviation is not None:
            tensors[f"spread{ending}"] = _stored(deviation, storing.dtype, batch.keys)
    assert batch.labels is not None      # CacheReader gives them
    return Piece(fetched.stream, batch.keys, batch.labels.tolist(), tensors, sums, squares, fetched.bad)


def _noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    """N(0, 1) of an image alone, whatever is beside it in its batch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(stable_seed(seed, "latents", name)))


def _stored(values: Tensor, dtype: str, keys: list[str]) -> Tensor:
    """In the type of the cache, in order in memory. Raises InputError on numbers beyond float16's."""
    stored = values.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(stored).all():
        raise InputError(f"latents of {keys[0]} or those beside it are too large for {dtype}: use --dtype bfloat16 or float32")
    return stored
