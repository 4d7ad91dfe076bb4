"""Cached latents for the loader: samples of safetensors shards in any order, or of webdataset shards as a stream.

What is no cache goes on to the reader of images, so that training and validation may each name either.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from tokenizers_lab.data.batch import LatentBatch
from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.folder import Names
from tokenizers_lab.data.images import ImageReader, ImageView
from tokenizers_lab.data.latent_manifest import MANIFEST, NO_LABEL, LatentManifest, find_latent_manifest, read_latent_manifest
from tokenizers_lab.data.reading import Listing, Numbers, Raw, Reader
from tokenizers_lab.data.sources import Source
from tokenizers_lab.errors import DataError
from tokenizers_lab.settings import LatentDataConfig

__all__ = ["LatentListing", "LatentManifest", "LatentReader", "find_latent_manifest", "open_latents", "read_latent_manifest"]

OPEN_FILES = 64      # shards that a process keeps open


@dataclass
class LatentView:
    """The latents of one image."""

    latents: Tensor                # (C, h, w) float32
    spread: Tensor | None          # (C, h, w) float32
    label: int | None


@dataclass
class LatentListing:
    """The samples of a cache's safetensors shards, in order, in flat buffers that processes share."""

    files: list[Path]
    ends: np.ndarray               # (shards + 1,) int64: samples before each shard, and all
    keys: Names
    labels: np.ndarray             # (N,) int64, NO_LABEL where there is none

    def __len__(self) -> int:
        return len(self.keys)

    def raw(self, index: int) -> Raw:
        """The sample of that number: its shard and its row there."""
        shard = int(np.searchsorted(self.ends, index, side="right")) - 1
        row, file = index - int(self.ends[shard]), self.files[shard]
        return Raw(self.keys[index], f"{self.keys[index]} in {file}", file, {"row": row, "label": int(self.labels[index])})


class LatentReader(Reader):
    """Reads latents, or images, as a LatentDataConfig says."""

    noun, sample = "images or latents", "sample:photos"
    manifests = ImageReader.manifests

    def __init__(self, cfg: LatentDataConfig):
        self.cfg, self.images = cfg, ImageReader(cfg)
        self.parts = tuple(dict.fromkeys((*self.images.parts, "safetensors", "json")))
        self.shape: tuple[int, ...] | None = None      # of an image's latents: the manifest's, else the first one's

    def check(self) -> None:
        """Raises ConfigError if the crop's options contradict each other."""
        self.images.check()

    def locate(self, source: Source, split: str) -> Source:
        """The shards of a folder of latents that are read as a stream; any other source as it is.

        Raises DataError if training shall mirror and there are no mirrored latents, CheckpointError on a damaged manifest.
        """
        manifest = find_latent_manifest(source)
        if manifest is None:
            return source
        self.shape = manifest.shape
        if split == "train" and self.cfg.flip and not manifest.flips:
            raise DataError(f"{manifest.folder} holds no latents of mirrored images: set data.flip=false, or make it by "
                            "toklab latents … --flips")
        if source.folder is None:
            return source
        if manifest.format == "webdataset":
            return Source(shards=tuple(manifest.urls()), samples=manifest.samples)
        return source

    def listing(self, source: Source) -> Listing:
        """The samples of a folder of latents, or the images of a folder or a manifest. Raises DataError, CheckpointError."""
        if source.folder is not None and (source.folder / MANIFEST).is_file():
            return open_latents(source.folder)
        return self.images.listing(source)

    def from_shard(self, sample: dict[str, Any], name: str) -> Raw:
        """Latents with their class, or an image. Raises DataError if something is missing or wrong."""
        if "safetensors" not in sample:
            return self.images.from_shard(sample, name)
        try:
            about = json.loads(sample.get("json", b"{}"))
            label = NO_LABEL if about.get("label") is None else int(about["label"])
            key = str(about.get("key", name))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{name}: its .json cannot be read ({error})") from None
        return Raw(key, name, sample["safetensors"], {"row": None, "label": label})

    def training(self, raw: Raw, numbers: Numbers) -> LatentView | ImageView:
        """The latents of the image, or, with data.flip, of its mirrored version by the last of the numbers. Raises DataError."""
        if "row" not in raw.about:
            return self.images.training(raw, numbers)
        return self._view(raw, self.cfg.flip and numbers[3] < 0.5)

    def validation(self, raw: Raw) -> LatentView | ImageView:
        """The latents of the image as it is. Raises DataError."""
        return self.images.validation(raw) if "row" not in raw.about else self._view(raw, False)

    def assemble(self, views: Sequence[Any], keys: list[str]) -> Fetched:
        """A batch of latents, or of images. Labels are kept if all samples have one."""
        if isinstance(views[0], ImageView):
            return self.images.assemble(views, keys)
        labels = [view.label for view in views if view.label is not None]
        spreads = [view.spread for view in views if view.spread is not None]
        return FetchedLatents(
            keys=keys,
            latents=torch.stack([view.latents for view in views]),
            labels=torch.tensor(labels) if len(labels) == len(views) else None,
            spread=torch.stack(spreads) if len(spreads) == len(views) else None,
        )

    def _view(self, raw: Raw, flip: bool) -> LatentView:
        ending = "_flip" if flip else ""
        names = [f"latents{ending}", f"spread{ending}"]
        found = read_shard_row(raw, names) if isinstance(raw.content, Path) else read_sample(raw, names)
        latents, spread = found[names[0]], found.get(names[1])
        if latents is None:
            advice = "set data.flip=false, or run toklab latents … --flips" if flip else "run toklab latents"
            raise DataError(f"{raw.name}: holds no {names[0]}: {advice}")
        if self.shape is None and latents.dim() == 3:
            self.shape = tuple(latents.shape)
        for name, values in found.items():
            if values is None:
                continue
            if tuple(values.shape) != self.shape or not values.is_floating_point():
                raise DataError(f"{raw.name}: {name} is {values.dtype} {tuple(values.shape)}, not float {self.shape}")
            if not torch.isfinite(values).all():
                raise DataError(f"{raw.name}: {name} is not finite")
        label = raw.about["label"]
        return LatentView(latents.float(), None if spread is None else spread.float(), None if label == NO_LABEL else label)


