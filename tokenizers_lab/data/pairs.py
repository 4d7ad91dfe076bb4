"""Images with captions and classes: the listings of manifests, and the pairs of published collections."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenizers_lab.data.corpora import stamp_text
from tokenizers_lab.data.folder import ImageFolder, Names, open_folder
from tokenizers_lab.data.manifest import Row, find_manifest, read_manifest
from tokenizers_lab.data.sources import natural_key
from tokenizers_lab.draw import stable_seed
from tokenizers_lab.errors import DataError

STAMPS = Path("usr/share/tuxpaint/stamps")


@dataclass(frozen=True)
class Pair:
    """An image of a collection, its caption and its class."""

    key: str          # its place in the collection, without an ending
    image: Path
    text: str
    label: str


def open_images(root: str | Path, texts: bool = False) -> ImageFolder:
    """The images of a manifest, or of a folder: as its manifest.jsonl (.csv, .tsv) says, or else all that are under it.

    texts: only those with a caption, which a manifest must tell. A class is the manifest's label, a whole number or a name (all
    names are then numbered in natural order), else there is none. Kept while the manifest, or none of the folders, changes.
    Raises DataError.
    """
    root = Path(root).expanduser().absolute()
    manifest = find_manifest(root) if root.is_dir() else root
    if manifest is None:
        if texts:
            raise DataError(f"{root}: data.texts needs a manifest.jsonl (.csv, .tsv) there that tells the captions")
        return open_folder(root)
    try:
        written = manifest.stat().st_mtime_ns
    except OSError:
        raise DataError(f"there is no manifest {manifest}") from None
    key = (manifest, texts)
    if key not in _known or _known[key][0] != written:
        rows = [row for row in read_manifest(manifest) if not texts or (row.text or "").strip()]
        if not rows:
            raise DataError(f"{manifest}: lists no image{' with a caption' if texts else ''}")
        _known[key] = written, list_rows(manifest.parent, rows)
    return _known[key][1]


_known: dict[tuple[Path, bool], tuple[int, ImageFolder]] = {}


def list_rows(root: Path, rows: list[Row]) -> ImageFolder:
    """The images that rows of a manifest name, in their order."""
    given = [row.label for row in rows if row.label is not None]
    classes = sorted(set(given), key=natural_key)
    labels = None
    if len(given) == len(rows):
        numbered = all(label.isdecimal() for label in classes)
        labels = np.array([int(label) if numbered else classes.index(label) for label in given])
    texts = Names([(row.text or "").strip() for row in rows])
    return ImageFolder(root, Names([row.file for row in rows]), labels, classes, texts)


def stamp_pairs(root: Path) -> Iterator[Pair]:
    """The Debian package tuxpaint-stamps-default, unpacked: pictures with their English captions; classes are the top folders.

    Pictures without a caption are left out: these are mirrored versions of others. Raises DataError if there is none.
    """
    stamps = root / STAMPS
    found = sorted(stamps.rglob("*.png"), key=lambda path: natural_key(path.as_posix()))
    if not found:
        raise DataError(f"{stamps}: holds no stamps; is it the package tuxpaint-stamps-default?")
    for path in found:
        text = stamp_text(path.with_suffix(".txt"))
        if text:
            key = path.relative_to(stamps).with_suffix("").as_posix()
            yield Pair(key, path, text, key.split("/", 1)[0])


def split_pairs(pairs: list[Pair], share: float) -> dict[str, list[Pair]]:
    """train and val: of each class the pairs with the smallest hashes of their captions are held out, at least one of several.

    Pairs of a class with one caption, often views of one thing, stay together: of each class as many captions are held out as
    the share makes. Other pictures in the collection change hardly anything, their order nothing.
    """
    held: set[tuple[str, str]] = set()
    for label in sorted({pair.label for pair in pairs}):
        captions = list({pair.text for pair in pairs if pair.label == label})
        captions.sort(key=lambda text: stable_seed("held out", label, text))
        number = min(max(1, math.floor(share * len(captions) + 0.5)), len(captions) - 1) if share else 0
        held |= {(label, text) for text in captions[:number]}
    parts: dict[str, list[Pair]] = {"train": [], "val": []}
    for pair in pairs:
        parts["val" if (pair.label, pair.text) in held else "train"].append(pair)
    return parts
