"""Latents of many images on disk: shards, resuming, statistics. `tokenizers_lab.data.latents` reads what this writes.

Shard k holds the images k·n to (k + 1)·n − 1 of the source, without those that could not be read. A shard is written aside and
renamed, then its record (shard-00000.partial.json); latents.json comes last, and the records go. What was begun is thus known
exactly, whoever was killed when. Batches are fixed by an image's place alone, and on the CPU each is one thread's work: bytes
depend neither on interruptions nor on the number of processes or threads.
"""

import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.data.folder import ImageFolder
from tokenizers_lab.data.latent_manifest import ENDINGS, FORMAT, MANIFEST, NO_LABEL, PARTIAL, class_names
from tokenizers_lab.data.loader import WORTH_WORKERS, find_source
from tokenizers_lab.data.processes import Fetcher
from tokenizers_lab.data.quarantine import Quarantine
from tokenizers_lab.data.sampling import spread
from tokenizers_lab.data.shards import fingerprint
from tokenizers_lab.draw import Draw
from tokenizers_lab.errors import CheckpointError, ConfigError, DataError
from tokenizers_lab.settings import ImageDataConfig
from tokenizers_lab.teachers.cache import write_whole
from tokenizers_lab.tokenizer import ImageTokenizer

from .gather import all_processes, in_step, on_first, processes
from .latent_pieces import DTYPES, CacheReader, ListedPieces, Piece, Storing, StreamedPieces, Wanted, encode_pieces, probe
from .provenance import text_sha256, weights_sha256

RECORD = re.compile(r"shard-(\d+)\.partial\.json")
Progress = Callable[[Iterable[Any], int | None], Iterable[Any]]


@dataclass(frozen=True)
class CacheOptions:
    """How latents are stored. What `sample` draws depends on `seed` and an image's name alone."""

    flips: bool = False               # also of the mirrored crop
    moments: bool = False             # also the posterior's standard deviation
    sample: bool = False              # one draw of each image in place of the posterior's mode
    seed: int = 0                     # of the draws, and of the order
    dtype: str = "float32"            # float32, bfloat16, float16
    format: str = "safetensors"       # or webdataset
    shard_size: int = 4096            # images of a shard
    shuffle: bool = False             # a folder's images in a permuted order, for what is read shard by shard

    def check(self) -> None:
        """Raises ConfigError if options contradict each other."""
        if self.moments and self.sample:
            raise ConfigError("--moments stores mean and deviation, so that training draws; --sample draws once: choose one")
        if self.format not in ENDINGS or self.dtype not in DTYPES:
            raise ConfigError(f"the format must be one of {', '.join(ENDINGS)}, the type one of {', '.join(DTYPES)}")
        if self.shard_size < 1:
            raise ConfigError(f"--shard-size must be at least 1, not {self.shard_size}")

    def storing(self) -> Storing:
        """What of it concerns an image."""
        return Storing(self.flips, self.moments, self.sample, self.seed, self.dtype)


def write_latents(
    tokenizer: ImageTokenizer,
    data: ImageDataConfig,
    out: Path,
    options: CacheOptions,
    *,
    name: str,
    source: str,
    batch_size: int = 16,
    bad_fraction: float = 0.01,
    progress: Progress = lambda batches, total: batches,
) -> tuple[dict[str, Any], int]:
    """Encode every image of data.train, centre-cropped (ADM) to data.size, into the folder `out`.

    Returns what latents.json says, and how many shards were there already. name, source: what it calls the tokenizer and the
    data. data.val_limit: at most so many images, evenly spaced in a folder, the first of shards. Under torch.distributed each
    process makes shards of its own. bad_fraction: unreadable images above this share of those seen end it. progress: wraps the
    batches of this process; told their number where it is known.
    Raises CheckpointError if `out` holds something else, or latents of another tokenizer, other images or other options;
    InputError of a tokenizer without continuous latents, or without a posterior that the options need; ConfigError, DataError.
    """
    options.check()
    rank, world = processes()
    tokenizer.eval()
    reader = CacheReader(data)
    found = in_step(lambda: find_source(reader, data.train, "train"))
    listing = None if found.shards else in_step(lambda: reader.listing(found))
    if listing is None and options.shuffle:
        raise ConfigError("--shuffle is for folders and manifests: shards are read, and written, in their own order")
    order = [] if listing is None else image_order(len(listing), data.val_limit, options)
    shape = in_step(lambda: probe(tokenizer, data.size, options.storing()))
    header = {
        "format": FORMAT,
        "tokenizer": {"name": name, "system": tokenizer.system, "weights_sha256": weights_sha256(tokenizer)},
        "source": source,
        "images_sha256": fingerprint(found.shards) if listing is None else listing_sha256(listing, order),
        "options": {"size": data.size, "limit": data.val_limit, **vars(options)},
        "shape": list(shape),
        "classes": [] if listing is None else class_names(listing.labels, listing.classes),
    }
    finished = on_first(lambda: open_cache(out, header))
    if finished is not None:
        return finished, len(finished["shards"])

    def share() -> tuple[int | None, int]:
        """The number of shards that there will be, and of those of this process that were there."""
        there = frozenset(shard for shard in listed_records(out) if shard % world == rank and is_whole(out, shard))
        wanted = Wanted(rank, world, there)
        shards, total, root = None, None, ""
        if listing is None:
            streamed = StreamedPieces(found.shards, data.val_limit, reader, batch_size, options.shard_size, wanted)
            fetcher = Fetcher(streamed, data.workers)
        else:
            listed = ListedPieces(listing, order, reader, batch_size, options.shard_size, wanted)
            shards, total, root = listed.shards, len(listed), f"{listing.root}/"
            workers = data.workers if len(order) >= WORTH_WORKERS else 0
            fetcher = Fetcher(listed, min(workers, total), range(total))
        quarantine = Quarantine(None, bad_fraction, option="--bad-fraction")
        try:
            batches = progress(fetcher, total)
            for shard, group in groupby(encode_pieces(tokenizer, batches, options.storing(), quarantine.count), piece_shard):
                made = list(group)
                if made[0].end:
                    shards = shard
                else:
                    write_shard(out, shard, made, options, root)
        finally:
            fetcher.close()
        return shards, len(there)

    shares = all_processes(in_step(share))
    manifest = on_first(lambda: close_cache(out, shares[0][0] or 0))
    return manifest, sum(there for _, there in shares)


