"""What the loader asks of a kind of data. Folders, shards, order, resuming and quarantine know no kind by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokenizers_lab.data.fetched import Fetched
from tokenizers_lab.data.sources import Source

Numbers = tuple[float, float, float, float]


@dataclass(frozen=True)
class Raw:
    """A sample before it is decoded: a file, or a file's bytes, and what is known of it."""

    key: str                 # what batches and the quarantine list call it
    name: str                # what errors call it
    content: Path | bytes
    about: dict[str, Any] = field(default_factory=dict)


class Listing(Protocol):
    """Samples that can be reached by their number; kept once, shared by all processes."""

    def __len__(self) -> int:
        """How many samples."""

    def raw(self, index: int) -> Raw:
        """The sample of that number."""


class Reader(ABC):
    """Finds, decodes and puts together samples of one kind, as a data config says. Views are what it decodes."""

    noun: str                            # "images"
    sample: str                          # the sample set that errors propose
    manifests: tuple[str, ...] = ()      # endings of files that list samples
    parts: tuple[str, ...]               # endings of a shard's files that it reads
    room: float | None = None            # samples of a batch × the largest `size` stay within it; none: sizes do not count

    @abstractmethod
    def check(self) -> None:
        """Raises ConfigError if options of the config contradict each other."""

    def prepare(self) -> None:      # noqa: B027 most kinds need nothing
        """Called before training, after `check`. Raises ConfigError if what training needs beside the samples is not there."""

    def locate(self, source: Source, split: str) -> Source:
        """What a source, of `train` or `val`, comes to: a folder may turn out to be of shards. Raises DataError."""
        return source

    @abstractmethod
    def listing(self, source: Source) -> Listing:
        """The samples of a folder or a manifest. Raises DataError if there is none."""

    @abstractmethod
    def from_shard(self, sample: dict[str, Any], name: str) -> Raw:
        """The sample of a shard from its files' bytes by their endings. Raises DataError if one is missing or wrong."""

    def wants(self, raw: Raw) -> bool:
        """Whether the config admits a sample of a shard; those of a listing were chosen when it was made. Raises DataError."""
        return True

    def size(self, raw: Raw) -> float:
        """What a sample of a shard takes of the room. Raises DataError if that cannot be known."""
        raise NotImplementedError

    def sizes(self, listing: Any) -> np.ndarray:
        """What each sample of a listing takes of the room: float64 (N,); NaN where it cannot be known."""
        raise NotImplementedError

    @abstractmethod
    def training(self, raw: Raw, numbers: Numbers) -> Any:
        """The decoded view of a sample that four uniform numbers in [0, 1) choose. Raises DataError."""

    @abstractmethod
    def validation(self, raw: Raw) -> Any:
        """The decoded view of a held-out sample, always the same. Raises DataError."""

    @abstractmethod
    def assemble(self, views: Sequence[Any], keys: list[str]) -> Fetched:
        """A batch of such views."""
