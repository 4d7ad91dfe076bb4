"""The streaming pass of the harness: originals and reconstructions of this process, measured pair by pair.

On the CPU each group of images is the work of one thread, several at once, so that no bit depends on the number of threads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.errors import InputError
from tokenizers_lab.tokenizer import ImageEncoding

from .candidates import Candidate, Reconstruction
from .deterministic import exact_convolutions, map_in_order
from .image_metrics import PairMetric
from .provenance import pixels_sha256

Record = tuple[str, str, list[list[float]]]     # key, SHA-256 of the original's pixels, values[candidate][metric]
Observe = Callable[[Candidate, Tensor, Tensor, Sequence[str]], None]
CHUNK_IMAGES, CHUNK_PIXELS = 64, 2**21          # images that are in memory at a time, with all their reconstructions


@dataclass
class Measured:
    """What is known of this process's images."""

    records: list[Record] = field(default_factory=list)
    size: tuple[int, ...] | None = None                          # (height, width)
    originals_converted: dict[str, str] = field(default_factory=dict)         # key -> what it was stored as, if not 8-bit RGB
    reconstructions_converted: dict[str, str] = field(default_factory=dict)   # the same of the first candidate's files


@dataclass
class Group:
    """Images of one forward and what became of them."""

    keys: list[str]
    original: Tensor                              # (B, 3, H, W) as measured
    outputs: list[Tensor]                         # each candidate's, as measured
    records: list[Record]
    first: Reconstruction                         # the first candidate's


def measure(
    candidates: Sequence[Candidate],
    metrics: Sequence[PairMetric],
    batches: Iterable[ImageBatch],
    forward_batch: int,
    round_uint8: bool,
    observe: Observe | None = None,
    observe_encoding: Callable[[ImageEncoding, Tensor], None] | None = None,
) -> Measured:
    """Every image's values. `observe` is called for each candidate, `observe_encoding` for the first, in order, here.

    Raises InputError on images of several sizes and on reconstructions of another shape or that are not finite.
    """
    device = candidates[0].device
    found = Measured()

    @torch.inference_mode()      # thread-local: it must be entered where the work is done
    def one(group: tuple[list[str], Tensor]) -> Group:
        return _measure_group(candidates, metrics, group[0], group[1].to(device), round_uint8)

    for chunk in _chunks(_rebatch(_noted(batches, found), forward_batch)):
        for _, images in chunk:
            size = tuple(images.shape[2:])
            if found.size not in (None, size):
                raise InputError(f"images of {size} after images of {found.size}: evaluate each size by itself")
            found.size = size
        # a whole chunk, so that observers have all threads for their own networks
        with exact_convolutions():
            groups = list(map_in_order(one, chunk) if device.type == "cpu" else map(one, chunk))
        for group in groups:
            found.records += group.records
            found.reconstructions_converted.update(group.first.converted)
            for candidate, output in zip(candidates, group.outputs):
                if observe is not None:
                    observe(candidate, group.original, output, group.keys)
            if observe_encoding is not None and group.first.encoding is not None:
                observe_encoding(group.first.encoding, group.original)
    return found


def _measure_group(
    candidates: Sequence[Candidate], metrics: Sequence[PairMetric], keys: list[str], images: Tensor, round_uint8: bool
) -> Group:
    """Reconstruct images by each candidate and compare."""
    original = to_uint8_grid(images) if round_uint8 else images
    values: list[list[list[float]]] = [[[] for _ in candidates] for _ in keys]
    made = [candidate.reconstruct(images, keys) for candidate in candidates]
    outputs = []
    for c, candidate in enumerate(candidates):
        output = checked_output(made[c].images, images, keys, candidate.label)
        outputs.append(to_uint8_grid(output) if round_uint8 else output)
        for metric in metrics:
            for i, value in enumerate(metric.compute(outputs[c], original).double().tolist()):
                values[i][c].append(value)
    return Group(keys, original, outputs, list(zip(keys, map(pixels_sha256, original), values)), made[0])


def to_uint8_grid(images: Tensor) -> Tensor:
    """Values as they would be saved: clamped and rounded to multiples of 1/255, still float in [0, 1]."""
    return (images.clamp(0, 1) * 255).round() / 255


def checked_output(output: Tensor, images: Tensor, keys: Sequence[str], label: str) -> Tensor:
    """The reconstructions, clamped to [0, 1]. Raises InputError on another shape or a value that is not finite."""
    if output.shape != images.shape:
        raise InputError(f"{label} gave {tuple(output.shape)} for images {tuple(images.shape)}: a reconstruction has their size")
    finite = torch.isfinite(output).flatten(1).all(dim=1)
    if not finite.all():
        bad = [key for key, ok in zip(keys, finite.tolist()) if not ok]
        raise InputError(f"{label} gave NaN or infinite pixels for {bad[0]}: its weights or its precision are broken")
    return output.clamp(0, 1)


def _noted(batches: Iterable[ImageBatch], found: Measured) -> Iterator[ImageBatch]:
    for batch in batches:
        found.originals_converted.update(batch.converted)
        yield batch


def _chunks(groups: Iterable[tuple[list[str], Tensor]]) -> Iterator[list[tuple[list[str], Tensor]]]:
    """Lists of groups that are in memory together."""
    chunk: list[tuple[list[str], Tensor]] = []
    images = pixels = 0
    for keys, group in groups:
        chunk.append((keys, group))
        images, pixels = images + len(keys), pixels + len(keys) * group[0, 0].numel()
        if images >= CHUNK_IMAGES or pixels >= CHUNK_PIXELS:
            yield chunk
            chunk, images, pixels = [], 0, 0
    if chunk:
        yield chunk


def _rebatch(batches: Iterable[ImageBatch], count: int) -> Iterator[tuple[list[str], Tensor]]:
    """Keys and images, `count` at a time, however they arrive; sizes are not mixed."""
    keys: list[str] = []
    images: list[Tensor] = []
    for batch in batches:
        if len(batch.keys) != len(batch.images):
            raise InputError(f"a batch has {len(batch.images)} images and {len(batch.keys)} keys")
        for key, image in zip(batch.keys, batch.images):
            if images and image.shape != images[0].shape:
                yield keys, torch.stack(images)
                keys, images = [], []
            keys.append(key)
            images.append(image)
            if len(images) == count:
                yield keys, torch.stack(images)
                keys, images = [], []
    if images:
        yield keys, torch.stack(images)