def piece_shard(piece: Piece) -> int:
    """The shard of a piece."""
    return piece.shard


def image_order(n: int, limit: int | None, options: CacheOptions) -> list[int]:
    """Which of n images of a listing are stored, in order."""
    order = list(spread(n, limit))
    if not options.shuffle:
        return order
    return [order[i] for i in Draw(options.seed).permutation("latents", len(order)).tolist()]


def listing_sha256(listing: ImageFolder, order: list[int]) -> str:
    """SHA-256 of the names and labels of images, in order."""
    return text_sha256([json.dumps([listing.names[i], listing.label(i)]) for i in order])


# --- shards and their records -------------------------------------------------------------------------------------------

def write_shard(out: Path, shard: int, pieces: list[Piece], options: CacheOptions, root: str) -> None:
    """A shard's file, and then its record. root: a folder that reasons do not name. Raises DataError."""
    full = [piece for piece in pieces if piece.keys]
    keys = [key for piece in full for key in piece.keys]
    labels = [label for piece in full for label in piece.labels]
    record: dict[str, Any] = {
        "file": f"shard-{shard:05d}.{ENDINGS[options.format]}", "samples": len(keys),
        "labelled": sum(label != NO_LABEL for label in labels), "sha256": "", "sum": [], "square": [],
        "skipped": [{"key": bad.key, "reason": bad.reason.replace(root, "") if root else bad.reason}
                    for piece in pieces for bad in piece.bad],
    }
    if keys:
        tensors = {name: torch.cat([piece.tensors[name] for piece in full]).contiguous() for name in full[0].tensors}
        make = safetensors_shard if options.format == "safetensors" else webdataset_shard
        content = make(tensors, keys, labels, shard * options.shard_size)
        write_whole(out / record["file"], content)
        record["sha256"] = hashlib.sha256(content).hexdigest()
        record["sum"] = np.concatenate([p.sums for p in full if p.sums is not None]).sum(0).tolist()
        record["square"] = np.concatenate([p.squares for p in full if p.squares is not None]).sum(0).tolist()
    write_whole(record_file(out, shard), to_json(record))


def safetensors_shard(tensors: dict[str, Tensor], keys: list[str], labels: list[int], first: int) -> bytes:
    """A file of all of them. Its metadata are one entry: several would be written in an order that changes."""
    return save({**tensors, "labels": torch.tensor(labels)}, {"keys": json.dumps(keys)})


def webdataset_shard(tensors: dict[str, Tensor], keys: list[str], labels: list[int], first: int) -> bytes:
    """A tar file of samples, which are named by their number from `first` on: keys may hold dots, or differ by them alone."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for i, (key, label) in enumerate(zip(keys, labels)):
            about = json.dumps({"key": key, "label": None if label == NO_LABEL else label})
            values = save({name: value[i].clone() for name, value in tensors.items()})
            for ending, content in (("safetensors", values), ("json", about.encode())):
                info = tarfile.TarInfo(f"{first + i:08d}.{ending}")      # no times or owners
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def record_file(out: Path, shard: int) -> Path:
    """Where the record of a shard is."""
    return out / f"shard-{shard:05d}.partial.json"


def listed_records(out: Path) -> list[int]:
    """The shards that have a record."""
    return sorted(int(found[1]) for path in out.iterdir() if (found := RECORD.fullmatch(path.name)))


def is_whole(out: Path, shard: int) -> bool:
    """Whether a shard's record is readable and its file is what was written."""
    try:
        return matches(out, read_json(record_file(out, shard)))
    except CheckpointError:
        return False


