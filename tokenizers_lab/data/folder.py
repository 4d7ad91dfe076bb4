"""Folders of images: listing, class labels, and batches that are a pure function of the step."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from tokenizers_lab.data.decode import EXTENSIONS, converted_from, open_image
from tokenizers_lab.data.fetched import Fetched, assemble
from tokenizers_lab.data.quarantine import Bad
from tokenizers_lab.data.sampling import batch_positions, sample_index, substitute_index, view_numbers
from tokenizers_lab.data.sources import natural_key
from tokenizers_lab.data.transforms import training_view, validation_view
from tokenizers_lab.errors import DataError
from tokenizers_lab.settings import ImageDataConfig

ATTEMPTS = 100   # substitutes that are tried for one unreadable sample


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


@dataclass
class ImageFolder:
    """The images under a folder, in natural order of their relative paths."""

    root: Path
    names: Names                  # relative paths
    labels: np.ndarray | None     # (N,) int64, or none if an image lies beside the class folders
    classes: list[str]            # top-level folders in natural order; a label is an index into it

    def __len__(self) -> int:
        return len(self.names)

    def label(self, index: int) -> int | None:
        """Class of an image, where there are classes."""
        return None if self.labels is None else int(self.labels[index])


_listed: dict[Path, tuple[dict[str, int], ImageFolder]] = {}


def open_folder(root: str | Path) -> ImageFolder:
    """List the images under a folder, through all sub-folders and links; hidden files and other files are ignored.

    A listing is kept as long as none of its folders changes: validation asks for it again and again.
    Raises DataError if there is no such folder, or no image in it.
    """
    root = Path(root).expanduser().absolute()
    if root in _listed:
        folders, known = _listed[root]
        if all(_modified(folder) == time for folder, time in folders.items()):
            return known
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    folders = {}
    names = list(_walk(str(root), "", folders, frozenset()))
    if not names:
        archives = sorted(p.name for p in root.glob("*.tar"))
        hint = f"; for its {len(archives)} shards write {root}/*.tar" if archives else f" ({', '.join(sorted(EXTENSIONS))})"
        raise DataError(f"there are no images in {root}{hint}")
    tops = [name.split("/", 1)[0] if "/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None}, key=natural_key)
    rank = {top: i for i, top in enumerate(classes)}
    labels = np.array([rank[t] for t in tops if t is not None]) if None not in tops else None
    found = ImageFolder(root, Names(names), labels, classes)
    _listed[root] = folders, found
    return found


class FolderBatches(Dataset):
    """Training batches of a rank: item m is the batch of micro-step m, whoever computes it and whenever."""

    def __init__(self, folder: ImageFolder, cfg: ImageDataConfig, batch_size: int, seed: int, rank: int, world: int):
        self.folder, self.cfg, self.batch_size, self.seed, self.rank, self.world = folder, cfg, batch_size, seed, rank, world

    def __getitem__(self, step: int) -> Fetched:
        views, keys, labels, bad = [], [], [], list[Bad]()
        for position in batch_positions(step, self.batch_size, self.rank, self.world):
            index = sample_index(position, len(self.folder), self.seed)
            for attempt in range(ATTEMPTS):
                key = self.folder.names[index]
                try:
                    with open_image(self.folder.root / key, self.cfg.max_pixels) as image:
                        numbers = view_numbers(self.seed, position)
                        views.append(training_view(image, self.cfg, numbers, str(self.folder.root / key)))
                    break
                except DataError as error:
                    bad.append(Bad(key, str(error)))
                    index = substitute_index(position, attempt, len(self.folder), self.seed)
            else:
                return Fetched(bad=bad, error=f"{ATTEMPTS} images in a row could not be read; the last one: {bad[-1].reason}")
            keys.append(key)
            labels.append(self.folder.label(index))
        batch = assemble(views, keys, labels)
        batch.bad = bad
        return batch


class FolderValidation(Dataset):
    """Validation batches of a rank, in order: the images whose place in `chosen` is rank modulo world. No padding."""

    def __init__(self, folder: ImageFolder, cfg: ImageDataConfig, batch_size: int, chosen: Sequence[int]):
        self.folder, self.cfg, self.batch_size, self.chosen = folder, cfg, batch_size, chosen

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch_size)

    def __getitem__(self, number: int) -> Fetched:
        views, keys, labels, converted = [], [], [], dict[str, str]()
        for index in self.chosen[number * self.batch_size : (number + 1) * self.batch_size]:
            key = self.folder.names[index]
            try:
                with open_image(self.folder.root / key, self.cfg.max_pixels) as image:
                    if (stored := converted_from(image)) is not None:
                        converted[key] = stored
                    views.append(validation_view(image, self.cfg, str(self.folder.root / key)))
            except DataError as error:
                return Fetched(error=str(error))
            keys.append(key)
            labels.append(self.folder.label(index))
        batch = assemble(views, keys, labels)
        batch.converted = converted
        return batch


def _walk(folder: str, prefix: str, folders: dict[str, int], parents: frozenset[str]) -> Iterator[str]:
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
            yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", folders, parents | {real})
        elif name.rpartition(".")[2].lower() in EXTENSIONS:
            yield prefix + name


def _modified(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1