@dataclass
class FetchedLatents(Fetched):
    """Latents on their way to the training process."""

    latents: Tensor = field(default_factory=lambda: torch.empty(0))   # (B, C, h, w) float32
    labels: Tensor | None = None                                      # (B,) int64
    spread: Tensor | None = None                                      # (B, C, h, w) float32

    def batch(self) -> LatentBatch:
        """As training sees it."""
        return LatentBatch(self.latents, self.keys, self.labels, self.spread)


def open_latents(folder: Path) -> LatentListing:
    """The samples of a folder of latents in safetensors shards; kept while its manifest does not change.

    Raises DataError if a shard is missing or damaged, CheckpointError on a damaged manifest.
    """
    folder = folder.expanduser().absolute()
    try:
        written = (folder / MANIFEST).stat().st_mtime_ns
    except OSError:
        raise DataError(f"{folder} holds no latents: make them by `toklab latents MODEL DATA {folder}`") from None
    if folder not in _known or _known[folder][0] != written:
        _known[folder] = written, _list(read_latent_manifest(folder), folder)
    return _known[folder][1]


_known: dict[Path, tuple[int, LatentListing]] = {}


def read_shard_row(raw: Raw, names: Sequence[str]) -> dict[str, Tensor | None]:
    """Tensors of one sample of a safetensors shard, None for those that are not there. Raises DataError."""
    assert isinstance(raw.content, Path)
    try:
        opened, there = _open(str(raw.content), raw.content.stat().st_mtime_ns)
        return {name: opened.get_slice(name)[raw.about["row"]] if name in there else None for name in names}
    except (OSError, SafetensorError, IndexError, RuntimeError) as error:
        raise DataError(f"{raw.name}: cannot be read ({error})") from None


def read_sample(raw: Raw, names: Sequence[str]) -> dict[str, Tensor | None]:
    """Tensors of one sample of a webdataset shard, None for those that are not there. Raises DataError."""
    assert isinstance(raw.content, bytes)
    try:
        found = load(raw.content)
    except SafetensorError as error:
        raise DataError(f"{raw.name}: cannot be read ({error})") from None
    return {name: found.get(name) for name in names}


@lru_cache(maxsize=OPEN_FILES)
def _open(path: str, written: int) -> tuple[Any, frozenset[str]]:
    """A shard, mapped into memory, and its tensors' names. written: when, so that another file of its name is another shard."""
    opened = safe_open(path, "pt")
    return opened, frozenset(opened.keys())


def _list(manifest: LatentManifest, folder: Path) -> LatentListing:
    """Every shard's keys and labels."""
    keys, labels, files = [], list[Tensor](), list[Path]()
    for shard in manifest.shards:
        file = folder / shard.file
        try:
            with safe_open(file, "pt") as opened:
                found = json.loads((opened.metadata() or {})["keys"])
                labels.append(opened.get_tensor("labels"))
        except FileNotFoundError:
            raise DataError(f"{file} is missing: run `toklab latents` again, as it was run") from None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{file} is damaged ({error}): run `toklab latents` again, as it was run") from None
        if not len(found) == len(labels[-1]) == shard.samples:
            raise DataError(f"{file} holds {len(found)} samples, {MANIFEST} says {shard.samples}: run `toklab latents` again")
        keys += found
        files.append(file)
    ends = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    return LatentListing(files, ends, Names(keys), torch.cat(labels).numpy())
