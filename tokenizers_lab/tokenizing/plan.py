"""Which samples of a source go into which output shard, and into which block of it: nothing but a function of the source.

A folder or a manifest is cut into shards of equally many samples, in the order of its listing; of webdataset shards each makes
one. A shard is cut into blocks, which are decoded, and run through the network, together.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from tokenizers_lab.data import audio, decode
from tokenizers_lab.data.folder import ImageFolder
from tokenizers_lab.data.images import IMAGE_PARTS
from tokenizers_lab.data.manifest import MANIFESTS, ClipListing, open_clips, to_row
from tokenizers_lab.data.pairs import open_images
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.reading import Raw
from tokenizers_lab.data.shards import fingerprint, sample_name, shard_samples
from tokenizers_lab.data.sources import resolve_source
from tokenizers_lab.data.speech import SOUND_PARTS
from tokenizers_lab.errors import DataError

PARTS = {False: IMAGE_PARTS, True: SOUND_PARTS}      # of images, of clips
ABOUT = ("json", "txt", "cls")


@dataclass
class Block:
    """Samples of one output shard that follow one another, before they are decoded."""

    shard: int
    number: int                      # in its shard
    last: bool                       # of its shard
    raws: list[Raw]
    bad: list[Bad] = field(default_factory=list)      # those that could not even be taken from their shard


@dataclass(frozen=True)
class Plan:
    """A source, divided. Exactly one of `listing` and `urls` is there."""

    speech: bool
    listing: ClipListing | ImageFolder | None
    urls: tuple[str, ...]
    shard_size: int                  # samples of a shard of a listing
    block_size: int                  # samples of a block

    @property
    def shards(self) -> int:
        """How many output shards."""
        return len(self.urls) if self.listing is None else -(-len(self.listing) // self.shard_size)

    @property
    def samples(self) -> int | None:
        """How many samples; webdataset shards do not tell."""
        return None if self.listing is None else len(self.listing)

    def shard_samples(self, shard: int) -> int:
        """Samples of a shard of a listing."""
        assert self.listing is not None
        return min(self.shard_size, len(self.listing) - shard * self.shard_size)

    def blocks(self, shard: int) -> Iterator[Block]:
        """The blocks of an output shard, in order; of one without samples an empty block. Raises DataError."""
        if self.listing is None:
            yield from self._blocks_of(self.urls[shard], shard)
            return
        count = -(-self.shard_samples(shard) // self.block_size)
        for number in range(count):
            first = shard * self.shard_size + number * self.block_size
            size = min(self.block_size, self.shard_samples(shard) - number * self.block_size)
            raws = [listed_raw(self.listing, index) for index in range(first, first + size)]
            yield Block(shard, number, number + 1 == count, raws)

    def _blocks_of(self, url: str, shard: int) -> Iterator[Block]:
        reader = shard_samples(url, parts=(*PARTS[self.speech], *ABOUT))
        number, coming = 0, list(islice(reader, self.block_size))
        while True:
            samples, coming = coming, list(islice(reader, self.block_size))
            block = Block(shard, number, not coming, [])
            for sample in samples:
                name = sample_name(url, sample)
                try:
                    block.raws.append(shard_raw(sample, name, self.speech))
                except DataError as error:
                    block.bad.append(Bad(name, str(error)))
            yield block
            if block.last:
                return
            number += 1

    def fingerprint(self) -> str:
        """A hash of the listing with all that it tells, or of the shards' names; not of what is inside the files."""
        if self.listing is None:
            return fingerprint(self.urls)
        digest = blake2b(digest_size=16)
        for index in range(len(self.listing)):
            raw = listed_raw(self.listing, index)
            digest.update(json.dumps([raw.key, raw.about], sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def plan_source(source: str, speech: bool, shard_size: int, block_size: int) -> Plan:
    """Divide a folder, a manifest, webdataset shards or a sample set. Raises DataError if there is nothing there."""
    noun, sample = ("clips", "sample:speech") if speech else ("images", "sample:photos")
    found = resolve_source(source, "train", noun, sample, MANIFESTS)
    if found.shards:      # processes elsewhere may stand in another folder
        urls = tuple(url if "://" in url else os.path.abspath(os.path.expanduser(url)) for url in found.shards)
        return Plan(speech, None, urls, shard_size, block_size)
    where = found.manifest or found.folder
    assert where is not None
    return Plan(speech, open_clips(where) if speech else open_images(where), (), shard_size, block_size)


def listed_raw(listing: ClipListing | ImageFolder, index: int) -> Raw:
    """A sample of a listing, with all that is known of it."""
    raw = listing.raw(index)
    about = {name: value for name, value in raw.about.items() if value is not None}
    if isinstance(listing, ImageFolder) and "label" in about:
        # labels that a manifest gives as numbers are their own; all others number the classes
        if listing.texts is None or not all(name.isdecimal() for name in listing.classes):
            about["class"] = listing.classes[about["label"]]
    elif "label" in about:
        about |= label_of(about.pop("label"))
    return replace(raw, about=about)


def shard_raw(sample: dict[str, Any], name: str, speech: bool) -> Raw:
    """A sample of a webdataset shard: its picture or sound, and what its .json, .txt and .cls files tell. Raises DataError."""
    part = next((part for part in PARTS[speech] if part in sample), None)
    if part is None:
        raise DataError(f"{name}: has no {'sound' if speech else 'image'} (one of {', '.join(PARTS[speech])})")
    about: dict[str, Any] = {}
    try:
        if "json" in sample:
            said = json.loads(sample["json"])
            row = vars(to_row({**said, "file": name}, name))
            about = {key: row[key] for key in ("text", "speaker", "language") if row[key] is not None}
            about |= label_of(row["label"])
            about["source"] = said
        if "txt" in sample:
            about["text"] = sample["txt"].decode("utf-8").strip()
        if "cls" in sample:
            about |= label_of(sample["cls"].decode("utf-8").strip())
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: what is said of it cannot be read ({error})") from None
    return Raw(sample["__key__"], name, sample[part], about)


def label_of(label: str | None) -> dict[str, Any]:
    """A class as its number, or else as its name."""
    if not label:
        return {}
    number = label.removeprefix("-")
    return {"label": int(label)} if number.isdecimal() and len(number) < 19 else {"class": label}


def member_name(key: str, taken: set[str]) -> str:
    """What a sample is called in a tar: its key without ending, dots and upward steps, which webdataset would split or refuse.

    taken: names that are used already in that tar; the new one is added.
    """
    path = PurePosixPath(key)
    if path.suffix.lower().lstrip(".") in audio.EXTENSIONS | decode.EXTENSIONS:
        path = path.with_suffix("")
    folders = [part for part in path.parts[:-1] if part not in ("/", "..", ".")]
    name = base = "/".join([*folders, path.name.replace(".", "_") or "_"])
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    taken.add(name)
    return name


def block_total(plan: Plan, shards: Sequence[int]) -> int | None:
    """Samples of some output shards, where they can be known."""
    return None if plan.listing is None else sum(map(plan.shard_samples, shards))
