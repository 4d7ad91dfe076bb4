"""Counts and lists the training samples that could not be read, and ends the run when they are too many."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tokenizers_lab.errors import DataError

try:
    import fcntl
except ImportError:     # not on Windows, where only one process writes the file
    fcntl = None        # type: ignore[assignment]

JUDGED_FROM = 1000      # while fewer samples were seen, the share is taken of this many: one bad file at the start is no verdict

logger = logging.getLogger(__name__)


class Bad(NamedTuple):
    """A sample that could not be read."""

    key: str
    reason: str


class Quarantine:
    """A JSONL file of {"key", "reason"}, each key once, which all ranks of a run append to; and the counts of one rank.

    The run ends when the bad samples exceed `allowed` (a share) of those seen, or of JUDGED_FROM while fewer were seen.
    Both count deliveries: a bad sample counts again in the next epoch. seen and bad continue the counts of a resumed run.
    """

    def __init__(self, path: Path | None, allowed: float, seen: int = 0, bad: int = 0, option: str = "data.bad_fraction"):
        """option: what errors call `allowed`."""
        self.path, self.allowed, self.seen, self.bad, self.option = path, allowed, seen, bad, option
        self._listed: set[str] = set()
        self._read = 0   # bytes of the file that were read

    def count(self, good: int, bad: Sequence[Bad]) -> None:
        """Add a batch's readable and unreadable samples. Raises DataError if the unreadable ones are too many."""
        self.seen += good + len(bad)
        self.bad += len(bad)
        self.write_down(bad)
        if bad and self.bad > self.allowed * max(self.seen, JUDGED_FROM):
            listed = f"; they are listed in {self.path}" if self.path else ""
            raise DataError(
                f"{self.bad:,} of {self.seen:,} samples could not be read, more than {self.option} ({self.allowed:g}) allows"
                f"{listed}; the last one: {bad[-1].reason}"
            )

    def write_down(self, bad: Sequence[Bad]) -> None:
        """Write down samples that are not listed yet, without counting them. Raises DataError if the file cannot be written."""
        fresh = {b.key: b for b in bad if b.key not in self._listed}.values()
        if not fresh:
            return
        for sample in fresh:
            logger.warning("skipped an unreadable sample: %s", sample.reason)
        if self.path is None:
            self._listed.update(b.key for b in fresh)
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX)
                self._read_others(file)
                lines = [json.dumps(b._asdict()) + "\n" for b in fresh if b.key not in self._listed]
                file.write("".join(lines).encode())
        except OSError as error:
            raise DataError(f"the quarantine list {self.path} cannot be written ({error.strerror or error})") from error
        self._listed.update(b.key for b in fresh)

    def _read_others(self, file: BinaryIO) -> None:
        """Learn the keys that other ranks, or this run before it was killed, have listed."""
        file.seek(self._read)
        text = file.read()
        whole = text.rfind(b"\n") + 1
        self._read += whole
        if whole < len(text):   # a line torn by a kill in the middle of a write
            file.truncate(self._read)
        for line in text[:whole].splitlines():
            self._listed.add(json.loads(line)["key"])
