"""Images with classes for probes: which are held out, what their classes are called, and how vectors of them are collected."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenizers_lab.data.batch import ImageBatch
from tokenizers_lab.data.decode import converted_from, open_image, to_rgb
from tokenizers_lab.data.images import ImageReader, ImageView
from tokenizers_lab.data.loader import checked_reader, find_source
from tokenizers_lab.data.reading import Raw
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import ConfigError, DataError
from tokenizers_lab.settings import ImageDataConfig

from .alignment import compute_vectors
from .bootstrap import mean_summary
from .gather import check_names
from .image_features import ImageFeatures
from .precision_recall import wilson_interval
from .provenance import pixels_sha256, text_sha256

SQUASH = "the whole image, scaled to a square without keeping its aspect (bilinear, antialiased)"
MAJORITY = "majority class"


@dataclass
class Labelled:
    """Images of known classes, in order of their keys, and what each row makes of them."""

    keys: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)             # name of each image's class
    digests: list[str] = field(default_factory=list)             # SHA-256 of its pixels
    vectors: list[Tensor] = field(default_factory=list)          # (N, D) float32 of each row

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: Sequence[int]) -> "Labelled":
        """The images of these numbers."""
        keys, classes, digests = ([values[i] for i in numbers] for values in (self.keys, self.classes, self.digests))
        index = torch.tensor(list(numbers), dtype=torch.int64)
        return Labelled(keys, classes, digests, [vectors[index] for vectors in self.vectors])

    @property
    def sha256(self) -> str:
        """Of all pixels, in order."""
        return text_sha256(self.digests)


class SquashReader(ImageReader):
    """Reads whole images, scaled to a square."""

    def validation(self, raw: Raw) -> ImageView:
        """The whole image, size × size pixels. Raises DataError."""
        with open_image(raw.content, self.cfg.max_pixels, raw.name) as image:
            stored = converted_from(image)
            square = to_rgb(image, raw.name).resize((self.cfg.size,) * 2, Image.Resampling.BILINEAR)
            return ImageView(image=square, label=raw.about["label"], converted=stored)


def class_namer(cfg: ImageDataConfig) -> Callable[[int], str]:
    """What the class of a label is called: its folder, the manifest's name, or the number itself."""
    reader = checked_reader(cfg)
    source = find_source(reader, cfg.val or "", "val")
    listing: Any = None if source.shards else reader.listing(source)
    listed = getattr(listing, "texts", None) is not None          # in a manifest
    if listing is None or not listing.classes or (listed and all(name.isdecimal() for name in listing.classes)):
        return str
    return lambda label: str(listing.classes[label])


def collect_labelled(
    sources: Sequence[ImageFeatures], batches: Iterable[ImageBatch], name_of: Callable[[int], str] = str, forward_batch: int = 1
) -> Labelled:
    """Every image's class and vectors, in order of keys. Raises DataError without images, on images without classes or of one
    name, InputError on features that are not finite."""
    found = Labelled()
    pieces: list[list[Tensor]] = [[] for _ in sources]
    for batch in batches:
        if batch.labels is None:
            raise DataError(f"{batch.keys[0]} has no class: probes need a folder of each class, or a manifest with labels")
        found.keys += batch.keys
        found.classes += [name_of(int(label)) for label in batch.labels]
        found.digests += [pixels_sha256(image) for image in batch.images]
        for piece, source in zip(pieces, sources):
            piece.append(compute_vectors(source, list(batch.images), batch.keys, forward_batch))
    if not found.keys:
        raise DataError("there are no images to probe")
    check_names(sorted(found.keys))
    found.vectors = [torch.cat(piece) for piece in pieces]
    return found.take(sorted(range(len(found)), key=found.keys.__getitem__))


def hold_out(keys: Sequence[str], classes: Sequence[str], every: int, salt: str = "held out") -> tuple[list[int], list[int]]:
    """Numbers of (the others, those held out): of each class one in `every`, at least one of several, those of the smallest
    hashes of their keys, so that other images in the data hardly change which. Raises ConfigError unless every ≥ 2."""
    if every < 2:
        raise ConfigError(f"one image in {every} cannot be held out: take 2 or more")
    members: dict[str, list[int]] = {}
    for i, name in enumerate(classes):
        members.setdefault(name, []).append(i)
    held: set[int] = set()
    for name, numbers in members.items():
        ranked = sorted(numbers, key=lambda i, name=name: (stable_seed(salt, name, keys[i]), keys[i]))      # type: ignore[misc]
        held |= set(ranked[: min(max(1, round(len(ranked) / every)), len(ranked) - 1)])
    return [i for i in range(len(keys)) if i not in held], sorted(held)


def accuracy(right: Sequence[bool], title: str = "accuracy") -> dict[str, Any]:
    """The share of right answers in % as a metric of a row, with Wilson's interval."""
    count, n = sum(right), len(right)
    interval = wilson_interval(count, n)
    bounds = asdict(replace(interval, low=100 * interval.low, high=100 * interval.high, method="Wilson"))
    return {"title": title, "unit": "%", "better": "higher", "n": n, "right": count, "value": 100 * count / n,
            "uncertainty": bounds, "per_image": [100.0 * bool(one) for one in right]}


def by_class(classes: Sequence[str], right: Sequence[bool]) -> dict[str, dict[str, int]]:
    """Images and right answers of each class."""
    counts, hits = Counter(classes), Counter(name for name, one in zip(classes, right) if one)
    return {name: {"n": counts[name], "right": hits[name]} for name in sorted(counts)}


def majority_row(known: Sequence[str], classes: Sequence[str], where: str) -> dict[str, Any]:
    """The row that always says the class that is most frequent among the known ones."""
    counts = Counter(known)
    most = min(counts, key=lambda name: (-counts[name], name))
    right = [name == most for name in classes]
    return {"label": MAJORITY, "role": "baseline", "answer": most, "features": f"none: the most frequent class {where}",
            "metrics": {"accuracy": accuracy(right)}, "per_class": by_class(classes, right)}


def margins(rows: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """By how much the first row is better than each other one, in points of accuracy, over the images of both."""
    mine = rows[0]["metrics"]["accuracy"]["per_image"]
    found = []
    for other in rows[1:]:
        differences = [a - b for a, b in zip(mine, other["metrics"]["accuracy"]["per_image"])]
        found.append({"metric": "accuracy", "over": other["label"], "role": other["role"], **mean_summary(differences, seed)})
    return found