def matches(out: Path, record: dict[str, Any]) -> bool:
    """Whether the file that a record is of is there, whole."""
    try:
        return not record["samples"] or sha256_of(out / record["file"]) == record["sha256"]
    except (OSError, KeyError, TypeError):
        return False


# --- the folder ---------------------------------------------------------------------------------------------------------

def open_cache(out: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """Begin a cache, or take it up again; its manifest if it is complete and whole.

    Of a complete cache with damaged shards the others become a cache that is not finished. Raises CheckpointError.
    """
    complete, partial = out / MANIFEST, out / PARTIAL
    found = read_json(complete) if complete.exists() else read_json(partial) if partial.exists() else None
    if found is None:
        if out.is_file() or (out.is_dir() and any(not is_aside(path) for path in out.iterdir())):
            raise CheckpointError(f"{out} is not empty and holds no latents: choose another folder")
    else:
        check_same(out, found, header)
    for path in filter(is_aside, out.iterdir() if out.is_dir() else ()):
        path.unlink()
    if found is None:
        write_whole(partial, to_json(header))
    elif complete.exists():
        shards = found["shards"]
        whole = [matches(out, record) for record in shards]
        if not all(whole):
            for number, record in enumerate(shards):
                if whole[number]:
                    skipped = [{"key": s["key"], "reason": s["reason"]} for s in found["skipped"] if s["shard"] == number]
                    write_whole(record_file(out, number), to_json({**record, "skipped": skipped}))
            write_whole(partial, to_json({name: found[name] for name in header}))
            complete.unlink()
            return None
        remove_records(out)      # it may have been killed just before
        return found
    return None


def is_aside(path: Path) -> bool:
    """Whether a file is what a killed process had half written."""
    return path.name.startswith((".shard-", f".{MANIFEST}.", f".{PARTIAL}."))


def check_same(out: Path, found: dict[str, Any], header: dict[str, Any]) -> None:
    """Raise CheckpointError if a folder's latents are of another tokenizer, other images or other options."""
    advice = "give another folder, or what they were made with"
    try:
        if found["format"] != header["format"]:
            raise CheckpointError(f"the latents in {out} have the format {found['format']}, not {header['format']}: {advice}")
        was, now = found["tokenizer"], header["tokenizer"]
        if (was["system"], was["weights_sha256"]) != (now["system"], now["weights_sha256"]):
            whose = f"{was['system']}, SHA-256 {was['weights_sha256'][:12]}, not {now['system']}, {now['weights_sha256'][:12]}"
            raise CheckpointError(f"the latents in {out} are of another tokenizer ({whose}): {advice}")
        for option, value in header["options"].items():
            if found["options"].get(option) != value:
                flag = f"--{option.replace('_', '-')}"
                raise CheckpointError(f"the latents in {out} were made with {flag} {found['options'].get(option)}, not {value}: "
                                      f"{advice}")
        if found["images_sha256"] != header["images_sha256"] or found["shape"] != header["shape"]:
            raise CheckpointError(f"the latents in {out} are of other images ({found['source']}): {advice}")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the latents in {out} are damaged (no {error}): give another folder") from error


def close_cache(out: Path, shards: int) -> dict[str, Any]:
    """Write the manifest of all shards, then remove the records. Raises DataError if no image could be read."""
    records = [read_json(record_file(out, shard)) for shard in range(shards)]
    samples = sum(record["samples"] for record in records)
    skipped = [{"shard": number, **bad} for number, record in enumerate(records) for bad in record.pop("skipped")]
    if not samples:
        reason = f"; the last one: {skipped[-1]['reason']}" if skipped else ""
        raise DataError(f"there is no image that could be read{reason}")
    header = read_json(out / PARTIAL)
    mean, std = merged_statistics(records, samples * math.prod(header["shape"][1:]))
    manifest = {
        **header, "samples": samples, "labelled": sum(record["labelled"] for record in records), "skipped": skipped,
        "mean": mean, "std": std, "shards": records,
    }
    write_whole(out / MANIFEST, to_json(manifest))
    remove_records(out)
    return manifest


def merged_statistics(records: list[dict[str, Any]], count: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (biased) of each channel, from the sums over all shards, exactly rounded."""
    full = [record for record in records if record["samples"]]
    sums, squares = ([math.fsum(values) for values in zip(*(r[name] for r in full))] for name in ("sum", "square"))
    mean = [total / count for total in sums]
    return mean, [math.sqrt(max(square / count - m * m, 0.0)) for square, m in zip(squares, mean)]


def remove_records(out: Path) -> None:
    """Remove what only an unfinished cache needs, and shards that nothing names any more."""
    for shard in listed_records(out):
        record_file(out, shard).unlink(missing_ok=True)
    (out / PARTIAL).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of ours. Raises CheckpointError."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it, or give another folder") from error
    return found


def to_json(value: dict[str, Any]) -> bytes:
    """One line for each entry; NaN and infinities are refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
