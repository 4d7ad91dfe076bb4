"""The folder that is written: which shards are finished, what was skipped, and whether a second run goes on with the same work.

A shard is written under another name, synced, renamed; then its record, with its hash, in the same way. A shard whose record is
there and right is finished; anything else is made anew.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers_lab.asset_readers import sha256_of
from tokenizers_lab.data.quarantine import JUDGED_FROM, Bad
from tokenizers_lab.data.tokens import FORMATS, MANIFEST, RECORDS, read_token_manifest
from tokenizers_lab.errors import CheckpointError, DataError, TokenizersLabError
from tokenizers_lab.tokenizing.encoding import Made
from tokenizers_lab.tokenizing.writing import ShardWriter, open_writer
from tokenizers_lab.training.checkpoint import sync

WAIT = 20.0           # seconds for which the processes of a killed run are given to end
SHOWN = {             # what must be as it was when the run began, in words
    "model_sha256": "of another model (its weights have SHA-256 {was:.12}, these {now:.12})",
    "system": "of another model ({was}, not {now})",
    "source_fingerprint": "of another source, or its files have come, gone or been renamed since",
    "version": "of another version of the format",
}


class TokenFolder:
    """An open output folder. `header`: what manifest.json says from the start on."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header = path, header
        self.ending = FORMATS[header["options"]["format"]]

    def file(self, shard: int) -> str:
        """File name of a shard."""
        return f"shard-{shard:06d}{self.ending}"

    def record(self, shard: int) -> Path:
        """Where it is said that a shard is finished."""
        return self.path / RECORDS / f"shard-{shard:06d}.json"

    def finished(self, shard: int) -> bool:
        """Whether a shard is there with the hash that its record tells."""
        try:
            said = json.loads(self.record(shard).read_text())
            file = self.path / self.file(shard)
            return file.stat().st_size == said["bytes"] and sha256_of(file) == said["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all shards, in order."""
        for shard in range(self.header["shards"]):
            yield json.loads(self.record(shard).read_text())

    def close_manifest(self, bad_fraction: float) -> dict[str, Any]:
        """Write the manifest of the finished folder. Raises DataError if more than that share of the samples was skipped."""
        samples, seconds, skipped, files = 0, 0.0, list[dict[str, Any]](), {}
        for shard, said in enumerate(self.records()):
            samples += said["samples"]
            seconds += said["seconds"]
            skipped += [{**bad, "shard": self.file(shard)} for bad in said["skipped"]]
            files[said["file"]] = {name: said[name] for name in ("samples", "bytes", "sha256")}
        if len(skipped) > bad_fraction * (samples + len(skipped)):
            raise too_many(self.path, len(skipped), samples + len(skipped), bad_fraction, skipped[-1]["reason"])
        manifest = {**self.header, "state": "finished", "samples": samples}
        if self.header["kind"] == "speech":
            manifest["seconds"] = round(seconds, 3)
        manifest |= {"skipped_samples": len(skipped), "skipped": skipped, "files": files}
        self.write(self.path / MANIFEST, manifest)
        return manifest

    def write(self, target: Path, value: dict[str, Any]) -> None:
        """JSON, aside, synced, renamed. Raises TokenizersLabError if the disk is full."""
        draft = draft_of(target)
        with writing(self.path, target.name, draft):
            with open(draft, "w", encoding="utf-8") as file:
                file.write(json.dumps(value, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
            sync(target.parent)


class ShardSink:
    """One shard on its way: blocks in their order in, a finished file out."""

    def __init__(self, folder: TokenFolder, shard: int):
        self.folder, self.shard = folder, shard
        self.target = folder.path / folder.file(shard)
        self.draft = draft_of(self.target)
        self.writer: ShardWriter | None = None
        self.samples, self.seconds = 0, 0.0
        self.bad: list[Bad] = []

    def add(self, made: Made) -> None:
        """Append a block; with the last one the shard is finished. Raises TokenizersLabError if the disk is full."""
        header = self.folder.header
        try:
            with writing(self.folder.path, self.target.name, self.draft):
                if self.writer is None:
                    speech = header["kind"] == "speech"
                    notes = {key: str(header[key]) for key in ("made_by", "system", "model_sha256")}
                    form = header["options"]["format"]
                    self.writer = open_writer(self.draft, form, made.kind, speech, made.dtype, 2 if speech else 3, notes)
                self.writer.add(made.samples)
                if made.last:
                    self.writer.close()
        except BaseException:
            self.discard()
            raise
        self.samples += len(made.samples)
        self.seconds += sum(sample.about.get("seconds", 0.0) for sample in made.samples)
        self.bad += made.bad
        if made.last:
            self.finish()

    def finish(self) -> None:
        """Rename the shard, then write its record."""
        said = {
            "file": self.target.name, "samples": self.samples, "seconds": self.seconds, "bytes": self.draft.stat().st_size,
            "sha256": sha256_of(self.draft), "skipped": [bad._asdict() for bad in self.bad]}
        with writing(self.folder.path, self.target.name, self.draft):
            os.replace(self.draft, self.target)
            sync(self.folder.path)
        self.folder.write(self.folder.record(self.shard), said)

    def discard(self) -> None:
        """Leave nothing of an unfinished shard."""
        if self.writer is not None:
            self.writer.discard()
            self.writer = None
        self.draft.unlink(missing_ok=True)


class Tally:
    """Samples seen and skipped so far, those of finished shards included."""

    def __init__(self, folder: TokenFolder, allowed: float):
        self.folder, self.allowed, self.seen, self.bad = folder, allowed, 0, 0

    def count(self, good: int, bad: list[Bad]) -> None:
        """Add a block's. Raises DataError once the skipped ones are too many of at least JUDGED_FROM seen."""
        self.seen += good + len(bad)
        self.bad += len(bad)
        if bad and self.bad > self.allowed * max(self.seen, JUDGED_FROM):
            raise too_many(self.folder.path, self.bad, self.seen, self.allowed, bad[-1].reason)


def too_many(out: Path, bad: int, seen: int, allowed: float, reason: str) -> DataError:
    """The error of too many unreadable samples."""
    return DataError(f"{bad:,} of {seen:,} samples could not be encoded, more than --bad-fraction {allowed:g} allows (they are "
                     f"listed in {out / RECORDS}); the last one: {reason}")


@contextmanager
def open_token_folder(path: Path, header: dict[str, Any]) -> Iterator[TokenFolder]:
    """The folder, for this run alone: new, or as an interrupted run of the same work left it.

    Raises CheckpointError if it holds other work, or another run is at it.
    """
    folder = TokenFolder(path, header)
    with writing(path, MANIFEST):
        (path / RECORDS).mkdir(parents=True, exist_ok=True)
    with alone(path):
        if (path / MANIFEST).exists():
            folder.header = same_work(path, header)
        else:
            foreign = sorted(p.name for p in path.iterdir() if p.name not in (RECORDS, ".lock") and not is_draft(p.name))
            if foreign:
                raise CheckpointError(f"{path} holds other files ({foreign[0]}): give a new folder")
        for leftover in [*path.glob(".*.tmp"), *(path / RECORDS).glob(".*.tmp")]:
            leftover.unlink()
        if not (path / MANIFEST).exists():
            folder.write(path / MANIFEST, folder.header)
        yield folder


def same_work(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header that the folder began with. Raises CheckpointError if it is of other work."""
    try:
        found = read_token_manifest(path)
    except DataError as error:
        raise CheckpointError(f"{error}: give a new folder") from error
    options = found.get("options", {})
    for name, now in header["options"].items():
        if options.get(name) != now:
            option = "--" + name.replace("_", "-")
            was = f"with {option} {options[name]}" if name in options else f"without {option}"
            raise CheckpointError(f"{path} was begun {was}, not {now}: give the same options, or a new folder")
    for key, words in SHOWN.items():
        if found.get(key) != header[key]:
            raise CheckpointError(f"{path} is {words.format(was=found.get(key), now=header[key])}: give a new folder")
    return {key: found[key] for key in header} | {"state": "unfinished"}


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises CheckpointError if another run keeps it."""
    with open(path / ".lock", "w") as lock:
        try:
            import fcntl
        except ImportError:      # Windows: two runs at once are the user's to avoid
            yield
            return
        end = time.monotonic() + WAIT
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)      # of this process alone: its children do not inherit it
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    raise CheckpointError(f"another toklab tokenize is at work in {path}: wait for it, or end it") from None
                time.sleep(0.2)
        yield


@contextmanager
def writing(path: Path, name: str, draft: Path | None = None) -> Iterator[None]:
    """Errors of the disk become one line that says what to do; the draft is deleted then."""
    try:
        yield
    except OSError as error:
        if draft is not None:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        raise TokenizersLabError(f"{path}: {name} cannot be written ({error.strerror or error}). Finished shards are whole: make "
                                 "room, then run the same command again") from error


def draft_of(target: Path) -> Path:
    """The name under which this process writes a file."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def is_draft(name: str) -> bool:
    """Whether it is a name of `draft_of`."""
    return name.startswith(".") and name.endswith(".tmp")
