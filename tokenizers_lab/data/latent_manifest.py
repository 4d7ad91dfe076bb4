"""Latents on disk: what a folder that `toklab latents` made says of itself. `tokenizers_lab.data.latents` reads the samples.

A folder holds latents.json, written last, and shards of either format:
  safetensors   shard-00000.safetensors: `latents` (n, C, h, w), `labels` int64 (n,), −1 where there is none, and perhaps
                `latents_flip` of the mirrored crops, `spread` and `spread_flip` (the posterior's standard deviation). The
                header's metadata hold `keys`, a JSON list of the images' names.
  webdataset    shard-00000.tar: for each sample KEY.safetensors with the same tensors of one image (C, h, w), and KEY.json with
                its `key` and `label` (null where there is none).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizers_lab.data.sources import Source, expand_shards
from tokenizers_lab.errors import CheckpointError, DataError

MANIFEST = "latents.json"
PARTIAL = "latents.partial.json"      # stands in its place until all shards are written
FORMAT = 1
ENDINGS = {"safetensors": "safetensors", "webdataset": "tar"}
NO_LABEL = -1


@dataclass(frozen=True)
class LatentShard:
    """One file of latents."""

    file: str            # in the cache's folder
    samples: int
    sha256: str


@dataclass(frozen=True)
class LatentManifest:
    """What latents.json says."""

    folder: str                       # of the cache: a path, or a URL
    tokenizer: str                    # as it was named to the command
    system: str
    weights_sha256: str               # of its model.safetensors
    source: str                       # of the images
    size: int                         # pixels a side of the centre crop
    shape: tuple[int, int, int]       # (C, h, w)
    format: str                       # safetensors or webdataset
    dtype: str                        # in which they are stored
    flips: bool                       # whether the mirrored crops' latents are there
    moments: bool                     # whether the posterior's standard deviations are there
    sampled: bool                     # whether latents are one draw each; else they are the posterior's mode
    samples: int
    labelled: int                     # how many of them have a class
    classes: list[str]                # names by label; empty where there are only numbers
    skipped: list[dict[str, Any]]     # images that could not be read: `key`, `reason`
    mean: Tensor                      # (C,) float64, of the modes over all images and positions, without mirrored crops
    std: Tensor                       # (C,) float64, divided by the count
    shards: tuple[LatentShard, ...]

    def urls(self) -> list[str]:
        """Where the shards are."""
        return [f"{self.folder}/{shard.file}" for shard in self.shards]


def read_latent_manifest(source: str | Path) -> LatentManifest:
    """The manifest of cached latents: of their folder, or beside the shards that a path, a glob or a URL names.

    Raises DataError if there are none, or they are not finished, CheckpointError if the manifest is damaged or of another
    version.
    """
    found = find_latent_manifest(source)
    if found is None:
        raise DataError(f"{source} holds no latents: make them by `toklab latents MODEL DATA {source}`")
    return found


def find_latent_manifest(source: str | Path | Source) -> LatentManifest | None:
    """As `read_latent_manifest`; None where a source is of something else, such as images, or does not exist."""
    if isinstance(source, Source):
        shards, folder = source.shards, source.folder
    else:
        text = str(source)
        sharded = "://" in text or text.endswith(".tar")
        shards, folder = tuple(expand_shards(text)) if sharded else (), None if sharded else Path(text).expanduser()
    if shards:
        return _beside(shards[0])
    if folder is None:
        return None
    if not (folder / MANIFEST).is_file():
        if (folder / PARTIAL).is_file():
            raise DataError(f"the latents in {folder} are not finished: run `toklab latents` again, as it was run")
        return None
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error.strerror or error})") from error
    return parse_manifest(content, str(folder))


def parse_manifest(content: bytes, folder: str) -> LatentManifest:
    """The manifest of a folder from its bytes. Raises CheckpointError."""
    where = f"{folder}/{MANIFEST}"
    try:
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise CheckpointError(f"{where} has the format {found['format']}, this version reads {FORMAT}: make the latents anew")
        options, maker = found["options"], found["tokenizer"]
        channels, height, width = found["shape"]
        shards = tuple(LatentShard(s["file"], s["samples"], s["sha256"]) for s in found["shards"] if s["samples"])
        manifest = LatentManifest(
            folder, maker["name"], maker["system"], maker["weights_sha256"], found["source"], options["size"],
            (channels, height, width), options["format"], options["dtype"], options["flips"], options["moments"],
            options["sample"], found["samples"], found["labelled"], found["classes"], found["skipped"],
            torch.tensor(found["mean"], dtype=torch.float64), torch.tensor(found["std"], dtype=torch.float64), shards)
        if manifest.mean.shape != (channels,) or manifest.std.shape != (channels,) or manifest.format not in ENDINGS:
            raise ValueError("its entries contradict each other")
        if sum(shard.samples for shard in shards) != manifest.samples:
            raise ValueError("its shards hold another number of samples")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is damaged ({type(error).__name__}: {error}): run `toklab latents` again") from error
    return manifest


def class_names(labels: Sequence[int] | Any, classes: list[str]) -> list[str]:
    """The classes' names by label; none where labels are a manifest's own numbers, which need not count from 0."""
    return list(classes) if labels is not None and len(labels) and max(labels) < len(classes) else []


def _beside(shard: str) -> LatentManifest | None:
    """The manifest in the folder of a shard, wherever that is; none if there is none that can be read."""
    import fsspec

    plain, _, query = shard.partition("?")
    folder, _, name = plain.rpartition("/")
    folder = folder or "."
    try:
        with fsspec.open(f"{folder}/{MANIFEST}" + (f"?{query}" if query else ""), "rb") as file:
            content = file.read()
    except Exception:      # each store has exceptions of its own for what is not there
        return None
    manifest = parse_manifest(content, folder)
    return manifest if name in {s.file for s in manifest.shards} else None
