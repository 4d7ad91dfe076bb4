"""Manifests: files that list clips with their text, speaker, language and duration, or images with text and label.

JSON lines, CSV and TSV, these two with a header line.
Paths are relative to the manifest. Column names of the usual collections are understood (`ALIASES`); others are ignored.
"""

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers_lab.data.audio import EXTENSIONS, audio_info
from tokenizers_lab.data.folder import Names, remembered
from tokenizers_lab.data.reading import Raw
from tokenizers_lab.errors import DataError

MANIFESTS = (".jsonl", ".csv", ".tsv")
ALIASES = {
    "file": ("file", "path", "audio", "audio_filepath", "audio_file", "wav", "filename", "file_name", "image"),
    "text": ("text", "transcript", "transcription", "sentence", "caption"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
    "duration": ("duration", "seconds"),
    "label": ("label", "class", "category"),
}


@dataclass(frozen=True)
class Row:
    """One clip or image of a manifest."""

    file: str                        # relative to the manifest
    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    duration: float | None = None    # seconds
    label: str | None = None         # class, of an image


@dataclass
class ClipListing:
    """The clips of a folder or a manifest, in flat buffers that processes share."""

    root: Path
    files: Names                     # relative paths
    texts: Names                     # empty: not known
    speakers: Names
    languages: Names
    durations: np.ndarray            # (N,) float32 seconds; NaN: not known
    labels: Names | None = None      # classes; empty: not known

    def __len__(self) -> int:
        return len(self.files)

    def raw(self, index: int) -> Raw:
        """The clip of that number."""
        key = self.files[index]
        path = self.root / key
        about = {"text": self.texts[index], "speaker": self.speakers[index], "language": self.languages[index]}
        if self.labels is not None:
            about["label"] = self.labels[index]
        return Raw(key, str(path), path, {name: value or None for name, value in about.items()})


def read_manifest(path: Path) -> Iterator[Row]:
    """The clips or images that a manifest lists. Raises DataError with the number of the line that is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield to_row(_parse(line, path, number), f"{path}, line {number}")
                return
            tabs = path.suffix.lower() == ".tsv"
            table = csv.DictReader(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
            for values in table:
                yield to_row(values, f"{path}, line {table.line_num}")
    except FileNotFoundError:
        raise DataError(f"there is no manifest {path}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the manifest {path} cannot be read ({error})") from error


def to_row(values: dict[str, Any], where: str) -> Row:
    """One clip or image from the columns of a manifest, whatever they are called. Raises DataError that begins with `where`."""
    found: dict[str, Any] = {}
    for name, aliases in ALIASES.items():
        value = next((values[alias] for alias in aliases if values.get(alias) not in (None, "")), None)
        found[name] = None if value is None else str(value)
    if found["file"] is None:
        raise DataError(f"{where}: names no file; a column must be called {' or '.join(ALIASES['file'][:3])}")
    if found["duration"] is not None:
        try:
            found["duration"] = float(found["duration"])
        except ValueError:
            raise DataError(f"{where}: the duration {found['duration']!r} is no number of seconds") from None
    return Row(**found)


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """Write JSON lines; what is not known is left out."""
    lines = [json.dumps({k: v for k, v in vars(row).items() if v is not None}, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def find_manifest(folder: Path) -> Path | None:
    """The folder's manifest.jsonl, .csv or .tsv, where it has one."""
    return next((path for ending in MANIFESTS if (path := folder / f"manifest{ending}").is_file()), None)


def open_clips(root: str | Path, shortest: float = 0.0, longest: float = math.inf, timed: bool = False) -> ClipListing:
    """The clips of a manifest, or of a folder: as its manifest.jsonl (.csv, .tsv) says, or else every sound file under it.

    shortest, longest: limits in seconds; where durations are not listed, headers are read to know them, if there are limits.
    timed: headers are read for all durations that are not listed; those of unreadable files remain unknown.
    Kept while the manifest, or none of the folders, changes. Raises DataError if there is no clip, or none within the limits.
    """
    root = Path(root).expanduser().absolute()
    if root.is_dir():
        listed = find_manifest(root)
        if listed is None:
            return remembered(f"clips {shortest} {longest} {timed}", root, lambda folder, names: _choose(
                folder, [Row(name) for name in names], shortest, longest, timed), EXTENSIONS, "sound files")
        root = listed
    try:
        written = root.stat().st_mtime_ns
    except OSError:
        raise DataError(f"there is no manifest {root}") from None
    key = (root, shortest, longest, timed)
    if key not in _known or _known[key][0] != written:
        _known[key] = written, _choose(root.parent, list(read_manifest(root)), shortest, longest, timed, root)
    return _known[key][1]


_known: dict[tuple[Path, float, float, bool], tuple[int, ClipListing]] = {}


def _choose(
    root: Path, rows: list[Row], shortest: float, longest: float, timed: bool, listed: Path | None = None
) -> ClipListing:
    limited = shortest > 0 or longest < math.inf
    if limited or timed:
        rows = [_timed(root, row) for row in rows]
    # an unreadable clip is taken, so that it is noticed where clips are decoded
    chosen = [row for row in rows if not limited or row.duration is None or shortest <= row.duration <= longest]
    if not chosen:
        what = f" between {shortest:g} and {longest:g} s long; widen data.min_seconds and data.max_seconds" if rows else ""
        raise DataError(f"{listed or root}: lists no clip{what}")
    files, texts, speakers, languages, labels = (
        Names([getattr(row, name) or "" for row in chosen]) for name in ("file", "text", "speaker", "language", "label")
    )
    durations = np.array([math.nan if row.duration is None else row.duration for row in chosen], np.float32)
    return ClipListing(root, files, texts, speakers, languages, durations, labels if any(labels.sizes()) else None)


def _timed(root: Path, row: Row) -> Row:
    """The clip with the duration of its header, where none is listed and the file is readable."""
    if row.duration is not None:
        return row
    try:
        return replace(row, duration=audio_info(os.path.join(root, row.file)).seconds)
    except DataError:
        return row


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: is no JSON ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}, line {number}: is no JSON object")
    return values
