"""Folders: the files under them in natural order, and, of images, their classes."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tokenizers_lab.data.decode import EXTENSIONS
from tokenizers_lab.data.reading import Raw
from tokenizers_lab.data.sources import natural_key
from tokenizers_lab.errors import DataError

T = TypeVar("T")


class Names(Sequence[str]):
    """Many strings in two flat buffers: a list of Python strings is copied, page by page, into every worker that reads it."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):   # type: ignore[no-untyped-def]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]].tobytes())

    def sizes(self) -> np.ndarray:
        """Bytes of each string, int64 (N,)."""
        return np.diff(self._ends)


@dataclass
class ImageFolder:
    """The images under a folder, in natural order of their relative paths."""

    root: Path
    names: Names                  # relative paths
    labels: np.ndarray | None     # (N,) int64, or none if an image lies beside the class folders
    classes: list[str]            # top-level folders in natural order; a label is an index into it
    texts: Names | None = None    # captions, where a manifest tells them

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> int | None:
        """Class of an image, where there are classes."""
        return None if self.labels is None else int(self.labels[index])

    def raw(self, index: int) -> Raw:
        """The image of that number, with its class and its caption."""
        key = self.names[index]
        path = self.root / key
        text = None if self.texts is None else self.texts[index]
        return Raw(key, str(path), path, {"label": self.label(index), "text": text or None})


_listed: dict[tuple[str, Path], tuple[dict[str, int], Any]] = {}


def open_folder(root: str | Path) -> ImageFolder:
    """List the images under a folder, through all sub-folders and links; hidden files and other files are ignored.

    A listing is kept as long as none of its folders changes: validation asks for it again and again.
    Raises DataError if there is no such folder, or no image in it.
    """
    return remembered("images", root, list_images)


def list_images(root: Path, names: list[str]) -> ImageFolder:
    """The images of these relative paths; the top-level folders are their classes."""
    tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None}, key=natural_key)
    rank = {top: i for i, top in enumerate(classes)}
    labels = np.array([rank[t] for t in tops if t is not None]) if None not in tops else None
    return ImageFolder(root, Names(names), labels, classes)


def remembered(
    kind: str,
    root: str | Path,
    make: Callable[[Path, list[str]], T],
    extensions: frozenset[str] = EXTENSIONS,
    noun: str = "images",
) -> T:
    """What `make` gives for a folder and the files in it with these endings; kept while none of its folders changes.

    kind: tells the makers apart. noun: what the files are, for errors. Raises DataError.
    """
    root = Path(root).expanduser().absolute()
    if (kind, root) in _listed:
        folders, known = _listed[kind, root]
        if all(_modified(folder) == time for folder, time in folders.items()):
            return known
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    folders = {}
    names = list(_walk(str(root), "", folders, frozenset(), extensions))
    if not names:
        archives = sorted(p.name for p in root.glob("*.tar"))
        hint = f"; for its {len(archives)} shards write {root}/*.tar" if archives else f" ({', '.join(sorted(extensions))})"
        raise DataError(f"there are no {noun} in {root}{hint}")
    found = make(root, names)
    _listed[kind, root] = folders, found
    return found


def _walk(
    folder: str, prefix: str, folders: dict[str, int], parents: frozenset[str], extensions: frozenset[str]
) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in parents:   # a link to a folder that contains it
        return
    try:
        folders[folder] = _modified(folder)
        with os.scandir(folder) as listing:
            entries = sorted((e.name, e.is_dir()) for e in listing if not e.name.startswith((".", "__MACOSX")))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror or error})") from error
    for name, is_folder in sorted(entries, key=lambda e: natural_key(e[0])):
        if is_folder:
            yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", folders, parents | {real}, extensions)
        elif name.rpartition(".")[2].lower() in extensions:
            yield prefix + name


def _modified(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1
