"""What a decoding process hands to the training process."""

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from tokenizers_lab.data.quarantine import Bad


@dataclass
class Fetched:
    """A decoded batch, the samples that were unreadable on the way, and, instead of an exception, the error that ended it.

    Each kind of data adds its own fields and says how they become a batch.
    """

    keys: list[str] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    error: str | None = None           # a DataError's line
    stream: int = 0                    # shards: which of the rank's streams this is
    position: list[int] | None = None  # shards: that stream's epoch, place and index after this batch

    def pin_memory(self) -> "Fetched":
        """Called by DataLoader's pinning thread."""
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), Tensor):
                setattr(self, f.name, value.pin_memory())
        return self

    def batch(self) -> Any:
        """The batch as training sees it."""
        raise NotImplementedError
